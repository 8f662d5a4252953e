"""mft estimate with a budget: it counts the pass over all scores after a step, and the size of the export."""

import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from mft.cli.app import app
from mft.config import MaskConfig, RunConfig
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload
from mft.training.memory_plan import workload_of

SHAPE = shape_from_config(known_config("smollm2-135m"), "smollm2-135m")
WEIGHTS = 106_168_320


@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
@pytest.mark.parametrize(("scores", "passes"), [("float32", 2), ("bfloat16", 1)])
def test_scores_travel_once_a_pass_and_once_for_the_masks(way, scores, passes):
    workload = Workload(memory=way, scores=scores, accumulation=1)
    without, with_it = estimate(SHAPE, workload), estimate(SHAPE, replace(workload, budget=0.006))
    travels = 0 if way == "plain" else (passes + 1) * WEIGHTS * (4 if scores == "float32" else 2) / 20e9
    assert with_it.seconds - without.seconds == pytest.approx(max(travels, WEIGHTS / 13e9))
    assert with_it.device_peak == without.device_peak  # nothing else is at work during the pass
    assert with_it.host_peak == without.host_peak
    largest = 576 * 1536
    held = {"layerwise": 0, "resident": WEIGHTS / 8 + WEIGHTS * 2 + SHAPE.parameters * 2}
    if way in held:
        staging = largest * (4 if scores == "float32" else 2) + largest / 8
        assert with_it.phases["selection"] == held[way] + staging + (80 << 20)


def test_a_run_s_budget_is_counted_when_its_way_is_chosen():
    config = RunConfig(mask=MaskConfig(budget=0.006))
    assert workload_of(config, type("Device", (), {"type": "cpu"})).budget == 0.006


def test_the_verb_tells_how_large_a_file_it_makes():
    asked = ["estimate", "--model", "smollm2-135m", "--cpu", "16GB"]
    result = CliRunner().invoke(app, [*asked, "--budget", "0.006"])
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    bits = -(0.006 * math.log2(0.006) + 0.994 * math.log2(0.994))
    assert bits * WEIGHTS / 8e6 == pytest.approx(0.70, abs=0.005)
    assert (
        "a budget of 0.006 drops at most 637,009 of 106,168,320 masked weights: a file of up to about 0.7 MB (0.053"
        in said
    )
    assert "budget" not in CliRunner().invoke(app, [*asked, "--keep-ratio", "0.9"]).output
    for wrong, message in (
        (["--keep-ratio", "1.5"], "keep_ratio must lie in [0, 1], got 1.5"),
        (["--budget", "0.1", "--keep-ratio", "0.9"], "--budget or --keep-ratio must be given, got both, 0.1 and 0.9"),
    ):
        result = CliRunner().invoke(app, [*asked, *wrong])
        assert result.exit_code == 2
        assert message in " ".join((result.output + result.stderr).split())
