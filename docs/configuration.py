"""Write docs/reference/configuration.md from the JSON Schema of a run and of a study: make reference."""

import re
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from mft.cli.keys import Section, run_schema, sections
from mft.tracking.markdown_table import markdown_table
from mft_study.load import study_schema

PAGE = Path(__file__).parent / "reference" / "configuration.md"
HEAD = """# Configuration

Every key of a YAML file, and of an override such as `train.lr=3e-4` on the command line. `mft train --help` lists those
of a run, `mft train --help train.lr` explains one. For editors `mft schema run` and `mft schema study` have all of
this. By `make reference`, from the comments in the sources.

`null` means none. Where a default is missing, the key must be given. `NAME` is a name of your own.
"""
RUN = """## A run

What `mft train`, `mft finetune`, `mft evaluate`, `mft sensitivity` and `mft data show` read.
"""
STUDY = """## A study

What `mft compare` and `mft ablate` read ([comparison.md](../how-to/comparison.md)).
"""
# Characters that Markdown would take for markup.
MARKUP = re.compile(r"([*<])")


def main() -> None:
    """Write the page."""
    PAGE.write_text(configuration(), encoding="utf-8")


def configuration() -> str:
    """Return the page."""
    printed: dict[tuple[str, tuple[str, ...]], str] = {}
    parts = [HEAD, RUN, *_parts(sections(run_schema()), "run", printed)]
    return "\n".join([*parts, STUDY, *_parts(sections(study_schema()), "study", printed)])


def _parts(known: list[Section], what: str, printed: dict[tuple[str, tuple[str, ...]], str]) -> Iterator[str]:
    """Yield a heading with a table for each section; printed: titles of sections with the same keys and defaults."""
    for section in known:
        if not section.keys:
            continue
        title = f"{what}: {section.path or 'top level'}"
        yield f"### {title}\n"
        yield f"{_text(section.said)}\n"
        same = (section.kind, tuple(key.assigned.removeprefix(section.path) for key in section.keys))
        if section.kind and same in printed:
            yield f"Keys and defaults as of [{printed[same]}](#{_anchor(printed[same])}).\n"
            continue
        printed[same] = title
        table = Table("key", "value", "default", "meaning")
        for key in section.keys:
            default = "" if key.default is None else f"`{key.default}`"
            table.add_row(f"`{key.path}`", _text(key.type), default, _text(key.said))
        yield markdown_table(table)


def _anchor(title: str) -> str:
    """Return the anchor that forges make from a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _text(text: str) -> str:
    return MARKUP.sub(r"\\\1", text)


if __name__ == "__main__":
    main()
