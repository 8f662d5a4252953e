"""lm-eval scores the live, masked model; missing tasks are reported before a model runs."""

import copy
import dataclasses
import json
import logging
import os
import sys

import pytest
import torch
from sums import expected_scores, write_tasks
from tiny import make_phi3
from tiny_run import refused, succeed

from mft.config import MaskConfig
from mft.evaluation.lm_eval_tasks import load_tasks, score_tasks
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import save_masks
from mft.models.pretrained import save_model

MASK = MaskConfig.paper(keep_ratio=0.5, seed=1)


@pytest.fixture
def tasks_dir(tmp_path):
    return write_tasks(tmp_path)


@pytest.mark.slow
def test_the_masked_model_is_what_is_scored(tiny_llama, tokenizer, tasks_dir):
    tasks = load_tasks(["sums_choice", "sums_likelihood"], tasks_dir=tasks_dir, run_task_code=True)
    found = []
    for masked in (False, True):
        if masked:
            mask_model(tiny_llama, MASK)
        scores = score_tasks(tiny_llama, tokenizer, tasks)
        expected = expected_scores(tiny_llama, tokenizer)
        assert {s.task: s.metric for s in scores} == {"sums_choice": "acc", "sums_likelihood": "perplexity"}
        for score in scores:
            assert score.value == pytest.approx(expected[score.task], rel=1e-3), score
            assert score.samples == 15
        assert scores[0].stderr > 0
        found.append({score.task: score.value for score in scores})
    assert found[0]["sums_likelihood"] != pytest.approx(found[1]["sums_likelihood"], rel=1e-2)


def test_scoring_leaves_mode_masks_and_logger_as_found(tiny_llama, tokenizer, tasks_dir, caplog):
    model = mask_model(tiny_llama, MASK).train()
    caplog.set_level(17, logger="lm_eval")
    scores = {name: module.scores.detach().clone() for name, module in masked_modules(model).items()}
    score_tasks(model, tokenizer, load_tasks(["sums_choice"], tasks_dir=tasks_dir, run_task_code=True), limit=2)
    assert model.training
    assert logging.getLogger("lm_eval").level == 17
    assert all(torch.equal(module.scores, scores[name]) for name, module in masked_modules(model).items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_limit_takes_only_so_many_documents(tiny_llama, tokenizer, tasks_dir):
    tasks = load_tasks(["sums_choice"], tasks_dir=tasks_dir, run_task_code=True)
    assert [score.samples for score in score_tasks(tiny_llama, tokenizer, tasks, limit=4)] == [4]
    with pytest.raises(ValueError, match="--limit must be at least 1, got 0"):
        score_tasks(tiny_llama, tokenizer, tasks, limit=0)


def test_sixteen_bit_logits_are_compared_in_fp32(tiny_llama, tokenizer, tasks_dir):
    model = tiny_llama.bfloat16()
    tasks = load_tasks(["sums_likelihood"], tasks_dir=tasks_dir, run_task_code=True)
    (score,) = score_tasks(model, tokenizer, tasks, batch_size=1)
    assert score.value == pytest.approx(expected_scores(model, tokenizer)["sums_likelihood"], rel=1e-5)


def test_long_rows_of_a_longrope_model_are_scored_one_at_a_time(tokenizer, tasks_dir):
    model = make_phi3(switch=5, vocab_size=len(tokenizer), eos_token_id=None)
    tasks = load_tasks(["sums_likelihood"], tasks_dir=tasks_dir, run_task_code=True)
    (score,) = score_tasks(model, tokenizer, tasks)
    assert score.value == pytest.approx(expected_scores(model, tokenizer)["sums_likelihood"], rel=1e-3)
    with pytest.raises(ValueError, match="batch_size must be 1 for rows of more than 5 tokens, .* got 4 rows of"):
        score_tasks(model, tokenizer, tasks, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[1], [0, 1]], ids=["one", "two"])
def test_evaluate_prints_and_writes_the_scores_without_and_with_masks(
    tiny_llama, tokenizer, tasks_dir, tmp_path, seeds
):
    model_dir, output = save_model(tiny_llama, tokenizer, tmp_path / "model"), tmp_path / "scores.json"
    arguments, expected = [f"model.name={model_dir}", "model.dtype=float32"], [expected_scores(tiny_llama, tokenizer)]
    for seed in seeds:
        masked = mask_model(copy.deepcopy(tiny_llama), dataclasses.replace(MASK, seed=seed))
        save_masks(masked, tmp_path / f"masks{seed}", base_model_name_or_path=str(model_dir))
        arguments += ["--masks", str(tmp_path / f"masks{seed}")]
        expected.append(expected_scores(masked, tokenizer))
    arguments += ["--lm-eval", "sums_choice,sums_likelihood", "--lm-eval-tasks", str(tasks_dir), "--run-task-code"]
    said = succeed("evaluate", *arguments, "--output", output)
    assert "base: exact weights" in said
    written = json.loads(output.read_text())
    assert written["limit"] is None
    names = ["with masks"] if seeds == [1] else [str(tmp_path / f"masks{seed}") for seed in seeds]
    assert list(written["results"]) == [str(model_dir), *names]
    for scores, theirs in zip(written["results"].values(), expected, strict=True):
        assert {score["task"]: score["value"] for score in scores} == pytest.approx(theirs, rel=1e-3)
        assert f"{scores[0]['value']:.4f} ± " in said


@pytest.mark.parametrize("way", ["function", "template"])
def test_task_files_run_their_code_only_with_leave(tasks_dir, tmp_path, way):
    mark, path = tmp_path / "ran", tasks_dir / "choice.yaml"
    if way == "function":
        (tasks_dir / "own").mkdir()
        (tasks_dir / "own" / "utils.py").write_text(f"open({str(mark)!r}, 'w').close()\nsame = lambda docs: docs\n")
        path.write_text(path.read_text() + "process_docs: !function own.utils.same\n")
    else:
        call = f"cycler.__init__.__globals__.os.makedirs({str(mark)!r}, exist_ok=True)"
        template = 'doc_to_text: "{{question}}'
        path.write_text(path.read_text().replace(template, f"{template}{{{{ {call} or '' }}}}"))
    with pytest.raises(ValueError, match="--lm-eval-tasks must come with --run-task-code") as refused:
        load_tasks(["sums_choice"], tasks_dir=tasks_dir)
    assert not mark.exists()
    files = "own/utils.py, choice.yaml, likelihood.yaml" if way == "function" else "choice.yaml, likelihood.yaml"
    assert f"got {tasks_dir} alone: task files are programs, {files} would run on this machine" in str(refused.value)
    load_tasks(["sums_choice"], tasks_dir=tasks_dir, run_task_code=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "--limit must come with --lm-eval, got 3 alone"),
        (["--lm-eval", "gsm8k", "--run-task-code"], "--run-task-code must come with --lm-eval-tasks, got it alone"),
        (["--lm-eval", ""], "--lm-eval must be names of tasks with commas between them, got "),
        (["--lm-eval", "gsm8k", "--output", "nowhere/a.json"], "--output must be a file in a directory that exists"),
        (["--lm-eval", "gsm8k", "--lm-eval-tasks", "nowhere"], "--lm-eval-tasks must be a directory of task files"),
    ],
)
def test_what_does_not_fit_together_is_one_message(arguments, message):
    assert message in refused("evaluate", *arguments)


class _Manager:
    """The used part of lm-eval's TaskManager, without the 17 s that reading 14,684 tasks takes."""

    all_tasks = ("gsm8k", "humaneval", "offline", "needy", "guarded")
    task_index = dict.fromkeys(all_tasks)

    def load(self, names):
        (name,) = names
        if name == "offline":
            raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more")
        if name == "needy":
            raise ModuleNotFoundError("No module named 'langdetect'")
        if name == "guarded":
            raise ValueError("set the environment variable HF_ALLOW_CODE_EVAL")
        return {"tasks": {name: type("Task", (), {"UNSAFE_CODE": name == "humaneval"})()}}


@pytest.fixture
def known_tasks(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: _Manager())
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", r"--lm-eval must name tasks of lm-eval, got 'gsm8'; did you mean gsm8k\?"),
        ("zzz", r"got 'zzz'; lm_eval ls tasks lists them"),
        ("offline", r"task offline must be loadable, got ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub\. "),
        ("needy", r"task needy must be loadable, got ModuleNotFoundError: No module named 'langdetect'\. "),
        ("humaneval", r"task humaneval runs code that the model wrote, .* pass --run-generated-code"),
        ("guarded", r"task guarded runs code that the model wrote, .* pass --run-generated-code"),
    ],
)
def test_a_task_that_cannot_be_run_is_one_message(known_tasks, name, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(["gsm8k", name])
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_code_is_run_only_with_leave(known_tasks, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # so that it is restored
    tasks = load_tasks(["humaneval", "gsm8k", "humaneval"], run_code=True)
    assert (tasks.names, tasks.run_code) == (["humaneval", "gsm8k"], True)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"which is not installed: pip install .*'\.\[lm-eval\]' in the clone"):
        load_tasks(["gsm8k"])
