"""Draw what a run has learned as a PNG file: the loss on the training text at each step, and on held-out text.

+---------------------------------+ +----------------+
| .  .      dots: a step each     | | model  ####### |
| 2.47 before  .  .               | | mask   #       |
|    o---------__   .   .         | |                |
|                ----o 2.36       | | (with sizes)   |
+---------------------------------+ +----------------+
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.engines.step import StepReport
from mft.files.figure import COLOURS, new_figure, save_figure, shade

PLOT = "plot.png"  # in the directory of a run
# With fewer steps, the running mean shows the order of the texts and no trend.
FEWEST_TO_AVERAGE = 50
Curves = dict[str, list[StepReport]]


def plot_curves(
    curves: Curves,
    path: Path,
    validation: Mapping[int, float] | None = None,
    *,
    objective: str = "cross_entropy",
    best: int | None = None,
    note: str | None = None,
    documents: int | None = None,
    title: str = "Loss during training",
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Draw the curves of a run to path.

    validation: held-out loss by step. best: the step that is exported, if not the last. note: a second line of the
    title. documents: the number of held-out ones. sizes: {label: bytes} for a second panel.
    """
    figure = new_figure(7 if sizes is None else 10, 4.4)
    axes, *others = figure.subplots(1, 2, width_ratios=(3, 1)) if sizes else [figure.subplots()]
    for number, (name, curve) in enumerate(curves.items()):
        label = "training text" if len(curves) == 1 else f"training text, {name}"
        _draw_steps(axes, curve, shade(COLOURS["mask"], number), label)
    if validation:
        _draw_held_out(axes, validation, best, documents)
    axes.margins(y=0.12)  # for the words above and below the lines
    axes.set_xlabel("optimiser step")
    loss = "loss, nats per token" if objective == "cross_entropy" else f"loss of {objective}"
    axes.set_ylabel(f"{loss} (lower is better)")
    axes.set_title(title if note is None else f"{title}\n{note}")
    # Inside the axes, the legend would cover the lines.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small")
    for other in others:
        _draw_sizes(other, sizes or {})
    save_figure(figure, path)


def _draw_steps(axes: Any, curve: list[StepReport], colour: str, label: str) -> None:
    steps, losses = [report.step for report in curve], [report.loss for report in curve]
    axes.plot(steps, losses, "o", color=colour, alpha=0.4, markersize=4, markeredgewidth=0, label=f"{label}, each step")
    if len(steps) >= FEWEST_TO_AVERAGE:
        axes.plot(steps, _running_mean(losses), color=colour, alpha=0.8, label=f"{label}, running mean")


def _draw_held_out(axes: Any, validation: Mapping[int, float], best: int | None, documents: int | None) -> None:
    steps = sorted(validation)
    of = "" if documents is None else f", {documents} documents"
    losses = [validation[step] for step in steps]
    axes.plot(steps, losses, "ko-", markersize=5, linewidth=1.5, label=f"held-out text{of}")
    if best is not None:
        axes.plot([best], [validation[best]], "k*", markersize=13, label=f"exported: step {best}")
    first, last = steps[0], steps[-1]
    change = validation[last] - validation[first]
    _write_beside(
        axes, first, validation[first], f"{validation[first]:.3f}{' before' if first == 0 else ''}", right=True
    )
    if len(steps) > 1:
        _write_beside(axes, last, validation[last], f"{validation[last]:.3f} at the end ({change:+.3f})", right=False)


def _write_beside(axes: Any, step: int, loss: float, words: str, *, right: bool) -> None:
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    offset, side = ((6, 9), "left") if right else ((-6, -16), "right")
    axes.annotate(words, (step, loss), xytext=offset, textcoords="offset points", ha=side, bbox=box)


def _draw_sizes(axes: Any, sizes: Mapping[str, int]) -> None:
    """Draw bars with their numbers above them, since a mask's bar is too low to be seen."""
    megabytes = [nbytes / 1e6 for nbytes in sizes.values()]
    bars = axes.bar(list(sizes), megabytes, color=[COLOURS["base"], *(COLOURS["mask"] for _ in megabytes[1:])])
    axes.bar_label(bars, [f"{size:.3g} MB" for size in megabytes], padding=3)
    axes.set_ylabel("MB")
    axes.set_title("Size on disk")
    axes.margins(y=0.12)


def _running_mean(values: list[float]) -> list[float]:
    """Return, for each step, the mean of the steps up to it. The window is a tenth of all steps, and at least 5."""
    window = max(5, len(values) // 10)
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1) for i in range(len(values))]
