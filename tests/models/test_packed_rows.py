"""Examples packed into one row: each is as if it were alone, in every way of running, or the model is refused."""

from itertools import chain

import pytest
import torch
from packed import rows_of, words
from tiny import make_llama, masked_llama
from tiny_architectures import MODELS, SIZES
from transformers import BloomConfig, BloomForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from mft.config import MaskConfig, TrainConfig
from mft.data.batches import take_rows
from mft.engines.mode import place
from mft.evaluation.evaluate import evaluate
from mft.importance.importance import importance
from mft.masks.convert import mask_model, masked_modules
from mft.models import block_attention
from mft.models.causal_lm import head_of, run_decoder
from mft.models.frozen_layers import PrefixMemory
from mft.models.packed_rows import check_kept_apart
from mft.models.token_loss import backward_labelled_loss
from mft.training.loop import train_masks
from mft_study.workspace import _remembered

LENGTHS = [[7, 1, 9, 5], [11, 12], [24]]  # lengths of the examples in a row; the second row has a token of padding
LENGTH = 24


def gemma3():
    """Return a model with layers of both kinds, whose window is shorter than an example."""
    sizes = SIZES | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4))


FAMILIES = {name: MODELS[name][0] for name in ("llama", "qwen3", "gpt2")} | {"gemma3": gemma3}


def members_of(lengths):
    """Return a list of examples for each row."""
    examples = iter(words(*chain(*lengths)))
    return [[next(examples) for _ in row] for row in lengths]


def packed_rows(lengths=LENGTHS):
    return rows_of(*members_of(lengths), length=LENGTH)


def single_rows(lengths=LENGTHS):
    """Return a row for each example that has something to score."""
    examples = [example for example in chain(*members_of(lengths)) if len(example) > 1]
    return rows_of(*([example] for example in examples), length=LENGTH).remove_columns("starts")


def losses_and_gradients(model, batches):
    """Return the sum of the tokens' losses, and its gradients of each masked layer's scores."""
    for module in masked_modules(model).values():
        module.scores.grad = None
    total = 0.0
    for batch in batches:
        hidden = run_decoder(model, batch.input_ids, batch.position_ids)
        total += backward_labelled_loss(head_of(model), hidden, batch.labelled, 1.0).item()
    return total, {name: module.scores.grad.clone() for name, module in masked_modules(model).items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager", block_attention.NAME])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_each_example_what_it_gets_alone(family, attention, monkeypatch):
    monkeypatch.setattr(block_attention, "SHORT", 0)
    torch.manual_seed(0)
    model = mask_model(FAMILIES[family]().eval(), MaskConfig.paper())
    model.config._attn_implementation = attention
    check_kept_apart(model, torch.arange(3, 11)[None], 2)
    rows = packed_rows()
    batch = take_rows(rows, [0, 1, 2])
    with torch.no_grad():
        logits = head_of(model)(run_decoder(model, batch.input_ids, batch.position_ids))
        strangers = head_of(model)(run_decoder(model, batch.input_ids))
        for row, starts in enumerate(rows["starts"]):
            for start, example in zip(starts, members_of(LENGTHS)[row]):
                alone = model(torch.tensor([example])).logits[0]
                assert torch.allclose(logits[row, start : start + len(example)], alone, rtol=0, atol=3e-6)
                assert start == 0 or not torch.allclose(strangers[row, start : start + len(example)], alone, atol=1e-4)
    ours, gradients = losses_and_gradients(model, [batch])
    singles = single_rows()
    alone, expected = losses_and_gradients(model, [take_rows(singles, [i]) for i in range(len(singles))])
    assert ours == pytest.approx(alone, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("layers", [(0, 2), (2, 3)], ids=["all layers trained", "frozen layers remembered"])
@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_training_on_packed_rows_is_training_on_their_examples(way, layers):
    rows, singles = packed_rows(), single_rows()
    settings = {"lr": 1e-3, "steps": 3, "batch_size": 1}
    model, alone = masked_llama(layers=layers), masked_llama(layers=layers)
    reports = train_masks(model, rows, TrainConfig(**settings, accumulation=len(rows)), way=way)
    expected = train_masks(alone, singles, TrainConfig(**settings, accumulation=len(singles)))
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-5)
    for name, module in masked_modules(model).items():
        assert (module.scores - masked_modules(alone)[name].scores).abs().max() <= 2e-6, name


@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_evaluation_of_packed_rows_is_evaluation_of_their_examples(way):
    model = masked_llama()
    packed, alone = evaluate(model, packed_rows(), way=way), evaluate(model, single_rows())
    assert packed.tokens.sum() == alone.tokens.sum()
    assert packed.loss == pytest.approx(alone.loss, rel=1e-6)


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()


def test_a_model_that_cannot_keep_examples_apart_is_refused_before_it_trains():
    model = mask_model(bloom(), MaskConfig.paper())
    with pytest.raises(
        ValueError, match="data.packing must be false for BloomForCausalLM, because its examples see other"
    ):
        train_masks(model, packed_rows(), TrainConfig(steps=1))
    with pytest.raises(ValueError, match="data.packing must be false for BloomForCausalLM"):
        evaluate(model, packed_rows())
    train_masks(model, single_rows(), TrainConfig(steps=1))


def test_a_model_without_position_ids_is_refused():
    class Deaf(torch.nn.Module):
        def forward(self, input_ids, use_cache=False):
            raise AssertionError("not run")

    model = make_llama()
    model.model = Deaf()
    with pytest.raises(ValueError, match="must be false for LlamaForCausalLM, which takes no position_ids"):
        check_kept_apart(model, torch.arange(8)[None], 1)


@pytest.mark.parametrize("starts", [[], [1, 5], [0, 5, 5], [0, 24], [0, -3]])
def test_starts_that_are_no_places_in_the_row_are_refused(starts):
    rows = packed_rows().remove_columns("starts").add_column("starts", [[0], starts, [0]])
    with pytest.raises(ValueError, match=r"starts of row 1 must begin with 0 and rise below its 24 tokens, got \["):
        take_rows(rows, [0, 1])


def test_rows_of_one_example_need_no_positions():
    assert take_rows(packed_rows(), [2]).position_ids is None
    assert take_rows(single_rows(), [0]).position_ids is None
    positions = take_rows(packed_rows(), [1, 2]).position_ids
    assert positions[0].tolist() == [*range(11), *range(13)]  # the last token is padding
    assert positions[1].tolist() == list(range(24))


@pytest.mark.parametrize("short", [LENGTH - 1, LENGTH])
def test_training_attends_to_long_rows_in_blocks_and_gives_the_model_back(short, monkeypatch):
    monkeypatch.setattr(block_attention, "SHORT", short)
    seen, attend = [], block_attention.sdpa_attention_forward

    def seeing(module, query, *rest, **options):
        seen.append(query.shape[2])
        return attend(module, query, *rest, **options)

    monkeypatch.setattr(block_attention, "sdpa_attention_forward", seeing)
    model = masked_llama()
    train_masks(model, packed_rows([[7, 1, 9, 5]]), TrainConfig(steps=1))
    assert set(seen) - {8} == ({LENGTH} if short == LENGTH else {7, 1, 9, 5 + 2})  # 8: the few tokens of the trial
    assert model.config._attn_implementation == "sdpa"


MASKS = {
    "causal": (torch.ones(6, 6).tril(), [(0, 6, True)]),
    "two": (torch.block_diag(torch.ones(2, 2).tril(), torch.ones(4, 4).tril()), [(0, 2, True), (2, 6, True)]),
    "a window of two": (torch.ones(6, 6).tril().triu(-1), [(0, 6, False)]),
    "each its own": (torch.eye(6), [(i, i + 1, True) for i in range(6)]),
    "both ways": (torch.block_diag(torch.ones(3, 3), torch.ones(3, 3).tril()), [(0, 3, False), (3, 6, True)]),
    "ahead": (torch.eye(6) + torch.diag(torch.ones(5), 1), [(0, 6, False)]),
    "over a border": (torch.block_diag(torch.eye(3), torch.eye(3)) + torch.diag(torch.ones(1), -5), [(0, 6, False)]),
    "nothing": (torch.zeros(6, 6), [(0, 6, False)]),
}


@pytest.mark.parametrize("name", [name for name in MASKS if name != "nothing"])
def test_attention_in_blocks_is_attention_under_the_mask(name, monkeypatch):
    monkeypatch.setattr(block_attention, "SHORT", 0)
    mask = torch.stack([MASKS["two"][0], MASKS[name][0]]).bool()[:, None]
    query, key, value = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Module()
    module.is_causal = False  # like modules that always pass a mask
    ours, _ = block_attention.attend(module, query, key, value, mask)
    theirs, _ = block_attention.sdpa_attention_forward(torch.nn.Module(), query, key, value, mask)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_what_a_resumed_run_recalls_of_packed_rows_is_what_a_step_remembers(way):
    rows, memories = packed_rows(), (PrefixMemory(), PrefixMemory())
    batches = [take_rows(rows, [i]) for i in range(len(rows))]
    few, train = rows.with_format("torch")[:1]["input_ids"][:, :8], TrainConfig(steps=1)
    for memory in memories:
        runner = place(masked_llama(), way=way, memory=memory).start(few, train)
        if memory is memories[0]:
            runner.recall(batches)
        else:
            runner.step(batches, 1.0, 1e-3, None, lambda *loss: None)
        runner.close()
    recalled, remembered = (memory.states for memory in memories)
    assert recalled.keys() == remembered.keys() == {0, 1, 2}
    assert all(torch.equal(recalled[row], remembered[row]) for row in recalled)


def test_a_study_remembers_packed_rows_as_their_examples():
    lengths = [[7, 9, 5], [11, 12]]
    model, depth = make_llama(), 2
    ours = _remembered(model, packed_rows(lengths), depth, batch_size=2).states
    alone = _remembered(model, single_rows(lengths), depth, batch_size=1).states
    sizes, together = [n for row in lengths for n in row], torch.cat([ours[0][:21], ours[1][:23]])
    expected = torch.cat([alone[i][:n] for i, n in enumerate(sizes)])
    assert torch.allclose(together, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["wanda", "gradient"])
def test_calibration_on_packed_rows_is_calibration_on_their_examples(method):
    lengths, name = [[7, 9, 5], [11, 12]], "model.layers.2.mlp.down_proj"
    ours, alone = (
        importance(make_llama(), [name], method, rows, batch_size=2)[name]
        for rows in (packed_rows(lengths), single_rows(lengths))
    )
    assert (ours - alone).abs().max() <= 1e-5 * alone.abs().max()
