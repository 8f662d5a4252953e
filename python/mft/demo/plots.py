"""Plots as PNG files: training curves, how rates were chosen, held-out differences."""

from pathlib import Path

from mft.demo.compare import BASE, CONTROL, FULL, MFT, Comparison
from mft.engines.step import StepReport
from mft.evaluation.evaluate import paired_difference
from mft.files.atomic import atomic_file

Curves = dict[str, list[StepReport]]
_COLOURS = {FULL: "C0", CONTROL: "C1", MFT: "C3"}


def plot_curves(curves: Curves, path: Path) -> None:
    """Training losses of a run without a comparison."""
    figure = _figure(6.5, 4.2)
    _draw_curves(figure.subplots(), curves)
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)


def plot_comparison(comparison: Comparison, curves: Curves, path: Path, *, standard_errors: float) -> None:
    """Training losses, validation loss by rate, and test differences from the full fine-tune."""
    figure = _figure(14, 4.2)
    left, middle, right = figure.subplots(1, 3)
    losing = {f"{t.arm}, lr {t.lr:g}" for t in comparison.trials if t.lr != comparison.chosen_lr(t.arm)}
    _draw_curves(left, {name: curve for name, curve in curves.items() if name not in losing})
    left.set_title("Training, on the same rows in the same order")
    _draw_trials(middle, comparison)
    _draw_differences(right, comparison, standard_errors)
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_curves(axes, curves: Curves) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        losses = [report.loss for report in curve]
        steps = [report.step for report in curve]
        colour = _COLOURS.get(name.partition(",")[0], f"C{number}")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color=colour, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title("Training (faint: each step; strong: running mean)")
    _legend_below(axes)


def _draw_trials(axes, comparison: Comparison) -> None:
    """What the choice of rates saw."""
    for arm in (CONTROL, MFT):
        trials = sorted((t for t in comparison.trials if t.arm == arm), key=lambda t: t.lr)
        axes.plot([t.lr for t in trials], [t.validation_loss for t in trials], "o-", color=_COLOURS[arm], label=arm)
        best = min(trials, key=lambda t: t.validation_loss)
        axes.plot(best.lr, best.validation_loss, "o", color=_COLOURS[arm], markersize=11, fillstyle="none")
    axes.axhline(comparison.start_loss, color=_COLOURS[FULL], linestyle="--", label=FULL)
    axes.set_xscale("log")
    axes.set_xlabel("rate")
    axes.set_ylabel("loss, nats a token")
    axes.set_title("Validation: rates, the chosen one circled")
    _legend_below(axes)


def _draw_differences(axes, comparison: Comparison, standard_errors: float) -> None:
    arms = [arm for arm in comparison.arms if arm not in (FULL, BASE)]
    for place, arm in enumerate(arms):
        difference, error = paired_difference(comparison.arms[arm], comparison.arms[FULL])
        axes.errorbar(
            difference, place, xerr=standard_errors * error, fmt="o", capsize=4, color=_COLOURS.get(arm, "0.4")
        )
        # Beside the axes, where no line and no interval runs.
        axes.annotate(f"{difference:+.4f}", (1.03, place), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(0, color=_COLOURS[FULL], linestyle="--")
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel("loss - full fine-tune's (left is better)")
    axes.set_title(f"Test: difference and {standard_errors:g} standard errors")


def _legend_below(axes) -> None:
    """Inside it would cover the lines that it explains."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize="small")


def _running_mean(values: list[float]) -> list[float]:
    """Mean of the last tenth of the steps so far, at least 5."""
    window = max(5, len(values) // 10)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
