"""KL to the start: its definition, and which tokens count."""

import ctypes

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_rows, masked_llama

from mft.evaluation.evaluate import evaluate
from mft.evaluation.kl_divergence import kl_divergence
from mft.masks.convert import masked_modules
from mft.models.frozen_layers import PrefixMemory
from mft_study.workspace import remember_layers


def rows_of_three_documents():
    """Return documents 102, 100 and 101 of 2, 2 and 1 rows; the first five tokens of each row are not scored."""
    return (
        make_rows(5)
        .map(lambda row: {"labels": [-100] * 5 + row["labels"][5:]})
        .remove_columns("document")
        .add_column("document", [102, 102, 100, 100, 101])
    )


@torch.no_grad()
def by_definition(model, start, rows):
    """Return {document: [sum, tokens]}, token by token, in fp64."""
    found = {}
    for ids, labels, document in zip(rows["input_ids"], rows["labels"], rows["document"]):
        p, q = (one(torch.tensor([ids])).logits[0].double().softmax(-1) for one in (start, model))
        total = found.setdefault(document, [0.0, 0])
        for place, label in enumerate(labels[1:]):
            if label != -100:
                total[0] += (p[place] * (p[place] / q[place]).log()).sum().item()
                total[1] += 1
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_sums_are_those_of_the_definition_by_document(batch_size):
    model, start, rows = masked_llama(keep_ratio=0.5), make_llama(), rows_of_three_documents()
    expected = by_definition(model, start, rows)
    sums, tokens = kl_divergence(model, start, rows, batch_size=batch_size)
    assert sums.dtype == tokens.dtype == torch.float64
    assert sums.tolist() == pytest.approx([expected[i][0] for i in (100, 101, 102)], rel=1e-4)
    assert tokens.tolist() == [14, 7, 14]
    assert torch.equal(tokens, evaluate(model, rows).tokens)
    backwards, _ = kl_divergence(start, model, rows)
    assert not torch.allclose(sums, backwards, rtol=1e-3)


def test_a_model_has_not_gone_anywhere_from_itself_and_both_keep_their_modes():
    model, start = make_llama().train(), make_llama()
    sums, _ = kl_divergence(model, start, make_rows(3))
    assert sums.tolist() == [0, 0]
    assert model.training
    assert not start.training


def test_layers_that_both_share_may_be_remembered():
    start, rows, memory = make_llama(), make_rows(5), PrefixMemory()
    model = make_llama()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1.1)
    expected, _ = kl_divergence(model, start, rows)
    found, _ = kl_divergence(model, start, rows, first=3, memory=memory)
    assert torch.equal(found, expected)
    assert sorted(memory.states) == list(range(5))
    whole = remember_layers(model, rows, batch_size=2, first=3, memory=memory)["memory"]
    again, _ = kl_divergence(model, start, rows, first=3, memory=memory, whole=whole)  # of the model only
    assert torch.equal(again, found)


def test_scores_written_through_a_pointer_are_seen():
    masked, start, rows = masked_llama(keep_ratio=0.5), make_llama(), make_rows(2)
    before = kl_divergence(masked, start, rows)[0]
    for module in masked_modules(masked).values():
        eighth = module.scores.nbytes // 8  # the last eighth, of which no sample is compared
        ctypes.memset(torch.Tensor.data_ptr(module.scores) + 7 * eighth, 0, eighth)
    assert not torch.equal(kl_divergence(masked, start, rows)[0], before)


def test_what_cannot_be_measured_is_refused():
    model, rows = make_llama(), make_rows(2)
    with pytest.raises(ValueError, match="dataset must hold at least one row to measure, got 0"):
        kl_divergence(model, model, Dataset.from_dict({"input_ids": [], "labels": [], "document": []}))
    with pytest.raises(ValueError, match="dataset must score at least one token, got 2 rows without a label"):
        kl_divergence(model, model, rows.map(lambda row: {"labels": [-100] * 12}))
    with pytest.raises(ValueError, match="start must have the vocabulary of model, got 70 words for 61"):
        kl_divergence(model, make_llama(vocab_size=70), rows)
