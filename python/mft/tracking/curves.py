"""Training curves as a PNG file."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from mft.engines.step import StepReport
from mft.files.figure import new_figure, save_figure

PLOT = "plot.png"  # in the directory of a run
Curves = dict[str, list[StepReport]]


def plot_curves(
    curves: Curves,
    path: Path,
    validation: Mapping[int, float] | None = None,
    *,
    objective: str = "cross_entropy",
    best: int | None = None,
    note: str | None = None,
) -> None:
    """Training losses of a run without a comparison.

    Args: validation: loss by step, of the objective of that name as those of training are. best: the step that is
        exported, if not the last. note: for the title.
    """
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    draw_curves(axes, curves)
    if validation:
        steps = sorted(validation)
        axes.plot(steps, [validation[step] for step in steps], "ko-", markersize=4, linewidth=1, label="validation")
        if best is not None:
            axes.plot([best], [validation[best]], "k*", markersize=13, label=f"exported: step {best}")
        legend_below(axes)
    if objective != "cross_entropy":
        axes.set_ylabel(f"loss of {objective}")
    if note is not None:
        axes.set_title(f"{axes.get_title()}\n{note}")
    save_figure(figure, path)


def draw_curves(axes, curves: Curves, colours: Mapping[str, str] | None = None) -> None:
    """colours: by a curve's name up to its first comma."""
    for number, (name, curve) in enumerate(curves.items()):
        losses = [report.loss for report in curve]
        steps = [report.step for report in curve]
        colour = (colours or {}).get(name.partition(",")[0], f"C{number}")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color=colour, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title("Training (faint: each step; strong: running mean)")
    legend_below(axes)


def legend_below(axes) -> None:
    """Inside it would cover the lines that it explains."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize="small")


def _running_mean(values: list[float]) -> list[float]:
    """Mean of the last tenth of the steps so far, at least 5."""
    window = max(5, len(values) // 10)
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1) for i in range(len(values))]
