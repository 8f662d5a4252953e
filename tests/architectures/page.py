"""Make the site's page of architectures from the stored rows: PYTHONPATH=tests python -m architectures.page"""

import sys
from collections.abc import Iterable

from .rows import STATES, UNTRAINED, Row, Rows, read
from .sweeps import SWEEPS, Sweep

HEADS = {
    "converted": ("architecture", "masked by default", "left out, or why not by default"),
    "wrong": ("wrong", "how"),
    "refused": ("refused", "why"),
    "not made": ("not made", "why"),
}


def page(rows: Rows, sweeps: Iterable[Sweep] = SWEEPS) -> str:
    """Return the page: one section per sweep, with its converted models first."""
    found = {sweep.title: list(rows.get(sweep.name, {}).values()) for sweep in sweeps}
    every = [row for some in found.values() for row in some]
    versions = " and ".join(sorted({row.transformers for row in every}))
    lines = [
        "# Architectures that were converted\n",
        f"By `make architectures` with transformers {versions}, in small sizes, with random weights:",
        f"**{_counts(every)}.**",
        "Converted means: with everything kept the outputs are the model's own, bit for bit (by PyTorch's product in",
        "the kernels' place), of a mixture of experts within 1e-5 of their largest; the scores of every layer that was",
        "called get gradients; merged, the outputs stay within 1e-5. What is not made cannot be made here, for the",
        f"reason that transformers gives. {_trained(rows)}\n",
        _line("sweep", *STATES),
        _line(*["---"] * (1 + len(STATES))),
    ]
    for title, some in found.items():
        states = [row.state for row in some]
        lines.append(_line(title, *(str(states.count(state)) for state in STATES)))
    for title, some in found.items():
        lines.append(f"\n## {title}")
        for state in STATES:
            alike = sorted((row for row in some if row.state == state), key=lambda row: row.kind)
            if alike:
                head = HEADS[state]
                lines += ["", _line(*head), _line(*["---"] * len(head))]
                lines += [_line(*(row.kind, row.words, row.left)[: len(head)]) for row in alike]
    return "\n".join(lines) + "\n"


def _trained(rows: Rows) -> str:
    converted = [row for row in rows.get("causal", {}).values() if row.state == "converted"]
    trained = sum(UNTRAINED not in row.left for row in converted)
    return f"{trained} of {len(converted)} causal ones took a step of `mft train`; beside the others stands why not."


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _counts(rows: list[Row]) -> str:
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


if __name__ == "__main__":
    sys.stdout.write(page(read()))
