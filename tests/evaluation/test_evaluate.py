"""Held-out loss and accuracy, and the paired standard error."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import evaluation, make_llama, make_rows, masked_llama

from mft.engines.distributed import Processes
from mft.evaluation.evaluate import evaluate, paired_difference
from mft.models.frozen_layers import PrefixMemory
from mft.models.token_loss import likeliest


def test_the_loss_is_the_models_own():
    model, rows = make_llama(), make_rows(5)
    batch = rows.with_format("torch")[:]
    result = evaluate(model, rows, batch_size=2)
    assert result.loss == pytest.approx(model(batch["input_ids"], labels=batch["labels"]).loss.item(), rel=1e-5)
    hits = model(batch["input_ids"]).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    assert result.accuracy == pytest.approx(hits.float().mean().item())
    assert result.documents.tolist() == [100, 101, 102]
    assert result.tokens.tolist() == [22, 22, 11]


@pytest.mark.parametrize("words", [1024, 1000])  # groups of 256 divide one of them
def test_the_likeliest_word_is_the_first_of_equals(words):
    logits = torch.randint(0, 40, (50, words)).bfloat16()  # dozens of tokens share the largest logit
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    logits[3, 700] = math.nan
    assert torch.equal(likeliest(logits), logits.argmax(-1))


def test_only_labelled_tokens_count():
    rows = make_rows(2).map(lambda row: {"labels": [-100] * 9 + row["labels"][9:]})
    assert evaluate(make_llama(), rows).tokens.tolist() == [6]


def test_the_batch_size_changes_nothing():
    model, rows = make_llama(), make_rows(5)
    assert evaluate(model, rows, batch_size=1).loss == pytest.approx(evaluate(model, rows, batch_size=5).loss, rel=1e-6)


def test_a_shared_memory_changes_nothing():
    memory, rows, model = PrefixMemory(), make_rows(4), masked_llama()
    plain = evaluate(model, rows)
    for _ in range(2):
        assert evaluate(model, rows, first=2, memory=memory).loss == plain.loss
    assert len(memory.states) == 4


def padded(rows, length):
    more = length - len(rows[0]["input_ids"])
    return rows.map(lambda row: {"input_ids": row["input_ids"] + [0] * more, "labels": row["labels"] + [-100] * more})


@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_padding_at_the_end_of_all_rows_is_not_read(way):
    model, rows, read = masked_llama(), make_rows(4, length=9), []
    model.get_input_embeddings().register_forward_hook(lambda _, given, made: read.append(given[0].shape[1]))
    wanted = evaluate(model, rows, way=way)
    found = evaluate(model, padded(rows, 64), way=way)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert torch.equal(found.tokens, wanted.tokens)
    assert max(read) == 16  # 9 tokens per row, up to a multiple of 8


def test_rows_that_are_remembered_are_whole():
    memory, rows, model = PrefixMemory(), padded(make_rows(4), 64), masked_llama()
    wanted = evaluate(model, rows)
    for size in (1, 3):
        found = evaluate(model, rows, first=2, memory=memory, batch_size=size)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert {state.shape for state in memory.states.values()} == {(64, 32)}


def test_evaluation_leaves_the_training_mode_alone():
    model = make_llama().train()
    evaluate(model, make_rows(2))
    assert model.training


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row to evaluate, got 0"):
        evaluate(make_llama(), Dataset.from_dict({"input_ids": [], "labels": [], "document": []}))


def test_the_standard_error_of_a_worked_example():
    """Documents of 10, 10 and 20 tokens have differences that sum to 1, 3 and 4: mean 8 / 40 = 0.2 per token.

    Residuals 1 - 2, 3 - 2, 4 - 4 = -1, 1, 0: sqrt(3 / 2 * 2) / 40 = 0.0433.
    """
    a, b = evaluation([10, 10, 20], [21, 23, 44]), evaluation([10, 10, 20], [20, 20, 40])
    assert paired_difference(a, b) == pytest.approx((0.2, math.sqrt(3) / 40))
    assert paired_difference(b, a) == pytest.approx((-0.2, math.sqrt(3) / 40))
    assert paired_difference(a, a) == (0, 0)
    a, b = evaluation([4, 4], [0, 0], [3, 2]), evaluation([4, 4], [0, 0], [1, 2])
    assert paired_difference(a, b, "accuracy") == pytest.approx((0.25, math.sqrt(2 * 2) / 8))


def test_a_single_document_has_no_standard_error():
    a = evaluation([3], [1])
    mean, error = paired_difference(a, evaluation([3], [2]))
    assert mean == pytest.approx(-1 / 3)
    assert math.isnan(error)


def test_what_was_evaluated_on_other_documents_is_not_paired():
    with pytest.raises(ValueError, match="same documents and tokens"):
        paired_difference(evaluation([3, 4], [1, 1]), evaluation([3, 5], [1, 1]))
    with pytest.raises(ValueError, match=r"metric must be one of .* got 'bleu'"):
        paired_difference(evaluation([3], [1]), evaluation([3], [1]), "bleu")


class Told(Processes):
    """One of two processes; ``gathered`` makes the result of gathering from its value."""

    def gather(self, value):
        return self.gathered(value)


def test_processes_share_the_batches_and_add_in_the_order_of_one(monkeypatch):
    model, rows, shares = make_llama(), make_rows(5), []
    monkeypatch.setattr(Told, "gathered", lambda self, value: shares.append(value) or [value], raising=False)
    for rank in range(2):
        evaluate(model, rows, batch_size=1, processes=Told(rank, 2))
    assert [[number for number, *_ in share] for share in shares] == [[0, 2, 4], [1, 3]]
    monkeypatch.setattr(Told, "gathered", lambda self, value: shares)
    found, alone = evaluate(model, rows, batch_size=1, processes=Told(0, 2)), evaluate(model, rows, batch_size=1)
    assert torch.equal(found.loss_sums, alone.loss_sums)
    assert torch.equal(found.tokens, alone.tokens)
    # One document. In fp64, a sum of its losses loses the small one in this order only.
    losses = [[(0, 1e16), (2, -1e16)], [(1, 1.0)]]
    shares[:] = [[(number, [7], (), ([1], [loss], [0]), 1, {}) for number, loss in share] for share in losses]
    assert evaluate(model, rows, processes=Told(0, 2)).loss_sums.tolist() == [0.0]
