"""Write tables of measured.md and serving.md from the stored results: python -m benchmarks.measured

Each table is between two comments with its name, <!-- step --> and <!-- /step -->. The text around the tables is
written by hand. A machine has its column or group of rows once it has answered the question.
"""

import argparse
import re
from pathlib import Path

from . import tables
from .records import RESULTS, ROOT, read_machines

#: name of the block: question, table
Blocks = dict[str, tuple[str, tables.Table]]
DOCUMENTS: dict[Path, Blocks] = {
    ROOT / "docs" / "reference" / "measured.md": {
        "cpu": ("cpu", tables.cpu_table),
        "shares": ("cpu", tables.shares_table),
        "loop": ("loop", tables.cpu_table),
        "generate": ("generate", tables.generate_table),
        "experts": ("experts", tables.experts_table),
        "launch": ("launch", tables.launch_table),
        "step": ("ops", tables.step_table),
        "once": ("ops", tables.once_table),
        "train_step": ("train_step", tables.train_step_table),
        "memory": ("memory", tables.memory_table),
    },
    ROOT / "docs" / "how-to" / "serving.md": {"serve": ("serve", tables.serve_table)},
}


def rewrite_tables(path: Path, results: Path = RESULTS) -> str:
    """Return the text of a document with every block written again. Raises ValueError if it lacks one."""
    document = path.read_text()
    for name, (question, table) in DOCUMENTS[path].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(document)) != 1:
            raise ValueError(f"{path.name} must hold <!-- {name} --> and <!-- /{name} --> once")
        records = read_machines(results, question)
        text = f"No machine has answered this yet: `make bench WHAT={question}`, then `python -m benchmarks.measured`."
        if records:
            text = f"{table(records)}\n\n{tables.origins(question, records)}"
        document = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", document)
    return document


def main() -> None:
    """Rewrite the documents."""
    argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__).parse_args()
    for path in DOCUMENTS:
        path.write_text(rewrite_tables(path))
        print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
