"""lm-eval takes a directory of masks as its model argument, from its command line and from Python."""

import json
import runpy
import sys
from functools import partial

import lm_eval
import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from sums import expected_scores, write_tasks

from mft.config import MaskConfig
from mft.evaluation.lm_eval_model import MaskedLM
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import load_masks, save_masks
from mft.masks.quantize import quantize_model
from mft.models.pretrained import save_model

MASK = MaskConfig.paper(keep_ratio=0.5, seed=1)
METRICS = {"sums_choice": "acc", "sums_likelihood": "perplexity"}


@pytest.fixture
def masks(tiny_llama, tokenizer, tmp_path):
    """Save masks that name their base, a directory."""
    base = save_model(tiny_llama, tokenizer, tmp_path / "base")
    return save_masks(mask_model(tiny_llama, MASK), tmp_path / "run" / "masks", base_model_name_or_path=str(base))


@pytest.mark.slow
def test_the_command_line_of_lm_eval_scores_a_directory_of_masks(masks, tiny_llama, tokenizer, tmp_path, monkeypatch):
    # Without lm-eval's own 14,684 tasks, which take 17 s to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm-eval sets it; so it is restored
    tasks, output = write_tasks(tmp_path), tmp_path / "scores.json"
    arguments = ["--model", "mft", "--model_args", f"pretrained={masks.parent}", "--tasks", ",".join(METRICS)]
    arguments += ["--include_path", str(tasks), "--output_path", str(output), "--batch_size", "4"]
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would keep logging to this test's stderr
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with pytest.warns(RuntimeWarning, match="'mft.evaluation.lm_eval_model' found in sys.modules"):
        runpy.run_module("mft.evaluation.lm_eval_model", run_name="__main__")
    (written,) = tmp_path.glob("scores*.json")
    results = json.loads(written.read_text())["results"]
    found = {task: results[task][f"{metric},none"] for task, metric in METRICS.items()}
    assert found == pytest.approx(expected_scores(tiny_llama, tokenizer), rel=1e-3)


def test_in_python_the_model_is_known_by_its_name(masks, tiny_llama, tokenizer, tmp_path):
    manager = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "mft", f"pretrained={masks},dtype=float32", tasks=list(METRICS), task_manager=manager, log_samples=False
    )["results"]
    values = {task: found[task][f"{metric},none"] for task, metric in METRICS.items()}
    assert values == pytest.approx(expected_scores(tiny_llama, tokenizer), rel=1e-3)
    assert get_model("hf").__name__ == "HFLM"  # lm-eval's own models are still there


def test_exact_weights_are_merged_in_the_dtype_of_the_masks(masks, tiny_llama):
    model = MaskedLM(str(masks)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not masked_modules(model)
    for name, module in masked_modules(tiny_llama).items():
        assert torch.equal(model.get_submodule(name).weight, module.merge().weight)


def test_masks_that_were_learned_on_a_quantised_base_are_scored_on_it(tiny_llama, tokenizer, tmp_path):
    base = save_model(tiny_llama, tokenizer, tmp_path / "base")
    learned = quantize_model(mask_model(tiny_llama, MASK), "int8", masked=True)
    path = save_masks(learned, tmp_path / "masks", base_model_name_or_path=str(base))
    tokens = torch.arange(40, 60)[None]
    with torch.no_grad():
        found, wanted = MaskedLM(str(path)).model(tokens).logits, learned(tokens).logits
        exact = MaskedLM(str(path), unquantized=True).model
        # Where weights lie may change the order of sums. The exact weights are farther away.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (exact(tokens).logits - wanted).abs().max() > 1e-4
    assert not masked_modules(exact)


def test_another_base_or_none_is_refused_and_force_accepts_it(tiny_llama, tokenizer, tmp_path):
    path = save_masks(mask_model(tiny_llama, MASK), tmp_path / "masks")
    with pytest.raises(ValueError, match=r"base must name the model that the masks are for, .*: --model_args base="):
        MaskedLM(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere: expected a directory"):
        MaskedLM(str(tmp_path / "nowhere"))
    torch.manual_seed(9)
    other = type(tiny_llama)(tiny_llama.config)
    base = save_model(other, tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="the masks were learned on other weights"):
        MaskedLM(str(path), base=str(base))
    found = MaskedLM(str(path), base=str(base), force=True).model
    up = "model.layers.0.mlp.up_proj"
    expected = load_masks(other, path, force=True).get_submodule(up).merge().weight
    assert torch.equal(found.get_submodule(up).weight, expected)
