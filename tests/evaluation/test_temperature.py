"""The temperature has the least loss, and a temperature of 1 is the model itself."""

import math

import pytest
import torch
from tiny import WORDS, make_gemma2, make_llama, make_rows, masked_llama

from mft.config import TrainConfig
from mft.evaluation.evaluate import evaluate
from mft.evaluation.temperature import evaluate_tempered, fit_temperature
from mft.models import token_loss
from mft.models.frozen_layers import PrefixMemory
from mft.models.token_loss import temperature_slopes
from mft.training.loop import finetune


@pytest.fixture(scope="module")
def trained():
    """Return a Llama that has learned to count a little, so that a sharper distribution suits it."""
    model = make_llama()
    finetune(model, make_rows(16), TrainConfig.of_weights(lr=1e-2, steps=10, batch_size=4))
    return model


def scaled_head(model, factor, dtype=torch.float32):
    scaled = make_llama(dtype)
    scaled.load_state_dict(model.state_dict())
    scaled.lm_head.weight.data *= factor
    return scaled


@pytest.mark.parametrize("options", [{}, {"way": "resident", "device": "cpu"}])
def test_in_the_same_pass_the_model_is_evaluated_as_it_is(trained, options):
    rows = make_rows(5)
    plain = evaluate(trained, rows, **options)
    for temperature in (1.0, 1.7):
        found, tempered = evaluate_tempered(trained, rows, temperature, **options)
        assert torch.equal(plain.loss_sums, found.loss_sums)
        assert torch.equal(plain.correct, found.correct)
        assert torch.equal(plain.loss_sums, tempered.loss_sums) == (temperature == 1)
        assert torch.equal(plain.correct, tempered.correct)
    assert plain.tempered_sums is None


def divided(logits, batch, temperature):
    """Return the loss of divided logits."""
    targets = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy((logits[:, :-1] / temperature).flatten(0, 1), targets).item()


@pytest.mark.parametrize("options", [{}, {"way": "resident", "device": "cpu"}])
def test_the_tempered_loss_is_that_of_divided_logits(trained, options):
    rows = make_rows(5)
    batch = rows.with_format("torch")[:]
    with torch.no_grad():
        expected = divided(trained(batch["input_ids"]).logits, batch, 1.7)
    plain, tempered = evaluate_tempered(trained, rows, 1.7, **options)
    assert tempered.loss == pytest.approx(expected, rel=1e-5)
    assert plain.loss != pytest.approx(expected, rel=1e-3)


def test_sixteen_bit_logits_are_divided_in_fp32():
    model, rows = make_llama(torch.bfloat16), make_rows(5)
    batch = rows.with_format("torch")[:]
    with torch.no_grad():
        expected = divided(model.lm_head(model.model(batch["input_ids"])[0]).float(), batch, 3)
    assert evaluate_tempered(model, rows, 3.0, batch_size=5)[1].loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("block", [400_000, 7 * WORDS], ids=["a chunk at once", "seven rows at once"])
def test_the_slopes_are_the_derivatives_of_the_loss(monkeypatch, block):
    monkeypatch.setattr(token_loss, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 90, 8, generator=generator)  # two chunks
    head = torch.nn.Linear(8, WORDS, bias=False)
    labels = torch.randint(0, WORDS, (2, 90), generator=generator)
    labels[0, :20] = -100

    def loss(inverse):
        logits = head(hidden).double()[:, :-1] * inverse
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    inverse = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(loss(inverse), inverse, create_graph=True)
    (second,) = torch.autograd.grad(first, inverse)
    found = temperature_slopes(head, hidden, labels, 1.3)
    torch.testing.assert_close(torch.stack(found), torch.stack([first.detach(), second]), rtol=1e-5, atol=1e-5)


def test_the_fitted_temperature_beats_its_neighbours(trained):
    rows = make_rows(8, seed=1)
    fitted = fit_temperature(trained, rows)
    plain, best = evaluate_tempered(trained, rows, fitted)
    assert abs(math.log(fitted)) > 0.02
    for factor in (0.98, 1.02):
        assert best.loss < evaluate_tempered(trained, rows, fitted * factor)[1].loss
    assert best.loss < plain.loss
    assert best.accuracy == plain.accuracy


@pytest.mark.parametrize("factor", [2.0, 0.1, 20.0])
def test_logits_so_many_times_as_large_need_so_many_times_the_temperature(trained, factor):
    rows = make_rows(8, seed=1)
    fitted = fit_temperature(trained, rows)
    assert fit_temperature(scaled_head(trained, factor), rows) == pytest.approx(factor * fitted, rel=1e-4)


def test_batches_and_a_memory_change_nothing(trained):
    model, rows, memory = masked_llama(keep_ratio=0.8), make_rows(5), PrefixMemory()
    expected = fit_temperature(model, rows)
    assert fit_temperature(model, rows, batch_size=5) == pytest.approx(expected, rel=1e-5)
    assert fit_temperature(model, rows, first=2, memory=memory) == pytest.approx(expected, rel=1e-5)
    assert len(memory.states) == 5
    remembered = evaluate_tempered(model, rows, 2.0, first=2, memory=memory)
    assert [each.loss for each in remembered] == [each.loss for each in evaluate_tempered(model, rows, 2.0)]


def test_the_training_mode_is_left_as_found():
    model, rows = make_llama().train(), make_rows(2)
    evaluate_tempered(model, rows, fit_temperature(model, make_rows(8)))
    assert model.training


def test_where_the_loss_falls_without_end_the_range_ends():
    class Certain(torch.nn.Linear):
        def forward(self, hidden):
            return torch.zeros(*hidden.shape[:-1], WORDS).index_fill_(-1, torch.tensor([7]), 1.0)

    model = make_llama()
    model.lm_head = Certain(32, WORDS, bias=False)
    sevens = make_rows(2).map(lambda row: {"labels": [7] * 12})
    assert 1 / 64 <= fit_temperature(model, sevens) < 1 / 16  # always right; the limit is what fp32 can distinguish
    eights = make_rows(2).map(lambda row: {"labels": [8] * 12})
    assert fit_temperature(model, eights) == 64  # always wrong


def test_capped_logits_are_divided_after_the_cap():
    model, rows = make_gemma2(), make_rows(2)
    batch = rows.with_format("torch")[:]
    with torch.no_grad():
        expected = divided(model(batch["input_ids"]).logits, batch, 0.3)
    assert evaluate_tempered(model, rows, 0.3)[1].loss == pytest.approx(expected, rel=1e-6)
    assert fit_temperature(model, rows) > 0


def test_wrong_arguments_are_told():
    model, rows = make_llama(), make_rows(2)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        evaluate_tempered(model, rows, 0)
    with pytest.raises(ValueError, match="hold at least one row to fit a temperature on, got 0"):
        fit_temperature(model, rows.select([]))
    with pytest.raises(ValueError, match="dataset must score at least one token, got 2 rows without a label"):
        fit_temperature(model, rows.map(lambda row: {"labels": [-100] * 12}))
    model.lm_head.weight.data[3, 3] = math.inf
    with pytest.raises(ValueError, match="logits must be finite for a temperature, got a slope of nan"):
        fit_temperature(model, rows)
