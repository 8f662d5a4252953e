"""What a comparison found, for a reader: a table, and a verdict that claims no more than the errors allow."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mft.demo.compare import CONTROL, FULL, MFT, Comparison
from mft.demo.plots import plot_comparison
from mft.evaluation.evaluate import METRICS, paired_difference
from mft.evaluation.table import _accuracy_pair, _counts, _loss_pair
from mft.files.atomic import write_whole
from mft.training.curves import Curves
from mft.training.run_directory import PLOT, TABLE_JSON, TABLE_MARKDOWN

STANDARD_ERRORS = 2  # a difference within so many of 0 is no evidence
_COLUMNS = ("loss", f"loss - {FULL}", f"loss - {CONTROL}", "acc %", f"acc % - {CONTROL}")


def verdict(comparison: Comparison) -> str:
    """One sentence on MFT against the control."""
    loss, error = paired_difference(comparison.arms[MFT], comparison.arms[CONTROL])
    measured = f"MFT - control: {loss:+.4f} ± {error:.4f} nats a token"
    if math.isnan(error):
        return f"No evidence either way: a single document has no standard error. {measured}."
    if loss < -STANDARD_ERRORS * error:
        return (
            f"MFT is ahead in this run: its held-out loss is lower than that of the same layers trained on. {measured}."
        )
    if loss > STANDARD_ERRORS * error:
        return f"MFT is behind in this run: the same layers trained on have the lower held-out loss. {measured}."
    return f"No evidence that MFT gains anything beyond continued training. {measured}."


def remarks(comparison: Comparison) -> list[str]:
    """What a reader of the verdict must know."""
    counts = ", ".join(f"{sum(t.arm == arm for t in comparison.trials)} for {arm}" for arm in (CONTROL, MFT))
    chosen = " and ".join(f"{comparison.chosen_lr(arm):g} for {arm}" for arm in (CONTROL, MFT))
    return [
        f"{CONTROL}: the weights of the same layers, trained on for as many steps.",
        f"{len(comparison.trials)} configurations tried ({counts}), rate {chosen} chosen on the validation split; the "
        "test split was opened once.",
        "One run: the standard error is that of the test documents; another seed of the training moves results too. "
        "mft compare tunes the control further, in several seeds, before it says that MFT helps.",
        *comparison.notes,
    ]


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A dictionary an arm: numbers, with pairs (difference, standard error) against two references."""
    rows = []
    for name, result in comparison.arms.items():
        row: dict[str, Any] = {"arm": name, "lr": comparison.chosen_lr(name), "loss": result.loss}
        row["accuracy"] = result.accuracy
        for reference in (FULL, CONTROL):
            for metric in METRICS:
                pair = paired_difference(result, comparison.arms[reference], metric)
                row[f"{metric} - {reference}"] = None if name == reference else pair
        rows.append(row)
    return rows


def console_table(comparison: Comparison) -> Table:
    """The table for a terminal, 80 columns wide."""
    table = Table(title=_title(comparison), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("arm", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column.replace("- ", "-\n", 1), justify="right", no_wrap=True)
    for row in table_rows(comparison):
        table.add_row(row["arm"], *_cells(row), style="bold" if row["arm"] == MFT else None)
    return table


def write_report(comparison: Comparison, directory: Path, curves: Curves, notes: Sequence[str] = ()) -> None:
    """table.md, table.json and plot.png in directory."""
    lines = [f"| arm | {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join((row['arm'], *_cells(row)))} |" for row in table_rows(comparison)]
    text = [_title(comparison), "", *lines, "", f"**{verdict(comparison)}**", ""]
    text += [f"- {note}" for note in (*remarks(comparison), *notes)]
    write_whole(directory / TABLE_MARKDOWN, "\n".join(text) + "\n")
    numbers = {
        "arms": table_rows(comparison),
        "verdict": verdict(comparison),
        "notes": [*remarks(comparison), *notes],
        "trials": [vars(trial) for trial in comparison.trials],
        "validation loss of the full fine-tune": comparison.start_loss,
        "documents": len(comparison.arms[MFT].documents),
        "tokens": int(comparison.arms[MFT].tokens.sum()),
    }
    write_whole(directory / TABLE_JSON, json.dumps(numbers, indent=2) + "\n")
    plot_comparison(comparison, curves, directory / PLOT, standard_errors=STANDARD_ERRORS)


def _title(comparison: Comparison) -> str:
    return f"Test split: {_counts(comparison.arms[MFT])}"


def _cells(row: dict[str, Any]) -> list[str]:
    pairs = [row[f"loss - {FULL}"], row[f"loss - {CONTROL}"], row[f"accuracy - {CONTROL}"]]
    full, control, accuracy = (
        "-" if pair is None else show(pair) for pair, show in zip(pairs, (_loss_pair, _loss_pair, _accuracy_pair))
    )
    return [f"{row['loss']:.4f}", full, control, f"{100 * row['accuracy']:.2f}", accuracy]
