"""Rows of one ragged batch get what each gets alone, however the model uses positions, and within the cache."""

import copy

import pytest
import torch
from tiny import SIZES, make_gpt2, make_llama
from tiny_mixtures import mixture
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from mft.config import MaskConfig
from mft.masks.bank import MaskBank, load_mask_bank
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.serving.batch import running_batch
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.slabs import LEAST, Row

CACHE = 1 << 22


def sliding(**changes):
    """Return a model in which half of the layers see four tokens back."""
    sizes = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": None} | changes
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=4, layer_types=layers))


def capped(**changes):
    """Return a model that caps attention's scores, which only transformers' eager attention does."""
    sizes = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": None} | changes
    return Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=4, attn_logit_softcapping=2.0))


def alone(model, prompt, count):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def advance(batch):
    for row, first, logits in batch.step():
        if first + len(logits) == len(row.tokens):
            row.tokens.append(int(logits[-1].argmax()))


@pytest.mark.parametrize("make", [make_llama, make_gpt2, sliding, capped])
def test_rows_that_join_and_leave_at_any_time_get_what_each_gets_alone(make, monkeypatch):
    monkeypatch.setattr(running_batch, "PIECE", 5)  # "c" is read in pieces
    model = make(initializer_range=0.3).eval()
    prompts = {"a": [3, 4, 5], "b": [7], "c": list(range(20, 31)), "d": [9, 9], "e": [50, 2, 40, 8], "f": [5, 6]}
    joins = {0: ["a", "b", "d"], 2: ["c"], 3: ["e"], 6: ["f"]}  # by step
    leaves = {5: ["d"], 9: ["a"], 10: ["c"]}  # "e" takes the place of "d", before that of "c"
    batch = RunningBatch(MaskBank(model), CACHE)
    batch.check_rows_apart()
    assert batch.slabs.bytes == 0
    rows = {name: Row(None, [*prompt]) for name, prompt in prompts.items()}
    for step in range(12):
        for name in joins.get(step, []):
            assert batch.join(rows[name])
        for name in leaves.get(step, []):
            batch.leave(rows[name])
        advance(batch)
    made = {name: rows[name].tokens[len(prompt) :] for name, prompt in prompts.items()}
    assert made == {name: alone(model, prompt, len(made[name])) for name, prompt in prompts.items()}
    assert [len(tokens) for tokens in made.values()] == [8, 12, 6, 5, 9, 6]
    assert len({rows[name].slab for name in "bef"}) == 1  # so that one call of attention reads them


def test_rows_of_a_mixture_take_the_masks_of_their_tasks(tmp_path):
    base = mixture("Qwen3Moe", initializer_range=0.3)
    paths = {
        task: save_masks(mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.5, seed=seed)), tmp_path / task)
        for seed, task in enumerate(("code", "math"))
    }
    bank = load_mask_bank(copy.deepcopy(base), paths)
    batch, tasks = RunningBatch(bank, CACHE), ["code", None, "math", "code"]
    batch.check_rows_apart()
    prompts = [[3, 4, 5], [7], [20, 21, 22, 23, 24], [9, 9]]
    rows = [Row(task, [*prompt]) for task, prompt in zip(tasks, prompts)]
    for row in rows:
        assert batch.join(row)
    for _ in range(7):
        advance(batch)
    for row, prompt in zip(rows, prompts):
        with bank.use(row.task):
            assert row.tokens[len(prompt) :] == alone(bank.model, prompt, 7)
    assert len({tuple(row.tokens[-7:]) for row in rows}) == 4


def test_keys_and_values_stay_within_the_cache_and_the_newest_row_gives_way():
    model = make_llama(initializer_range=0.3).eval()
    token = RunningBatch(MaskBank(copy.deepcopy(model)), CACHE).slabs.token_bytes
    most = 4 * LEAST * token  # places for four short rows
    batch = RunningBatch(MaskBank(model), most)
    assert batch.slabs.longest == 4 * LEAST
    assert [batch.join(Row(None, [3] * LEAST)) for _ in range(3)] == [True, True, False]  # a token more has a place
    for row in [*batch.rows]:
        batch.leave(row)
    rows = [Row(None, [3 + place] * (LEAST - 1)) for place in range(5)]
    assert [batch.join(row) for row in rows] == [True] * 4 + [False]
    gone = []
    for _ in range(8):
        gone += batch.make_room()
        advance(batch)
        stored = [each for slab in batch.slabs._slabs for layer in slab.layers.values() for each in layer]
        assert batch.slabs.bytes <= sum(each.nbytes for each in stored) <= most
    assert [rows.index(row) for row in gone] == [3, 2, 1]  # each of the others now takes twice the place
    assert (gone[0].read, gone[0].slab) == (0, None)
    assert rows[0].tokens[LEAST - 1 :] == alone(model, rows[0].tokens[: LEAST - 1], 8)
    assert RunningBatch(MaskBank(model), 3 * LEAST * token).join(Row(None, [3] * (3 * LEAST)))  # the whole cache


def test_a_long_prompt_stops_no_short_one_and_is_stopped_by_none(monkeypatch):
    monkeypatch.setattr(running_batch, "PIECE", 4)  # 16 in all
    batch = RunningBatch(MaskBank(make_llama().eval()), CACHE)
    rows = [Row(None, [3] * count) for count in (40, 9, 9, 3, 4)]
    for row in rows:
        assert batch.join(row)
    batch.step()
    assert [row.read for row in rows] == [2, 4, 3, 3, 4]


def test_a_row_that_fails_leaves_nothing_for_the_next_one_in_its_place():
    model = make_llama(initializer_range=0.3).eval()
    batch = RunningBatch(MaskBank(model), CACHE)
    bad, good = Row(None, [3] * 9), Row(None, [4, 5])
    for row in (good, bad):
        assert batch.join(row)
    advance(batch)
    for stored in bad.slab.layers.values():
        for each in stored:
            each[bad.place, :, :9] = torch.nan
    batch.leave(bad)
    long, short = Row(None, [6] * 12), Row(None, [7, 8])
    assert batch.join(short)
    assert batch.join(long)
    for _ in range(5):
        advance(batch)
    assert short.tokens[2:] == alone(model, [7, 8], 5)


def test_logits_of_the_whole_prompt_come_in_order_if_they_are_wanted(monkeypatch):
    monkeypatch.setattr(running_batch, "PIECE", 4)
    model = make_llama(initializer_range=0.3).eval()
    batch, prompt = RunningBatch(MaskBank(model), CACHE), [5, 9, 2, 7, 7, 1]
    row = Row(None, [*prompt], wants=len(prompt))
    assert batch.join(row)
    found = [piece for _ in range(2) for piece in batch.step()]
    assert [(first, len(logits)) for _, first, logits in found] == [(0, 4), (4, 2)]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(torch.cat([logits for *_, logits in found]), expected, rtol=0, atol=1e-4)


def test_a_model_whose_rows_differ_in_one_call_is_refused(monkeypatch):
    model = make_llama().eval()
    batch = RunningBatch(MaskBank(model), CACHE)
    monkeypatch.setattr(batch._attention, "_windows", [2] * len(batch._attention._windows))
    with pytest.raises(ValueError, match="base must keep its rows apart, a LlamaForCausalLM does not: a row's logits"):
        batch.check_rows_apart()
