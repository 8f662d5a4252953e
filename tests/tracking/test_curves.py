"""The plot of a run: what its text says, and that a metrics file suffices to draw it again."""

import pytest
import torch

from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation
from mft.tracking import curves
from mft.tracking.curves import FEWEST_TO_AVERAGE, plot_curves
from mft.tracking.metrics import METRICS, Recorder, read_recorder


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that were to be saved."""
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def steps(count):
    return [StepReport(step, count, 3 - step / count, 1e-3, 64, float(step)) for step in range(1, count + 1)]


def words(axes):
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    return legend, [text.get_text() for text in axes.texts], axes.get_ylabel(), axes.get_title()


def test_the_held_out_loss_is_written_beside_its_points_with_the_number_of_documents(drawn, tmp_path):
    plot_curves({"mask fine-tune": steps(4)}, tmp_path / "plot.png", {0: 2.5, 4: 2.375}, documents=7)
    (axes,) = drawn[0].axes
    legend, beside, loss, title = words(axes)
    assert legend == ["training text, each step", "held-out text, 7 documents"]
    assert beside == ["2.500 before", "2.375 at the end (-0.125)"]
    assert (loss, title) == ("loss, nats per token (lower is better)", "Loss during training")


@pytest.mark.parametrize(("count", "averaged"), [(FEWEST_TO_AVERAGE - 1, False), (FEWEST_TO_AVERAGE, True)])
def test_steps_are_averaged_where_there_are_enough_and_sizes_have_a_panel(drawn, tmp_path, count, averaged):
    sizes = {"model": 269_030_016, "mask": 737_704}
    options = {"objective": "dpo", "note": "stopped early", "sizes": sizes}
    plot_curves({"mask fine-tune": steps(count)}, tmp_path / "plot.png", {0: 2.5}, **options)
    left, right = drawn[0].axes
    legend, beside, loss, title = words(left)
    assert ("training text, running mean" in legend) == averaged
    assert beside == ["2.500 before"]
    assert (loss, title) == ("loss of dpo (lower is better)", "Loss during training\nstopped early")
    assert [text.get_text() for text in right.texts] == ["269 MB", "0.738 MB"]


def test_a_metrics_file_tells_what_its_run_drew(drawn, tmp_path):
    recorder, result = Recorder(tmp_path), torch.tensor([3.0, 5.0], dtype=torch.float64)
    recorder.evaluated("before, validation", Evaluation(torch.tensor([1, 2]), result, 2 * result, result / 2), 0)
    for report in steps(3):
        recorder.curves.setdefault("mask fine-tune", []).append(report)
        recorder.write(
            phase="mask fine-tune", **{name: value for name, value in vars(report).items() if value is not None}
        )
    recorder.write(phase="flips", step=3, from_start=0.5, a_step=0.1)
    recorder.evaluated("after, validation", Evaluation(torch.tensor([1, 2]), result, result, result / 2), 3)
    again = read_recorder(tmp_path / METRICS)
    assert (again.curves, again.validation, again.documents) == (recorder.curves, {0: 2.0, 3: 1.0}, 2)
    for each in (recorder, again):
        each.draw(tmp_path / "plot.png")
    assert words(drawn[0].axes[0]) == words(drawn[1].axes[0])
