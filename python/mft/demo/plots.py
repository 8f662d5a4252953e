"""Plots as PNG files: training curves, how rates were chosen, held-out differences."""

from pathlib import Path

from mft.demo.compare import BASE, CONTROL, FULL, MFT, Comparison
from mft.evaluation.evaluate import paired_difference
from mft.files.figure import new_figure, save_figure
from mft.training.curves import Curves, draw_curves, legend_below

_COLOURS = {FULL: "C0", CONTROL: "C1", MFT: "C3"}


def plot_comparison(comparison: Comparison, curves: Curves, path: Path, *, standard_errors: float) -> None:
    """Training losses, validation loss by rate, and test differences from the full fine-tune."""
    figure = new_figure(14, 4.2)
    left, middle, right = figure.subplots(1, 3)
    losing = {f"{t.arm}, lr {t.lr:g}" for t in comparison.trials if t.lr != comparison.chosen_lr(t.arm)}
    draw_curves(left, {name: curve for name, curve in curves.items() if name not in losing}, _COLOURS)
    left.set_title("Training, on the same rows in the same order")
    _draw_trials(middle, comparison)
    _draw_differences(right, comparison, standard_errors)
    save_figure(figure, path)


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
    legend_below(axes)


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
