"""A study with rewards: what its arms learn from, how validation chooses, and what its verdicts compare."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import evaluation
from tiny_study import run_quietly

from mft.rewards.config import RewardsConfig
from mft.rewards.questions import count_questions, questions_of
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.bases import Bases
from mft_study.load import load_study, study_values
from mft_study.outcome import Measured, Outcome, Unit
from mft_study.report.reward_curves import rewards_remark
from mft_study.report.write import console_report, write_study_report
from mft_study.store import Store
from mft_study.study_plan import chosen_settings
from mft_study.units.job import Job
from mft_study.units.train import train_unit
from mft_study.workspace import Workspace

pytest.importorskip("trl")

STUDY = """
objective: rewards
rewards: {{questions: 4, num_generations: 8, max_completion_tokens: 3, betas: [0.9, 0.99]}}
model: {{name: {directory}/model, dtype: float32}}
mask: {{layers_to_transform: 2-3, init: magnitude, keep_ratio: 0.9}}
domains:
  next: {{source: {directory}/questions.jsonl, sequence_length: 8, max_train_tokens: 64, max_eval_tokens: 80}}
general: {{count: {{source: {directory}/data.jsonl, sequence_length: 12, max_train_tokens: 12, max_eval_tokens: 48}}}}
full: {{batch_size: 4}}
seeds: [0]
extensions: 0
checkpoints: 2
workers: 1
output_dir: {directory}/run
arms:
  full: {{kind: full, lrs: [1e-2], epochs: [20]}}
  control: {{kind: control, lrs: [3e-3], epochs: [0.5]}}
  LoRA: {{kind: lora, lrs: [1e-2], epochs: [0.5], lora_rank: 2}}
  MFT: {{kind: mask, lrs: [1e-2], epochs: [0.5]}}
  between: {{kind: interpolated, of: control, alphas: [0.5]}}
  taught:
    kind: mask
    teacher: control
    teacher_prompt: "{{question}} {{answer}}, {{question}}"
    lrs: [1e-2]
    epochs: [0.5]
"""


TEXT = ["objective=cross_entropy", "rewards=null", "arms.taught.teacher_prompt=null"]


@pytest.fixture(scope="module")
def done(ground):
    """Return (findings, directory) of a whole study."""
    rows = [{"prompt": f"{i} {i + 1}", "completion": f" {i + 2}"} for i in range(1, 59)]
    (ground / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ground / "study.yaml").write_text(STUDY.format(directory=ground))
    return run_quietly(load_study(ground / "study.yaml"), ground / "run")[0], ground / "run"


@pytest.mark.slow
def test_every_arm_after_the_fine_tune_learns_by_rewards_and_answers_on_validation(done):
    findings, _ = done
    trained = {"control", "LoRA", "MFT", "taught"}
    assert {outcome.unit.arm for outcome in findings.outcomes} == {"full", "between", *trained}
    for outcome in findings.outcomes:
        asked = outcome.measured.questions.sum()
        assert asked == 8
        if outcome.unit.arm in trained:
            assert outcome.steps == len(outcome.rewards) == 2  # half of 16 questions, 4 per step
            assert [share for share, _ in outcome.answers_curve] == [0.5, 1]
            assert max(exact for _, exact in outcome.answers_curve) == outcome.measured.exact
            assert outcome.tokens > 0
            assert sum(outcome.rewards) > 0
            assert outcome.general["count"].evaluation.tokens.sum() > 0
        else:
            assert outcome.rewards == []
    for runs in findings.test["next"].values():
        assert all(run.exact is not None for run in runs.values())


def test_the_report_judges_by_exact_answers_and_draws_rewards(done, tmp_path):
    findings, _ = done
    write_study_report(findings, tmp_path)
    numbers = json.loads((tmp_path / "table.json").read_text())
    curves = numbers["domains"]["next"]["by_rewards"]
    assert [(run["arm"], run["seed"]) for run in curves] == [("control", 0), ("LoRA", 0), ("MFT", 0), ("taught", 0)]
    assert [step for step, _ in curves[0]["answers"]] == [1, 2]
    assert (tmp_path / "rewards.png").stat().st_size > 10_000
    verdict, both = numbers["verdicts"]
    assert "wrong answers a question on next" in both
    assert "% of questions answered exactly, Holm-adjusted p" in verdict
    said = " ".join(numbers["remarks"])
    assert "learned by rewards" in said
    assert "But taught by control learned at each token of its own answers" in said
    assert "rows per step" not in said
    row = next(row for row in numbers["domains"]["next"]["rows"] if row["arm"] == "MFT")
    assert row["minus_control"]["wrong"]["p_holm"] is not None
    assert row["minus_control"]["loss"]["p_holm"] is None
    assert row["minus_control"]["wrong"]["estimate"] == pytest.approx(-row["minus_control"]["answers"]["estimate"])
    assert row["validation"] is not None
    assert console_report(findings)


def test_a_units_key_knows_how_it_learned(done):
    study, directory = done[0].study, done[1]
    unit = Unit("next", "full", 0, Setting(1e-2, 20.0))
    others = [dataclasses.replace(study, rewards=RewardsConfig()), load_study(directory.parent / "study.yaml", TEXT)]
    keys = {Store(one, directory).key(unit, {"next": {}}) for one in (study, *others)}
    assert len(keys) == 3


def test_a_fine_tune_is_the_same_whatever_way_others_learn_by_rewards_after_it(done):
    """Only how its answers are read changes it, because validation chooses by them."""
    study, directory = done[0].study, done[1]
    full, control = Unit("next", "full", 0, Setting(1e-2, 20.0)), Unit("next", "control", 0, Setting(3e-3, 0.5))
    chosen = {"next": {"full": full.setting}}

    def same(unit, **changed):
        other = dataclasses.replace(study, rewards=dataclasses.replace(study.rewards, **changed))
        return Store(study, directory).key(unit, chosen) == Store(other, directory).key(unit, chosen)

    assert same(full, questions=5, schedule="linear")
    assert not same(full, max_completion_tokens=study.rewards.max_completion_tokens + 1)
    assert not same(full, verifier="last_number")
    assert not same(control, questions=5)


def measured(right, loss):
    return Measured(
        evaluation([10, 10], [10 * loss, 10 * loss]), answers=torch.tensor(right), questions=torch.tensor([5, 5])
    )


def test_validation_chooses_by_exact_answers_and_between_equals_by_loss(done):
    study, arm = done[0].study, "MFT"
    tried = {1e-3: measured([3, 1], 9.0), 1e-2: measured([2, 1], 0.1)}
    found = [Outcome(Unit("next", arm, 0, Setting(lr, 0.5, 0.9)), one) for lr, one in tried.items()]
    assert chosen_settings(study, found)["next"][arm].lr == 1e-3
    found[1].measured = measured([1, 3], 8.0)
    assert chosen_settings(study, found)["next"][arm].lr == 1e-2
    assert measured([0, 0], 1e9).choice < 11
    assert Measured(evaluation([10], [20])).choice == 2


def test_an_epoch_asks_every_question_once(done):
    study = done[0].study
    config = study.rewards_of(make_arm(kind="control", lrs=[1e-3]), Setting(1e-3, 2.0, beta1=0.0), 7, 30)
    assert (config.steps, config.lr, config.betas, config.seed) == (15, 1e-3, (0.0, 0.99), 7)
    own = make_arm(kind="control", lrs=[1e-3], betas=[0.5, 0.6])
    assert study.rewards_of(own, Setting(1e-3, 1.0), 0, 1).betas == (0.5, 0.6)
    assert study.rewards_of(own, Setting(1e-3, 1.0), 0, 1).steps == 1


def test_what_is_written_of_a_study_is_read_again(done, tmp_path):
    import yaml

    study = done[0].study
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(study_values(study)))
    assert load_study(tmp_path / "again.yaml") == study
    assert study.answers == ["next"]
    assert not {"lr", "steps", "seed"} & study_values(study)["rewards"].keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=reward"], "objective must be one of cross_entropy, rewards, got 'reward'"),
        (["rewards.num_generations=1"], "rewards.num_generations must be at least 2, got 1"),
        (["rewards.group=8"], "unknown key 'rewards.group'"),
        (["rewards.divergence=kl"], "rewards.divergence must be one of reverse_kl, forward_kl, jsd, got 'kl'"),
        (["arms.MFT.teacher_prompt='{question}'"], "arms.MFT.teacher_prompt must be left out without a teacher, got"),
        (["arms.taught.teacher_prompt=Q"], r"arms.taught.teacher_prompt must hold \{question\}, got Q"),
        (TEXT[:2], "arms.taught.teacher_prompt must be left out unless objective is rewards"),
    ],
)
def test_what_a_study_by_rewards_cannot_be_is_refused(done, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_study(done[1].parent / "study.yaml", overrides)


def asking(done, tmp_path, questions, overrides=()):
    """Return the study with a section of questions."""
    text = (done[1].parent / "study.yaml").read_text()
    (tmp_path / "asking.yaml").write_text(f"{text}questions: {questions}\n")
    return load_study(tmp_path / "asking.yaml", list(overrides))


def test_other_questions_may_be_asked_than_those_of_the_fine_tune(done, tmp_path, monkeypatch):
    """The base and the fine-tune keep their keys; arms that learn from the questions do not."""
    rows = [{"prompt": f"{i} {i + 1}", "completion": f" {i + 2}"} for i in range(20, 46)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = asking(done, tmp_path, f"{{next: {{source: {tmp_path}/others.jsonl, sequence_length: 8}}}}")
    full, control = Unit("next", "full", 0, Setting(1e-2, 20.0)), Unit("next", "control", 0, Setting(3e-3, 0.5))
    chosen = {"next": {"full": full.setting}}
    base, arms = Unit("next", "base", 0, Setting()), {"base": make_arm(kind="base"), **study.arms}
    before, now = (Store(dataclasses.replace(one, arms=arms), done[1]) for one in (done[0].study, study))
    assert before.key(base, chosen) == now.key(base, chosen)
    assert before.key(full, chosen) == now.key(full, chosen)
    assert before.key(control, chosen) != now.key(control, chosen)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    workspace, given = Workspace(study, Bases(study, tmp_path)), []
    workspace.begin("next", (), 0)
    monkeypatch.setattr("mft_study.units.train.train_rewards", lambda *args, **options: given.append(args) or [])
    with pytest.raises(AssertionError):  # the run fails without a checkpoint, because nothing is trained
        train_unit(workspace, Job(control, (), tmp_path / "control.safetensors"))
    ((_, _, dataset, config),) = given
    assert config.steps == math.ceil(count_questions(dataset) / 8)
    asked = questions_of(dataset, workspace.tokenizer, study.rewards)
    assert {question.prompt[0] for question in asked} <= set(range(20, 46))
    assert "On next these are other questions than in the fine-tune." in rewards_remark(
        dataclasses.replace(done[0], study=study)
    )
    assert "other questions" not in rewards_remark(done[0])


@pytest.mark.parametrize(
    ("questions", "overrides", "message"),
    [
        ("{other: {source: problems}}", [], "questions must be one of next, got 'other'"),
        ("{next: {source: problems, streaming: true}}", [], "questions.next.streaming must be false in a study"),
        ("{next: {source: problems, text: 1}}", [], "unknown key 'questions.next.text'"),
        ("{next: {source: problems}}", [*TEXT, "arms.taught.teacher=null"], "questions must be left out unless obj"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(done, tmp_path, questions, overrides, message):
    with pytest.raises(ValueError, match=message):
        asking(done, tmp_path, questions, overrides)


def test_text_without_questions_is_refused_before_anything_is_trained(done, tmp_path):
    study = load_study(done[1].parent / "study.yaml", [f"domains.next.source={done[1].parent}/data.jsonl"])
    with pytest.raises(ValueError, match="domains.next.source must have questions with answers for objective: rewards"):
        run_quietly(study, tmp_path / "run")
    study = asking(done, tmp_path, f"{{next: {{source: {done[1].parent}/data.jsonl, sequence_length: 8}}}}")
    with pytest.raises(ValueError, match="questions.next.source must have questions with answers for objective"):
        run_quietly(study, tmp_path / "asking")
    assert not list(tmp_path.glob("*/units"))
