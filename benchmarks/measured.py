"""Write the tables of docs/reference/measured.md, machines side by side, from the stored results.

    python -m benchmarks.measured

Each table is between two comments with its name, <!-- step --> and <!-- /step -->. The text around the tables is
written by hand. A machine has its column or group of rows once it has answered the question.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from .records import RESULTS, ROOT, Record, by_machine, machine
from .tables import case_name, experts_tables, markdown

DOCUMENT = ROOT / "docs" / "reference" / "measured.md"
SQUARE = (4096, 4096)
STEPS = {
    "ours, from scores": "ours, from bf16 scores",
    "ours, module": "`MaskedLinear`, fp32 scores, mask memoised",
    "ours, held mask": "ours, held mask of 1 bit a weight, accumulating",
    "eager": "eager PyTorch from a given threshold, keeps the masked weight",
    "compiled": "the same under `torch.compile`",
    "LoRA": "LoRA of rank 16 (peft)",
    "the paper's layer": "the paper's layer (a sort in every forward)",
}
ONCE = {
    ("threshold", "ours"): "`kept_threshold`",
    ("threshold", "sort"): "`torch.sort`",
    ("threshold", "kthvalue"): "`kthvalue`",
    ("threshold", "copy"): "a copy of the scores",
    ("packing", "ours"): "`pack_mask`",
    ("optimiser", "ours, int16 and 8 bits"): "`score_step`, int16 scores and 8-bit moments, with the next mask",
    ("optimiser", "ours, fp32"): "`score_step`, fp32, with the next mask",
    ("optimiser", "torch AdamW, fused"): "torch's fused AdamW from finished gradients, without a mask",
    ("optimiser", "compiled"): "the same mathematics under `torch.compile`, fp32, without a mask",
}
Records = Mapping[str, Record]


def step_table(records: Records) -> str:
    """Return from `ops` the whole step of the square layer, in units of dense; one group of rows per machine."""
    found = {
        name: [c for c in r["cases"] if c["op"] == "step" and (c["n"], c["k"]) == SQUARE] for name, r in records.items()
    }
    tokens = sorted({case["m"] for cases in found.values() for case in cases} - {8})
    rows = []
    for name, cases in found.items():
        rows.append([f"*{machine(records[name])}*", *("" for _ in tokens)])
        ratios = {(case["competitor"], case["m"]): case["ratio"]["median"] for case in cases}
        rows += [[label, *(_ratio(ratios.get((own, m))) for m in tokens)] for own, label in STEPS.items()]
    return markdown(["", *(f"M = {m}" for m in tokens)], rows)


def once_table(records: Records) -> str:
    """Return from `ops` the work on 4096 x 4096 scores once per step, in ms; one column per machine."""
    columns = []
    for record in records.values():
        own = [case for case in record["cases"] if not case["m"] and (case["n"], case["k"]) == SQUARE]
        columns.append({(case["op"], case["competitor"]): case["ms"]["median"] for case in own})
    rows = [[label, *(_three(column.get(key)) for column in columns)] for key, label in ONCE.items()]
    return markdown(["ms", *map(machine, records.values())], rows)


def train_step_table(records: Records) -> str:
    """Return from `train_step` tokens/s and peak memory of each model; one group of rows per machine."""
    models = list(dict.fromkeys(row["model"] for r in records.values() for row in r["competitors"]))
    rows = []
    for record in records.values():
        rows.append([f"*{machine(record)}*", *("" for _ in range(2 * len(models)))])
        own = {(row["model"], row["competitor"]): row for row in record["competitors"]}
        for name in dict.fromkeys(row["competitor"] for row in record["competitors"]):
            shown = [own[model, name] for model in models]
            rows.append(
                [name, *(t for row in shown for t in (f"{row['tokens_per_s']['median']:.0f}", f"{row['peak_gb']:.2f}"))]
            )
    return markdown(["", *(head for model in models for head in (f"{model}: tokens/s", "peak GB"))], rows)


def memory_table(records: Records) -> str:
    """Return from `memory` the % of the weight's bytes beyond the gradients; one column per machine."""
    columns = [{f["quantity"]: f["measured"]["median"] for f in r["findings"]} for r in records.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(f"{column[name]:.0f}" if name in column else "" for column in columns)] for name in names]
    return markdown(["% of the weight", *map(machine, records.values())], rows)


def cpu_table(records: Records) -> str:
    """Return from `cpu` the times in units of dense, with the goal in brackets; one group of columns per machine."""
    names = list(dict.fromkeys(case_name(case) for r in records.values() for case in r["cases"]))
    competitors = {name: _competitors(record) for name, record in records.items()}
    columns = {
        (name, own): {case_name(c): c for c in records[name]["cases"] if c["competitor"] == own}
        for name in records
        for own in competitors[name]
    }
    rows = [[place, *(_measured_and_asked(column.get(place)) for column in columns.values())] for place in names]
    heads = [f"{machine(records[name])}: {own}" for name, own in columns]
    return markdown(["times dense (asked)", *heads], rows)


def shares_table(records: Records) -> str:
    """Return from `cpu` the % of the machine's ceilings that ours and dense reach; one group of columns per machine."""
    names = list(dict.fromkeys(case_name(c) for r in records.values() for c in r["cases"]))
    competitors = ("dense", "ours, from scores", "ours, held mask")
    columns = [{(case_name(c), c["competitor"]): c["share"] for c in r["cases"]} for r in records.values()]
    rows = [[name, *(_percent(column.get((name, own))) for column in columns for own in competitors)] for name in names]
    heads = [f"{machine(r)}: {own}" for r in records.values() for own in competitors]
    return markdown(["% of the ceiling", *heads], rows)


def generate_table(records: Records) -> str:
    """Return from `generate` tokens/s; one column per machine and dtype."""
    columns = {
        (name, dtype): {row["competitor"]: row for row in r["competitors"] if row["dtype"] == dtype}
        for name, r in records.items()
        for dtype in dict.fromkeys(row["dtype"] for row in r["competitors"])
    }
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(f"{c[name]['tokens_per_s']['median']:.3g}" for c in columns.values())] for name in names]
    return markdown(["tokens/s", *(f"{machine(records[name])}, {dtype}" for name, dtype in columns)], rows)


def experts_table(records: Records) -> str:
    """Return from `experts` one table per machine."""
    return "\n\n".join(f"{machine(record)}:\n\n{experts_tables(record)[0]}" for record in records.values())


def launch_table(records: Records) -> str:
    """Return from `launch` us per call of nn.Linear, and our difference from it; one column per machine and dtype."""
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for name, record in records.items():
        for row in record["calls"]:
            label, shown = f"{row['situation']}: {row['competitor']}", _three(row["us"]["median"])
            if row["above"] is not None:
                label, shown = f"{label} - nn.Linear", _beside_asked(row["above"]["median"], row["target"])
            columns.setdefault((name, row["dtype"]), {})[label] = shown
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    heads = [f"{machine(records[name])}, {dtype}" for name, dtype in columns]
    rows = [[label, *(column.get(label, "") for column in columns.values())] for label in labels]
    return markdown(["us (asked)", *heads], rows)


#: name of the block: question, table
BLOCKS: dict[str, tuple[str, Callable[[Records], str]]] = {
    "cpu": ("cpu", cpu_table),
    "shares": ("cpu", shares_table),
    "generate": ("generate", generate_table),
    "experts": ("experts", experts_table),
    "launch": ("launch", launch_table),
    "step": ("ops", step_table),
    "once": ("ops", once_table),
    "train_step": ("train_step", train_step_table),
    "memory": ("memory", memory_table),
}


def written(document: str, results: Path = RESULTS) -> str:
    """Return the document with every block written again. Raises ValueError if it lacks one."""
    for name, (question, table) in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(document)) != 1:
            raise ValueError(f"{DOCUMENT.name} must hold <!-- {name} --> and <!-- /{name} --> once")
        records = by_machine(results, question)
        text = f"{table(records)}\n\n{_origins(question, records)}" if records else _missing(question)
        document = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", document)
    return document


def main() -> None:
    """Rewrite the document."""
    argparse.ArgumentParser(prog="python -m benchmarks.measured", description=__doc__).parse_args()
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
    print(f"written to {DOCUMENT.relative_to(ROOT)}")


def _missing(question: str) -> str:
    return f"No machine has answered this yet: `make bench WHAT={question}`, then `python -m benchmarks.measured`."


def _origins(question: str, records: Records) -> str:
    told = []
    for record in records.values():
        where = record["environment"]
        threads = f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}"
        told.append(
            f"{machine(record)}: {threads}, torch {where['torch']}, commit {where['commit'][:10]}, {where['date'][:10]}"
        )
    return f"`make bench WHAT={question}`. {'; '.join(told)}."


def _competitors(record: Record) -> list[str]:
    return [name for name in dict.fromkeys(case["competitor"] for case in record["cases"]) if name != "dense"]


def _measured_and_asked(case: Record | None) -> str:
    """Return the cell, bold if the goal was missed."""
    if case is None:
        return ""
    shown, asked = _ratio(case["ratio"]["median"]), case["target"]
    if asked is None:
        return shown
    return f"{shown} ({asked:.2f})" if case["ratio"]["median"] <= asked else f"**{shown}** ({asked:.2f})"


def _beside_asked(us: float, asked: float | None) -> str:
    """Return the cell, bold if the goal was missed."""
    if asked is None:
        return _three(us)
    return f"{_three(us)} ({asked:g})" if us <= asked else f"**{_three(us)}** ({asked:g})"


def _three(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


if __name__ == "__main__":
    main()
