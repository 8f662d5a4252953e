"""mft train on masks that begin from data and learn by the surrogate gradient: what is shown, kept, and resumed."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import LEARN, assert_same_masks, events_of, killed_after

from mft.importance.initial_scores import init_from_data
from mft.masks.export_format import read_whole_export

FREE = ["mask.mode=value", "mask.threshold=0", "mask.init=wanda", "mask.calibration_rows=5"]
ASKED = [*LEARN, *FREE, "mask.sharpness=[20,200]", "mask.deletion_penalty=0.1", "train.steps=6"]


def never(*_, **__):
    raise AssertionError("a run that goes on looks at no data to begin")


BY_RATIO = ["mask.threshold=null", "mask.keep_ratio=0.8", "mask.sharpness=null", "mask.deletion_penalty=0"]


BUDGET = [*LEARN, "mask.budget=0.04", "mask.mode=magnitude", "train.steps=6", "mask.budget_ramp=0.9"]
KILLED = {
    "layerwise": [*ASKED, "memory=layerwise"],
    "ratio": [*ASKED, *BY_RATIO],
    "budget": BUDGET,
    "budget, layerwise": [*BUDGET, "memory=layerwise"],
}


@pytest.mark.parametrize("how", KILLED)
def test_a_killed_run_goes_on_bit_for_bit_without_a_look_at_the_data(cli, tmp_path, monkeypatch, how):
    """Flips too: they count from the first masks, which with a ratio come from the data; `mft inspect` lacks these.

    Under a budget the run goes on from a step within the ramp.
    """
    few = [*KILLED[how], "checkpoint_minutes=0"]
    cli.done("train", *few, "output_dir=straight")
    killed_after(cli, 3, "train", *few)
    monkeypatch.setattr("mft.training.training_run.init_from_data", never)
    output = cli.done("train", "--resume", "run")
    assert events_of(tmp_path / "run", timed=False) == events_of(tmp_path / "straight", timed=False)
    assert_same_masks(tmp_path / "run", tmp_path / "straight")
    assert "budget" in how or output.split("% of the mask's bits flipped")[0].split()[-1] != "0.00"
    unknown = "flips are unknown: mask.init=wanda initialised the scores from data, with mask.keep_ratio=0.8"
    assert (unknown in cli("inspect", "run")[1]) == (how == "ratio")


def test_the_share_dropped_is_shown_and_recorded_and_flips_are_known(cli, tmp_path, monkeypatch):
    begun = []

    def begin(placed, mask, rows, **options):
        begun.append((mask.calibration_rows, placed.mode.name))
        return init_from_data(placed, mask, rows, **options)

    monkeypatch.setattr("mft.training.training_run.init_from_data", begin)
    output = cli.done("train", *ASKED, "train.log_every=3", "mask.deletion_penalty=0", "coding=packed")
    assert "scores begin by mask.init=wanda on 5 rows of the training data" in output
    assert begun == [(5, "plain")]
    steps = {event["step"]: event["dropped"] for event in events_of(tmp_path / "run") if "lr" in event}
    assert steps.keys() == {3, 6}
    masks = read_whole_export(tmp_path / "run" / "masks")[1].values()
    words = torch.cat([mask.flatten() for mask in masks]).tolist()  # all full words: rows have 32 or 64 weights
    share = 1 - sum((word & 0xFFFFFFFF).bit_count() for word in words) / (32 * len(words))
    assert steps[6] == pytest.approx(share)
    assert 0 < share < 0.5
    assert f"{100 * share:.3g} % dropped" in output
    output = cli.done("inspect", "run", "--all")
    rows = [line.split() for line in output.splitlines() if "mlp.gate_proj" in line]
    assert [float(row[2]) + float(row[4]) for row in rows] == [100, 100]  # every weight kept at first has flipped


def test_the_shipped_configuration_masks_gate_projections_alone(cli, tmp_path, model_dir):
    tiny = [f"model.name={model_dir}", "model.dtype=float32", "data.source=data.jsonl", "data.sequence_length=12"]
    cli.done("train", "--config", "deletion", *tiny, "train.steps=3", "output_dir=run")
    masks = load_file(tmp_path / "run" / "masks" / "adapter_model.safetensors")
    assert sorted(masks) == [f"model.layers.{i}.mlp.gate_proj.mask" for i in range(4)]
