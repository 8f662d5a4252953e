"""Tables, verdicts, mask statistics and plots."""

import io
import json

import pytest
import torch
from tiny import evaluation, make_rows, masked_llama

from mft.cli.masks import _mask_table
from mft.config import TrainConfig
from mft.demo import plots
from mft.demo.compare import BASE, CONTROL, FULL, MAGNITUDE, MFT, RANDOM, Comparison, Trial
from mft.demo.report import console_table, remarks, table_rows, verdict, write_report
from mft.engines.step import StepReport
from mft.masks.inspection import MaskStatistics, flip_share, initial_masks, mask_statistics
from mft.training.console import new_console
from mft.training.loop import train_masks

TOKENS = [10, 10, 20]


def comparison(mft, control=(20, 20, 40)):
    arms = {
        BASE: [30, 30, 60],
        FULL: [21, 21, 42],
        CONTROL: control,
        RANDOM: [90, 80, 90],
        MAGNITUDE: [22, 21, 44],
        MFT: mft,
    }
    trials = [Trial(CONTROL, 1e-5, 2.1), Trial(CONTROL, 1e-4, 2.0), Trial(MFT, 1e-3, 2.2)]
    arms = {name: evaluation(TOKENS[: len(sums)], list(sums), [5, 4, 9][: len(sums)]) for name, sums in arms.items()}
    return Comparison(arms, trials, torch.nn.Identity(), 2.15, ["a note"])


def test_mft_helps_only_if_the_difference_excludes_zero():
    assert verdict(comparison([19, 19.1, 38])).startswith("MFT is ahead in this run: ")
    assert verdict(comparison([19, 21.5, 39])).startswith("No evidence that MFT gains anything beyond continued")
    assert verdict(comparison([22, 22.1, 44])).startswith("MFT is behind in this run: ")


def test_the_verdict_carries_its_numbers():
    assert "MFT - control: -0.1000 ± 0.0000 nats a token" in verdict(comparison([19, 19, 38]))


def test_a_single_document_allows_no_verdict():
    one = comparison([19, 19, 38])
    for arm, result in one.arms.items():
        one.arms[arm] = evaluation([10], result.loss_sums[:1].tolist(), [1])
    assert verdict(one).startswith("No evidence either way: a single document")


def test_a_row_holds_paired_differences():
    row = {row["arm"]: row for row in table_rows(comparison([19, 19, 38]))}
    assert row[MFT]["loss - control"] == pytest.approx((-0.1, 0))
    assert row[CONTROL]["loss - control"] is None
    assert row[CONTROL]["lr"] == 1e-4
    assert row[FULL]["lr"] is None


def test_the_report_writes_table_numbers_and_plot(tmp_path):
    curves = {"full fine-tune": [StepReport(s, 4, 3 / s, 1e-3, 8, s) for s in range(1, 5)]}
    write_report(comparison([19, 19, 38]), tmp_path, curves, ["of the data"])
    text = (tmp_path / "table.md").read_text()
    assert "| MFT | 1.9000 | -0.2000±0.0000 | -0.1000±0.0000 | 45.00 | +0.00±0.00 |" in text
    assert "3 configurations tried (2 for control, 1 for MFT)" in text
    assert text.endswith("- a note\n- of the data\n")
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["tokens"] == 40
    assert [row["arm"] for row in numbers["arms"]][-1] == MFT
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_console_table_has_a_row_an_arm():
    assert console_table(comparison([19, 19, 38])).row_count == 6
    assert any("test split was opened once" in line for line in remarks(comparison([19, 19, 38])))


def test_mask_statistics_of_a_worked_example():
    model = masked_llama(layers=[3], keep_ratio=0.75, init="magnitude")
    initial = initial_masks(model)
    rows = mask_statistics(model, initial)
    assert len(rows) == 7
    for row in rows:
        assert row.kept == pytest.approx(0.75)
        assert (row.flips, row.overlap) == (0, 1)


def test_flips_are_counted_against_the_first_mask():
    model = masked_llama(layers=[3])
    initial = initial_masks(model)
    train_masks(model, make_rows(), TrainConfig(lr=1e-2, steps=5))
    for row in mask_statistics(model, initial):
        assert 0 < row.flips < 0.3
        assert row.flips == (model.get_submodule(row.name).mask() != initial[row.name]).float().mean()
        assert row.overlap < 0.6  # random scores know nothing of magnitudes
    assert 0 < flip_share(model, initial) < 0.3
    assert mask_statistics(model)[0].flips is None


def test_no_label_of_the_plot_lies_across_a_line(tmp_path, monkeypatch):
    """Numbers and legends stand outside of the axes in which lines run."""
    figures, make = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    curves = {"full fine-tune": [StepReport(s, 4, 3 / s, 1e-3, 8, s) for s in range(1, 5)]}
    plots.plot_comparison(comparison([19, 19, 38]), curves, tmp_path / "plot.png", standard_errors=2)
    axes = figures[0].axes
    assert [text.get_text() for text in axes[2].texts] == ["-0.1000", "+4.4000", "+0.0750", "-0.2000"]
    labels = [text for panel in axes for text in panel.texts] + [panel.get_legend() for panel in axes[:2]]
    assert not [label for label in labels for panel in axes if panel.bbox.overlaps(label.get_window_extent())]


def test_a_table_of_masks_is_eighty_columns_wide():
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (3, 31) for kind in "qkvo"]
    file = io.StringIO()
    rows = [MaskStatistics(name, 58_720_256, 0.9004, 0.1681, 0.127) for name in names]
    new_console(file, width=80).print(_mask_table(rows))
    assert all(f"{name} " in file.getvalue() for name in names)  # none is broken
    assert "since init" in file.getvalue()
