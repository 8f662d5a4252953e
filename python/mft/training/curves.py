"""Training curves as a PNG file."""

from collections.abc import Mapping
from pathlib import Path

from mft.engines.step import StepReport
from mft.files.figure import new_figure, save_figure

Curves = dict[str, list[StepReport]]


def plot_curves(curves: Curves, path: Path) -> None:
    """Training losses of a run without a comparison."""
    figure = new_figure(6.5, 4.2)
    draw_curves(figure.subplots(), curves)
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
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
