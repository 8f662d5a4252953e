"""KL, distillation and DPO: in every way, losses and gradients equal those of whole logits; what they keep and run."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import WORDS, make_llama
from tiny_run import assert_goes_on_bit_for_bit
from whole_logits import WAYS, Widths, assert_same, by_hand, make_masked, step

from mft.config import TrainConfig
from mft.data.batches import take_rows
from mft.engines.mode import MODES
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import keep_all_weights
from mft.objectives.distillation import Distillation
from mft.objectives.dpo import DPO
from mft.objectives.kl import KL
from mft.training.loop import train_masks
from mft.training.model_teacher import ModelTeacher

LENGTH = 120  # a micro-batch scores more tokens than a chunk has


def make_pairs(count=4, length=LENGTH):
    """Return rows with one pair, and two pairs in every other row; answers differ in length, prompts are unscored."""
    rows = {"input_ids": [], "labels": [], "document": [], "starts": []}
    for i in range(count):
        ids, labels, starts = [], [], []
        for example in range(4 if i % 2 else 2):
            size = (length - 4) // (4 if i % 2 else 2) - (i + example) % 3
            begin = 7 * i + 11 * example
            starts.append(len(ids))
            ids += [(begin + j * (2 if example % 2 else 1)) % WORDS for j in range(size)]
            labels += [-100] * 5 + ids[-size + 5 :]
        padding = length - len(ids)
        rows["input_ids"].append(ids + [0] * padding)
        rows["labels"].append(labels + [-100] * padding)
        rows["document"].append(i)
        rows["starts"].append(starts)
    return Dataset.from_dict(rows)


def teacher(way="plain", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = make_llama(num_hidden_layers=2, hidden_size=48, **changes)
        for p in model.parameters():
            p.data.mul_(1.5)
    return ModelTeacher(model, way, "cpu")


def scored(logits, batch):
    return logits.flatten(0, 1)[batch.labelled.positions].log_softmax(-1)


def kl_by_hand(logits, base, batch):
    ours, theirs = scored(logits, batch), scored(base, batch)
    return F.nll_loss(ours, batch.labelled.targets, reduction="sum") + 0.7 * F.kl_div(
        theirs, ours, log_target=True, reduction="sum"
    )


def distilled_by_hand(logits, _, batch):
    with torch.no_grad():
        wanted = teacher().model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    ours, theirs = scored(logits / 2, batch), scored(wanted / 2, batch)
    words = F.nll_loss(scored(logits, batch), batch.labelled.targets, reduction="sum")
    return 0.3 * words + 0.7 * 4 * F.kl_div(ours, theirs, log_target=True, reduction="sum")


def margins_by_hand(logits, base, batch):
    """Compute TRL's margins, pair by pair, from the model's logits of each row."""
    margins = []
    for row in range(len(batch.rows)):
        starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        ratios = []
        for start, end in zip(starts, [*starts[1:], batch.input_ids.shape[1]]):
            labels = batch.labels[row, start + 1 : end]
            ours, theirs = (
                -F.cross_entropy(z[row, start : end - 1], labels, ignore_index=-100, reduction="sum")
                for z in (logits, base)
            )
            ratios.append(ours - theirs)
        margins += [chosen - rejected for chosen, rejected in zip(ratios[0::2], ratios[1::2])]
    return torch.stack(margins)


def dpo_by_hand(logits, base, batch):
    scaled = 0.05 * margins_by_hand(logits, base, batch)
    return -(0.9 * F.logsigmoid(scaled) + 0.1 * F.logsigmoid(-scaled)).sum()


BUILT_IN = {
    "kl": (lambda: KL(beta=0.7), kl_by_hand),
    "distill": (lambda: Distillation(teacher(), temperature=2.0, weight=0.3), distilled_by_hand),
    "dpo": (lambda: DPO(beta=0.05, label_smoothing=0.1), dpo_by_hand),
}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_whole_logits(way, name, monkeypatch):
    """With packed rows, several micro-batches, and one memory or two."""
    make, formula = BUILT_IN[name]
    rows = make_pairs()
    batches = [take_rows(rows, [0, 1]), take_rows(rows, [2, 3])]
    count = sum(map(make().count, batches))
    assert count == (6 if name == "dpo" else sum(len(batch.labelled.targets) for batch in batches))
    expected = by_hand(make_masked(way), batches, count, formula)
    for separate in {False, MODES[way].runs_by_layers}:
        assert_same(step(make_masked(way), way, make(), batches, monkeypatch, separate=separate), expected, 2e-5)


@pytest.mark.parametrize("way", ["plain", "layerwise"])
def test_a_teacher_runs_in_its_own_way_and_words_of_padding_are_left_out(way, monkeypatch):
    batches = [take_rows(make_pairs(), [0, 1]), take_rows(make_pairs(), [2, 3])]
    runs = [
        step(make_masked("layerwise"), "layerwise", Distillation(told, weight=0.0), batches, monkeypatch)
        for told in (teacher(), teacher(way), teacher(way, vocab_size=WORDS + 3))
    ]
    assert_same(runs[1], runs[0])
    assert runs[2][0][0] > 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_tensor_as_wide_as_the_vocabulary_has_more_rows_than_a_chunk(name, monkeypatch):
    batch = take_rows(make_pairs(), [0, 1])
    assert len(batch.labelled.targets) > 150
    with Widths() as widths:
        step(make_masked("resident"), "resident", BUILT_IN[name][0](), [batch], monkeypatch)
    assert max(widths.rows) == 128


@pytest.mark.parametrize(
    ("make", "way"),
    [(DPO, "plain"), (DPO, "in_place"), (DPO, "resident"), (DPO, "layerwise"), (KL, "plain"), (KL, "layerwise")],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, make, way):
    train, rows = TrainConfig(steps=9, batch_size=2, lr=1e-2, seed=3), make_pairs(10, 40)

    def run(model, **options):
        return train_masks(model, rows, train, way=way, objective=make(), **options)

    assert_goes_on_bit_for_bit(run, lambda: make_masked(way), tmp_path, 3)


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_measures_what_the_objective_is(way):
    rows, model = make_pairs(), make_masked(way)
    batch = take_rows(rows, [0, 1, 2, 3])
    with torch.no_grad(), keep_all_weights(model):
        base = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    with torch.no_grad():
        logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    plain = evaluate(model, rows, way=way)
    assert plain.figures == {}
    objective = DPO(beta=0.05, label_smoothing=0.1)
    dpo = evaluate(model, rows, way=way, objective=objective)
    assert dpo.loss == plain.loss
    assert dpo.figures["loss"] == pytest.approx(dpo_by_hand(logits, base, batch).item() / 6, rel=1e-4)
    margins = margins_by_hand(logits, base, batch)
    assert dpo.figures["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert dpo.figures["margin"] == pytest.approx(0.05 * margins.mean().item(), rel=1e-3)
    ours, theirs = scored(logits, batch), scored(base, batch)
    kl = F.kl_div(theirs, ours, log_target=True, reduction="sum").item() / len(ours)
    found = evaluate(model, rows, way=way, objective=KL(beta=0.7)).figures
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["loss"] == pytest.approx(plain.loss + 0.7 * kl, rel=1e-4)
    assert evaluate(make_llama(), rows, way="plain" if way == "quantized" else way, objective=objective).figures == {
        "loss": pytest.approx(math.log(2)),
        "accuracy": 0,
        "margin": 0,
    }


def test_dpo_learns_to_prefer():
    model, rows = make_masked("resident", layers=(0, 1, 2, 3)), make_pairs()
    before = evaluate(model, rows, objective=DPO()).figures
    train_masks(model, rows, TrainConfig(steps=15, batch_size=4, lr=1e-2), way="resident", objective=DPO())
    after = evaluate(model, rows, objective=DPO()).figures
    assert after["loss"] < before["loss"] - 0.05
    assert after["margin"] > before["margin"] + 0.1
