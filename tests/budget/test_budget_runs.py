"""mft train under a budget: shown, resumed bit for bit, exported in few bytes, evaluated and merged."""

import json
import math

import pytest
from safetensors.torch import load_file
from tiny_run import LEARN, assert_same_masks, events_of, killed_after

from mft.masks.export_format import read_export

BUDGET = [*LEARN, "mask.budget=0.04", "mask.mode=magnitude", "train.steps=6"]
WEIGHTS = 2 * 9216  # of layers 2 and 3


def dropped(directory):
    """Return the number of dropped weights by layer."""
    export = read_export(directory)
    return {entry.name: math.prod(entry.shape) - entry.kept for entry in export.modules}


def test_what_is_dropped_is_shown_exported_evaluated_and_merged(cli, tmp_path):
    output = cli.done("train", *BUDGET)
    quota = int(0.04 * WEIGHTS)
    assert "4 % dropped" in output
    shares = [event["dropped"] for event in events_of(tmp_path / "run") if "lr" in event]
    assert shares == pytest.approx([0.04 * min(1, step / (0.67 * 6)) for step in range(1, 7)], abs=1e-4)
    by_layer = dropped(tmp_path / "run" / "masks")
    assert sum(by_layer.values()) == quota
    assert len(set(by_layer.values())) > 3
    assert json.loads((tmp_path / "run" / "masks" / "adapter_config.json").read_text())["keep_ratio"] is None
    output = cli.done("inspect", "run")
    assert "flips are unknown" not in output
    cli.done("evaluate", "--masks", "run")
    cli.done("merge", "run", "merged", "--dtype", "float32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert sum(int((merged[f"{name}.weight"] == 0).sum()) for name in by_layer) == quota


def test_the_best_step_has_what_was_dropped_then(cli, tmp_path):
    """The best step is within the ramp; later steps have other thresholds."""
    few = [*BUDGET, "train.lr=1", "train.betas=[0.9,0.999]", "train.eval_every=1", "mask.budget_ramp=1"]
    few.append("train.keep_best=true")
    cli.done("train", *few)
    best = json.loads((tmp_path / "run" / "table.json").read_text())["step"]
    assert best < 6
    assert sum(dropped(tmp_path / "run" / "masks").values()) == int(0.04 * WEIGHTS * best / 6)


def test_a_run_from_before_a_budget_was_a_bound_resumes_with_the_rule_that_it_began_with(cli, tmp_path):
    few = [*BUDGET, "mask.mode=value", "checkpoint_minutes=0"]
    cli.done("train", *few, "mask.fill_budget=true", "output_dir=straight")
    killed_after(cli, 3, "train", *few, "mask.fill_budget=true")
    for path in (tmp_path / "run").rglob("*.y*ml"):
        text = path.read_text().replace("  fill_budget: true\n", "")
        path.write_text(text.replace("  keep_ratio: null\n", "  keep_ratio: 0.99\n"))
    cli.done("train", "--resume", "run")
    assert_same_masks(tmp_path / "run", tmp_path / "straight")
    assert sum(dropped(tmp_path / "run" / "masks").values()) == int(0.04 * WEIGHTS)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("  keep_ratio: null\n", "  keep_ratio: 0.99\n"))
    for verb in (["evaluate", "--masks", "run"], ["inspect", "run"]):
        cli.done(*verb)
