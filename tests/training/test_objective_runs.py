"""mft train with an objective, from its configuration to its metrics."""

import json
import re

import pytest
from tiny_run import LEARN, events_of, steps

PAIRS = [{"prompt": f"{i} {i + 1}", "chosen": f" {i + 2} {i + 3}", "rejected": f" {i} {i}"} for i in range(1, 40)]


@pytest.fixture
def pairs(tmp_path):
    """Write pairs; return the settings that train on them by DPO."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return ["objective.name=dpo", "data.source=pairs.jsonl", "data.sequence_length=24"]


@pytest.mark.parametrize("memory", ["plain", "layerwise"])
def test_dpo_from_pairs_to_metrics(cli, tmp_path, pairs, memory):
    output = cli.done("train", *LEARN, *pairs, f"memory={memory}", "train.steps=8", "mask.keep_ratio=0.9")
    assert "dpo, before: loss 0.6931, accuracy 0.0000, margin 0.0000" in output
    before, after = (event for event in events_of(tmp_path / "run") if "dpo/loss" in event)
    assert before["dpo/margin"] == 0
    assert after["dpo/margin"] != 0
    assert steps(tmp_path / "run")[0][1] == pytest.approx(0.693, abs=0.3)
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert table["after"]["dpo/accuracy"] == after["dpo/accuracy"]
    output = cli.done("data", "show", "--config", "config.yaml", *pairs)
    assert ": 2 pairs, " in output
    assert "▶ chosen: " in output
    assert "▶ rejected: " in output


def test_the_best_step_is_the_one_of_the_objectives_own_least_loss(cli, tmp_path, pairs, monkeypatch):
    drawn = []
    monkeypatch.setattr("mft.tracking.metrics.plot_curves", lambda *_, **told: drawn.append(told["objective"]))
    asked = [*pairs, "memory=resident", "train.steps=8", "train.eval_every=2", "train.keep_best=true"]
    output = cli.done("train", *LEARN, *asked)
    assert drawn == ["dpo"]
    seen = [event for event in events_of(tmp_path / "run") if event["phase"] == "validation"]
    by_dpo, by_words = (min(seen, key=lambda event: event[key])["step"] for key in ("dpo/loss", "loss"))
    assert by_dpo != by_words  # otherwise the test shows nothing
    assert seen[-1]["best"] == by_dpo
    figures = ", ".join(f"{name} {seen[0][f'dpo/{name}']:.4f}" for name in ("loss", "accuracy", "margin"))
    assert re.search(rf"validation after step 2: {figures} \(\d+ tokens of \d+ documents\); the least so far", output)
    exported = [event for event in events_of(tmp_path / "run") if event["phase"] == "after, validation"][-1]
    assert exported["dpo/loss"] == pytest.approx(min(event["dpo/loss"] for event in seen), abs=1e-6)


def test_pairs_are_mixed_from_several_sources(cli, tmp_path):
    for name, rows in (("a", PAIRS[:20]), ("b", PAIRS[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = [f"data.sources.{name}.source={name}.jsonl" for name in "ab"]
    asked = ["--config", "config.yaml", "objective.name=dpo", "data.source=stdlib", *mix, "data.sequence_length=24"]
    output = cli.done("data", "show", *asked, "--rows", "2")
    assert "train row 0 of" in output
    assert "from a: 2 pairs" in output
    assert "from b: 2 pairs" in output
    output = cli.refused("data", "show", *asked, "data.streaming=true")
    assert "data.streaming must be false with preference pairs" in output


def test_distillation_and_kl_from_the_configuration(cli, tmp_path, model_dir):
    short = [*LEARN, "memory=resident", "data.max_eval_tokens=48", "mask.keep_ratio=0.9"]
    cli.done("train", *short, "objective.name=kl", "objective.beta=0.5")
    after = events_of(tmp_path / "run")[-1]
    assert after["kl/loss"] == pytest.approx(after["loss"] + 0.5 * after["kl/kl"], abs=1e-5)
    distill = ["objective.name=distill", f"objective.teacher={model_dir}", "objective.weight=0"]
    cli.done("train", *short, *distill, "output_dir=distilled")
    before, *_, after = events_of(tmp_path / "distilled")
    assert before["distill/kl"] == pytest.approx(0, abs=1e-5)  # the teacher is the base
    assert after["distill/loss"] == after["distill/kl"] > 0


def test_a_teacher_with_other_words_is_refused(cli, model_dir, smollm2_dir):
    output = cli.refused("train", *LEARN, "objective.name=distill", f"objective.teacher={smollm2_dir}")
    assert "objective.teacher must have the vocabulary of" in output


def test_full_fine_tuning_has_no_base_to_hold_to(cli):
    output = cli.refused("finetune", "objective.name=kl")
    assert "objective.name must be cross_entropy or distill in mft finetune" in output
