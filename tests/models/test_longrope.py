"""Rows of models whose rotary frequencies depend on the longest row: each row is as if alone, or is refused."""

from functools import partial

import packed
import pytest
import torch
from datasets import Dataset
from packed import words
from tiny import make_phi3
from tiny_architectures import SIZES
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from mft.config import MaskConfig, TrainConfig
from mft.data.batches import take_rows
from mft.evaluation.continuation import continue_prompts, generating
from mft.evaluation.evaluate import evaluate
from mft.evaluation.temperature import fit_temperature
from mft.importance.importance import importance
from mft.masks.bank import MaskBank
from mft.masks.convert import mask_model, masked_modules
from mft.models.causal_lm import head_of, run_decoder
from mft.models.longrope import by_own_length, inputs_of, refuse_long_batches, switch_length
from mft.models.next_tokens import longest_row
from mft.models.packed_rows import check_kept_apart
from mft.rewards.shared_prompts import states_before_answers
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.slabs import Row
from mft.training.loop import train_masks
from mft.training.model_teacher import ModelTeacher
from mft_study.remembered_teacher import RememberedTeacher

SWITCH, LENGTH = 16, 40
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "factor": 4.0,
    "original_max_position_embeddings": SWITCH,
}
CHANGES = SIZES | {"num_hidden_layers": 2, "initializer_range": 0.3, "rope_parameters": ROPE}


def phimoe():
    """Return a model whose rotary module also scales by the call's length."""
    rope = ROPE | {"long_mscale": 1.5, "short_mscale": 1.1}
    return PhimoeForCausalLM(PhimoeConfig(**CHANGES | {"rope_parameters": rope}, num_local_experts=4))


def llama():
    return LlamaForCausalLM(LlamaConfig(**CHANGES))


def gemma3():
    """Return a model in which only one kind of layer switches frequencies."""
    kinds = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    changes = CHANGES | {"rope_parameters": kinds, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**changes, head_dim=8, sliding_window=4))


MODELS = {"phi3": lambda: make_phi3(SWITCH), "phimoe": phimoe, "llama": llama, "gemma3": gemma3}


def make(name="phi3"):
    torch.manual_seed(0)
    return MODELS[name]().eval()


rows_of = partial(packed.rows_of, length=LENGTH)


def single_rows(*examples):
    return rows_of(*([each] for each in examples)).remove_columns("starts")


def logits_of(model, example):
    with torch.no_grad():
        return model(torch.tensor([example])).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_long_example_leaves_the_others_of_its_row_and_batch_as_they_are(name):
    model = make(name)
    short, long, other = words(10, 25, 16)
    rows = rows_of([long, short], [other, short], [long], [other])
    with torch.no_grad(), by_own_length(model):
        ids, positions = inputs_of(take_rows(rows, [0, 1, 2, 3]), model, torch.device("cpu"))
        found = head_of(model)(run_decoder(model, ids, positions))
    for row, examples in enumerate([[long, short], [other, short], [long], [other]]):
        at = 0
        for example in examples:
            assert torch.allclose(found[row, at : at + len(example)], logits_of(model, example), rtol=0, atol=2e-5)
            at += len(example)
    assert switch_length(model) == SWITCH
    assert not any(module._forward_hooks for module in model.modules())


def test_outside_of_it_they_are_not_and_the_probe_says_so():
    model, few = make(), torch.arange(3, 11)[None]
    check_kept_apart(model, few, 2)
    check_kept_apart(model, few, 2, SWITCH)
    refused = f"data.sequence_length must be at most {SWITCH} for Phi3ForCausalLM, because its short examples change"
    with pytest.raises(ValueError, match=refused):
        check_kept_apart(model, few, 2, SWITCH + 1)
    with by_own_length(model):
        check_kept_apart(model, few, 2, LENGTH)


def test_rows_that_cannot_pass_the_switch_are_as_ever():
    model = make()
    batch = take_rows(single_rows(*words(10, 25)), [0, 1])
    batch.input_ids, batch.labels = batch.input_ids[:, :SWITCH], batch.labels[:, :SWITCH]
    assert inputs_of(batch, model, torch.device("cpu"))[1] is None


@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_evaluation_gives_each_example_its_loss_alone(way):
    model, (short, long, other) = make(), words(10, 25, 16)
    alone = [evaluate(make(), single_rows(each), way=way).loss_sums.item() for each in (long, short, other)]
    for rows in (rows_of([long, short], [other]), rows_of([other], [long, short])):
        assert evaluate(model, rows, way=way).loss_sums.sum().item() == pytest.approx(sum(alone), rel=1e-5)
    together = evaluate(model, single_rows(long, short, other), batch_size=3, way=way)
    assert together.loss_sums.tolist() == pytest.approx(alone, rel=1e-5)
    with torch.no_grad():
        logits = logits_of(model, short)[:-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(short[1:]), reduction="sum").item()
    assert alone[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layers", [[0, 1], [1]], ids=["all layers trained", "frozen layers remembered"])
@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_training_on_rows_of_both_sides_is_training_on_each_alone(way, layers):
    examples = words(10, 25, 16)
    short, long, other = examples
    settings = {"lr": 1e-3, "steps": 2}

    def trained(rows, way="plain", **changes):
        model = mask_model(make(), MaskConfig.paper(layers_to_transform=layers))
        reports = train_masks(model, rows, TrainConfig(**settings | changes), way=way)
        return model, [report.loss for report in reports]

    expected, losses = trained(single_rows(*examples), batch_size=1, accumulation=3)
    for rows, changes in (
        (single_rows(*examples), {"batch_size": 3}),
        (rows_of([long, short], [other]), {"batch_size": 2}),
    ):
        model, found = trained(rows, way, **changes)
        assert found == pytest.approx(losses, rel=1e-5)
        # Two steps move a score by 2e-3. If a gradient is almost 0, Adam follows its rounding error.
        for name, module in masked_modules(model).items():
            assert (module.scores - masked_modules(expected)[name].scores).abs().max() <= 1e-4, name


def test_what_else_reads_rows_in_batches_gives_each_what_it_gets_alone():
    short, long = words(10, 25)
    together, packed = single_rows(short, long), rows_of([long, short])
    name = "model.layers.1.mlp.down_proj"
    for method in ("wanda", "gradient"):
        alone, *found = (
            importance(make(), [name], method, rows, batch_size=size)[name]
            for rows, size in ((together, 1), (together, 2), (packed, 1))
        )
        for each in found:
            assert (each - alone).abs().max() <= 1e-5 * alone.abs().max(), method
    assert fit_temperature(make(), together, batch_size=2) == pytest.approx(
        fit_temperature(make(), together, batch_size=1), rel=1e-5
    )
    batch = take_rows(together, [0, 1])
    for teacher in (RememberedTeacher(make(), together, batch_size=2), ModelTeacher(make(), device="cpu")):
        (states,) = teacher.hidden_states([batch])
        assert torch.allclose(teacher.head(states[0, :10]), logits_of(make(), short), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_served_beside_a_long_one_get_what_each_gets_alone(name):
    """Each row's logits are those of reading its whole context, on both sides of the switch."""
    model = make(name)
    batch, made = RunningBatch(MaskBank(model), 1 << 20), {}
    batch.check_rows_apart()
    prompts = dict(zip("abcd", words(12, 25, 3, 16)))
    rows = {Row(None, [*prompt]): name for name, prompt in prompts.items()}
    for row in rows:
        assert batch.join(row)
    for step in range(12):
        if step == 6:
            batch.leave(next(row for row in rows if rows[row] == "b"))
        for row, first, logits in batch.step():
            assert first == len(row.tokens) - 1
            made.setdefault(rows[row], []).append(logits[-1])
            row.tokens.append(int(logits[-1].argmax()))
    tokens = {name: row.tokens for row, name in rows.items()}
    for name, prompt in prompts.items():
        for i, logits in enumerate(made[name]):
            whole = logits_of(model, tokens[name][: len(prompt) + i])[-1]
            assert torch.allclose(logits, whole, rtol=0, atol=5e-5), (name, i)
    assert [len(made[name]) for name in "abcd"] == [12, 6, 12, 12]


def test_prompts_of_both_sides_are_continued_as_each_alone():
    model, prompts = make(), words(12, 25, 3)
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=1)
    with torch.no_grad(), generating(model, settings):
        together = continue_prompts([*prompts, prompts[0]], model, 0)
        alone = [continue_prompts([prompt], model, 0)[0] for prompt in prompts]
    assert [each[: len(own)] for each, own in zip(together, alone)] == alone
    assert together[3] == together[0]


def test_answers_beyond_the_switch_are_not_read_behind_a_shared_prompt():
    model, (prompt, one, two) = make(), words(10, 4, 12)
    ids = torch.tensor([prompt + one + [0] * 8, prompt + two])
    seen = torch.tensor([[1] * 14 + [0] * 8, [1] * 22])
    with torch.no_grad(), by_own_length(model):
        states = states_before_answers(model, ids.repeat(2, 1), seen.repeat(2, 1), 12)
    for row, answer in enumerate((one, two)):
        found = head_of(model)(states[row, : len(answer)])
        expected = logits_of(model, prompt + answer)[len(prompt) - 1 : -1]
        assert torch.allclose(found, expected, rtol=0, atol=2e-5)


def test_callers_that_pad_by_themselves_may_give_long_rows_one_at_a_time():
    model = make()
    handle = refuse_long_batches(model)
    model(torch.ones(2, SWITCH).long())
    model(input_ids=torch.ones(1, LENGTH).long())
    with pytest.raises(ValueError, match=f"batch_size must be 1 for rows of more than {SWITCH} tokens, .* 2 rows of"):
        model(torch.ones(2, SWITCH + 1).long())
    with pytest.raises(ValueError, match="batch_size must be 1"):
        model.generate(torch.ones(2, SWITCH).long(), max_new_tokens=3, attention_mask=torch.ones(2, SWITCH).long())
    handle.remove()
    model(torch.ones(2, SWITCH + 1).long())


def test_positions_of_dynamic_frequencies_end_where_these_begin_to_change():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**SIZES | {"rope_parameters": rope})
    assert longest_row(config) == SIZES["max_position_embeddings"]
    model = LlamaForCausalLM(config).eval()
    assert switch_length(model) is None
    rows = Dataset.from_dict({"input_ids": [[5] * 65], "labels": [[5] * 65], "document": [0]})
    with pytest.raises(ValueError, match="data.sequence_length must be at most 64, .*, got 65"):
        evaluate(model, rows)
