"""Rows that join and leave a left-padded batch get what each gets alone, however the model uses positions."""

import copy

import pytest
import torch
from tiny import SIZES, WORDS, make_gpt2, make_llama
from tiny_mixtures import mixture
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, OPTConfig, OPTForCausalLM

from mft.config import MaskConfig
from mft.masks.bank import MaskBank, load_mask_bank
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.serving.batch.running_batch import RunningBatch


def sliding(**changes):
    """Return a model in which half of the layers see four tokens back."""
    sizes = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": None} | changes
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=4, layer_types=layers))


@pytest.mark.parametrize("make", [make_llama, make_gpt2, sliding])
def test_rows_that_join_and_leave_at_any_time_get_what_each_gets_alone(make):
    model = make(initializer_range=0.3).eval()
    prompts = {"a": [3, 4, 5], "b": [7], "c": list(range(20, 31)), "d": [9, 9], "e": [50, 2, 40, 8]}
    joins = {0: ["a", "b"], 2: ["c"], 6: ["d", "e"]}  # by step
    leaves = {4: ["a"], 7: ["c"], 9: ["d"]}
    batch, rows, made = RunningBatch(MaskBank(model)), [], {name: [] for name in prompts}
    for step in range(12):
        for name in joins.get(step, []):
            made[name].append(int(batch.join(None, prompts[name]).argmax()))
            rows.append(name)
        if gone := leaves.get(step):
            batch.keep([row for row, name in enumerate(rows) if name not in gone])
            rows = [name for name in rows if name not in gone]
        for name, logits in zip(rows, batch.step([made[name][-1] for name in rows]), strict=True):
            made[name].append(int(logits.argmax()))
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": len(made[name]), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        assert made[name] == alone.tolist(), name
    assert [len(tokens) for tokens in made.values()] == [5, 13, 6, 4, 7]


def test_rows_of_a_mixture_take_the_masks_of_their_tasks(tmp_path):
    base = mixture("Qwen3Moe", initializer_range=0.3)
    paths = {
        task: save_masks(mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.5, seed=seed)), tmp_path / task)
        for seed, task in enumerate(("code", "math"))
    }
    bank = load_mask_bank(copy.deepcopy(base), paths)
    batch, tasks = RunningBatch(bank), ["code", None, "math", "code"]
    batch.check_rows_apart()
    prompts = [[3, 4, 5], [7], [20, 21, 22, 23, 24], [9, 9]]
    made = [[int(batch.join(task, prompt).argmax())] for task, prompt in zip(tasks, prompts)]
    for _ in range(6):
        for row, logits in enumerate(batch.step([each[-1] for each in made])):
            made[row].append(int(logits.argmax()))
    for row, (task, prompt) in enumerate(zip(tasks, prompts)):
        ids = torch.tensor([prompt])
        with bank.use(task):
            alone = bank.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
        assert made[row] == alone[0, len(prompt) :].tolist()
    assert len({tuple(each) for each in made}) == 4


def test_rows_that_leave_take_their_padding_along():
    batch = RunningBatch(MaskBank(make_llama()))
    for prompt in ([3], list(range(1, 9)), [5, 6]):
        batch.join(None, prompt)
    batch.keep([0, 2])
    layer = batch._cache.layers[0]
    assert (layer.keys.shape[0], layer.keys.shape[2], batch._padding) == (2, 2, [1, 0])
    batch.keep([])
    assert len(batch) == 0
    assert not batch._cache.layers


def test_a_model_that_mixes_its_rows_is_refused(tmp_path):
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    config = OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model = OPTForCausalLM(config).eval()
    path = save_masks(mask_model(copy.deepcopy(model), MaskConfig()), tmp_path / "masks")
    batch = RunningBatch(load_mask_bank(model, {"code": path}))
    with pytest.raises(ValueError, match="base must keep its rows apart, a OPTForCausalLM does not: tasks must have"):
        batch.check_rows_apart()
