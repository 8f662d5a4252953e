"""Make the page of errors from the tables."""

import sys

import torch

from .registry import ACCEPTED, GROUPS, REFUSED, Accepted, Refused, told

VERSIONS = f"Python {sys.version_info[0]}.{sys.version_info[1]} and torch {'.'.join(torch.__version__.split('.')[:2])}"


def report() -> str:
    """Return the page."""
    names = [module.__name__.rpartition(".")[2] for module in GROUPS]
    lines = [
        "# Bad inputs: what is refused, and what is accepted",
        "",
        "Made by `make docs` from the tables in `tests/bad_inputs/`; `tests/docs/test_bad_inputs.py` runs each row:",
        f"{len(REFUSED)} inputs are refused, {len(ACCEPTED)} odd ones accepted.",
        f"Some texts are {VERSIONS}'s own, which others may put in other words.",
        "`/tmp/dir` is a new directory, `patch` pytest's `MonkeyPatch`, `...` what differs from machine to machine.",
        "On the command line, `mft` prints the message alone and ends with exit code 2; `MFT_TRACEBACK=1` shows where.",
        "",
        "| group | refused | accepted |",
        "|---|---:|---:|",
    ]
    for name in names:
        counts = [sum(case.group == name for case in cases) for cases in (REFUSED, ACCEPTED)]
        lines.append(f"| [{name}](#{name}) | {counts[0]} | [{counts[1]}](#accepted-and-what-happens) |")
    for module, name in zip(GROUPS, names):
        lines += ["", f"## {name.capitalize()}", "", *(module.__doc__ or "").strip().split("\n")]
        for case in REFUSED:
            if case.group == name:
                lines += _entry(case)
    lines += ["", "## Accepted, and what happens", "", "| group | what | what happens |", "|---|---|---|"]
    lines += [_row(case) for name in names for case in ACCEPTED if case.group == name]
    return "\n".join(lines) + "\n"


def _entry(case: Refused) -> list[str]:
    said = told(case)
    do = f"give what it asks for, “{case.rule}”" if case.remedy is None else case.remedy
    return [
        *("", f"### {case.title.capitalize()}", ""),
        *("```python", case.source, "```", "```text", f"{said.error.__name__}: {said.shown}", "```"),
        f"What to do: {do}" + ("" if do.endswith("?") else "."),
    ]


def _row(case: Accepted) -> str:
    return f"| {case.group} | {case.title} | {case.happens} |"
