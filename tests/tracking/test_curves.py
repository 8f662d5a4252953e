"""A metrics file suffices to draw the plot of its run again."""

import torch

from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation
from mft.tracking.metrics import METRICS, Recorder, read_recorder


def test_a_metrics_file_tells_what_its_run_drew(tmp_path):
    recorder, result = Recorder(tmp_path), torch.tensor([3.0, 5.0], dtype=torch.float64)
    recorder.write_evaluation("before, validation", Evaluation(torch.tensor([1, 2]), result, 2 * result, result / 2), 0)
    for step in (1, 2, 3):
        report = StepReport(step, 3, 3 - step / 3, 1e-3, 64, float(step))
        recorder.curves.setdefault("mask fine-tune", []).append(report)
        recorder.write(
            phase="mask fine-tune", **{name: value for name, value in vars(report).items() if value is not None}
        )
    recorder.write(phase="flips", step=3, from_start=0.5, a_step=0.1)
    recorder.write_evaluation("after, validation", Evaluation(torch.tensor([1, 2]), result, result, result / 2), 3)
    again = read_recorder(tmp_path / METRICS)
    assert (again.curves, again.validation, again.documents) == (recorder.curves, {0: 2.0, 3: 1.0}, 2)
    recorder.draw(tmp_path / "plot.png")
    again.draw(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "plot.png").read_bytes()
