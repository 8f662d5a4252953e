"""mft estimate --config: each arm of a study with rewards, as rewards_memory counts it, and exit codes."""

import functools
import json

import pytest
from tiny_run import refused, succeed

from mft.memory.rewards_memory import rewards_memory, rewards_peak
from mft.memory.shapes import known_config, shape_from_config

done, fails = functools.partial(succeed, "estimate"), functools.partial(refused, "estimate")
QWEN = ("--config", "rewards-qwen2.5-0.5b", "--model", "qwen2.5-0.5b")
STEP = {"answers": 64, "prompt": 1024, "completion": 400, "micro_batch": 4, "target_modules": ["gate_proj"]}


def test_each_arm_holds_what_is_counted_of_what_it_learns():
    output = done(*QWEN, "--gpu", "24GB", "--json")
    found = json.loads(output)
    shape = shape_from_config(known_config("qwen2.5-0.5b"))
    learns = {"continued": "everything", "control": "weights", "LoRA": "adapters", "MFT": "scores"}
    assert found["arms"].keys() == learns.keys()
    for arm, what in learns.items():
        peak = rewards_peak(rewards_memory(shape, learns=what, rank=1, **STEP))
        assert found["arms"][arm]["peak_gb"] == pytest.approx(peak / 1e9)
        assert found["arms"][arm]["fits"]


def test_a_study_of_which_one_arm_does_not_fit_is_exit_code_2():
    output = fails(*QWEN, "--gpu", "12GB")
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert {arm: rows[arm][-1] for arm in ("continued", "control", "LoRA", "MFT")} == {
        **{"continued": "no", "control": "yes"},
        **{"LoRA": "yes", "MFT": "yes"},
    }
    assert "a step of 64 answers, at most 1024 tokens before each and 400 in it" in " ".join(output.split())
    done(*QWEN, "--gpu", "12GB", "arms.continued.kind=control")


def test_a_teacher_is_one_model_more_and_a_fine_tune_another():
    one = ["--config", "rewards", "--cpu", "1GB", "--json"]
    arms, taught = (json.loads(done(*one, *more))["arms"] for more in ((), ("arms.MFT.teacher=continued",)))
    weights = 4e-9 * 1_065_856  # the small Llama's
    assert taught["MFT"]["peak_gb"] - arms["MFT"]["peak_gb"] == pytest.approx(weights, rel=0.01)
    assert arms["MFT"]["gb"]["update"]["others"] == pytest.approx(weights, rel=0.01)
    assert "others" not in json.loads(done(*QWEN, "--json", "--cpu", "24GB"))["arms"]["MFT"]["gb"]["update"]
