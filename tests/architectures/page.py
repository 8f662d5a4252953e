"""docs/architectures.md, written from rows, and read again so that a part of a sweep can be tried alone."""

from collections.abc import Iterable
from pathlib import Path

import transformers

from .attempts import STATES, UNTRAINED, Row
from .sweeps import Sweep

PAGE = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
HEADS = {
    "converted": ("architecture", "masked by default", "left out, or why not by default"),
    "wrong": ("wrong", "how"),
    "refused": ("refused", "why"),
    "not made": ("not made", "why"),
}


def read(sweeps: Iterable[Sweep], page: Path = PAGE) -> dict[str, dict[str, Row]]:
    """The page's rows: those of each sweep by model type."""
    rows: dict[str, dict[str, Row]] = {sweep.name: {} for sweep in sweeps}
    names = {sweep.title: sweep.name for sweep in sweeps}
    states = {cells: state for state, cells in HEADS.items()}
    name = state = None
    for line in page.read_text().splitlines() if page.exists() else ():
        cells = tuple(cell.strip() for cell in line.split("|")[1:-1])
        if line.startswith("## "):
            name, state = names.get(line.removeprefix("## ")), None
        elif cells in states:
            state = states[cells]
        elif name and state and len(cells) > 1 and not cells[0].startswith("-"):
            kind, words, *left = cells
            rows[name][kind] = Row(kind, state, words, *left)
    return rows


def write(rows: dict[str, dict[str, Row]], sweeps: Iterable[Sweep], page: Path = PAGE) -> None:
    """One section a sweep, its converted ones first."""
    sweeps = list(sweeps)
    lines = [
        "# Architectures that were converted\n",
        f"By `make architectures` with transformers {transformers.__version__}, in small sizes, with random weights:",
        f"**{_counts([row for sweep in sweeps for row in rows[sweep.name].values()])}.**",
        "Converted means: with everything kept the outputs are the model's own, bit for bit (by PyTorch's product in",
        "the kernels' place), of a mixture of experts within 1e-5 of their largest; the scores of every layer that was",
        "called get gradients; merged, the outputs stay within 1e-5. What is not made cannot be made here, for the",
        f"reason that transformers gives. {_trained(rows)}\n",
        _line("sweep", *STATES),
        _line(*["---"] * (1 + len(STATES))),
    ]
    for sweep in sweeps:
        states = [row.state for row in rows[sweep.name].values()]
        lines.append(_line(sweep.title, *(str(states.count(state)) for state in STATES)))
    for sweep in sweeps:
        lines.append(f"\n## {sweep.title}")
        for state in STATES:
            some = sorted((row for row in rows[sweep.name].values() if row.state == state), key=lambda row: row.kind)
            if some:
                head = HEADS[state]
                lines += ["", _line(*head), _line(*["---"] * len(head))]
                lines += [_line(*(row.kind, row.words, row.left)[: len(head)]) for row in some]
    page.write_text("\n".join(lines) + "\n")


def _trained(rows: dict[str, dict[str, Row]]) -> str:
    converted = [row for row in rows.get("causal", {}).values() if row.state == "converted"]
    trained = sum(UNTRAINED not in row.left for row in converted)
    return f"{trained} of {len(converted)} causal ones took a step of `mft train`; beside the others stands why not."


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _counts(rows: list[Row]) -> str:
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
