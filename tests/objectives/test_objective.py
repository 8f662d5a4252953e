"""A user's own loss in every way of running: of single tokens, of log-probabilities together, of hidden states."""

import pytest
import torch
import torch.nn.functional as F
from tiny import make_llama, make_rows
from whole_logits import WAYS, Widths, assert_same, by_hand, make_masked, step

from mft.config import OBJECTIVES, MaskConfig, TrainConfig
from mft.data.batches import take_rows
from mft.masks.base_pass import use_whole_weights
from mft.masks.convert import keep_all_weights, mask_model, masked_modules
from mft.objectives.cross_entropy import CrossEntropy
from mft.objectives.log_prob_objective import LogProbObjective, log_probs_of
from mft.objectives.objective import Objective
from mft.objectives.token_objective import TokenObjective
from mft.training.loop import finetune, train_masks
from mft.training.make_objective import CLASSES

LENGTH = 90  # two rows score more tokens than a chunk has


class NearBase(TokenObjective):
    """Focal loss, plus the distance of the logits from the base's."""

    of_base = True

    def token_losses(self, logits, targets, reference):
        log_p = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return -((1 - log_p.exp()) ** 2) * log_p + (logits - reference).square().mean(-1)


class Answers(LogProbObjective):
    """Not linear in the log-probabilities, so that no token's factor is known before the last token."""

    of_base = True

    def loss(self, log_probs, batch, reference):
        held_to = 0 if reference is None else reference
        return F.softplus(-(log_probs - held_to).sum() / 10)


class Small(Objective):
    """A loss without logits."""

    def backward(self, head, hidden, batch, scale, reference=None):
        total = hidden.square().mean(-1).sum()
        (scale * total).backward()
        return total.detach()


def batches(length=LENGTH):
    rows = make_rows(4, length)
    labels = [[-100] * (3 * i) + row["labels"][3 * i :] for i, row in enumerate(rows)]
    rows = rows.remove_columns("labels").add_column("labels", labels)
    return [take_rows(rows, [0, 1]), take_rows(rows, [2, 3])]


def scored(logits, batch):
    return logits.flatten(0, 1)[batch.labelled.positions]


def near_base(logits, base, batch):
    return NearBase().token_losses(scored(logits, batch), batch.labelled.targets, scored(base, batch)).sum()


def answers(logits, base, batch):
    ours, theirs = (F.cross_entropy(scored(z, batch), batch.labelled.targets, reduction="none") for z in (logits, base))
    return F.softplus((ours - theirs).sum() / 10)


@pytest.mark.parametrize(
    ("objective", "by_logits"), [(NearBase, near_base), (Answers, answers)], ids=["token", "together"]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_asks_for_the_base_is_that_of_whole_logits(way, objective, by_logits, monkeypatch):
    count = sum(len(batch.labelled.targets) for batch in batches())
    expected = by_hand(make_masked(way), batches(), count, by_logits)
    for separate in {False, way != "plain"}:
        assert_same(step(make_masked(way), way, objective(), batches(), monkeypatch, separate=separate), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_of_hidden_states(way, monkeypatch):
    def expected(logits, base, batch):
        return model.model(batch.input_ids).last_hidden_state.square().mean(-1).sum()

    model = make_masked(way)
    count = sum(len(batch.labelled.targets) for batch in batches(12))
    theirs = by_hand(model, batches(12), count, expected)
    ours = step(make_masked(way), way, Small(), batches(12), monkeypatch)
    # Dense products sum in an order of their own, and the norm makes this loss almost constant.
    assert_same(ours, theirs, 2e-4 if way == "in_place" else 1e-5)


@pytest.mark.parametrize("objective", [CrossEntropy, NearBase, Answers])
def test_no_tensor_as_wide_as_the_vocabulary_has_more_rows_than_a_chunk(objective, monkeypatch):
    with Widths() as widths:
        step(make_masked("resident"), "resident", objective(), batches()[:1], monkeypatch)
    assert len(batches()[0].labelled.targets) > 150
    assert max(widths.rows) == 128


@pytest.mark.parametrize("objective", [Answers, NearBase])
def test_a_head_that_learns_gets_its_whole_gradient(objective):
    """For full fine-tuning and modules_to_save: the first pass does not yet know the tokens' factors."""
    models = [make_llama().requires_grad_(True) for _ in range(2)]
    batch, heads = batches()[0], []
    for model, by_logits in zip(models, (False, True)):
        hidden = model.model(batch.input_ids).last_hidden_state
        reference = make_llama().model(batch.input_ids).last_hidden_state.detach() * 0.9
        if by_logits:
            with torch.no_grad():
                base = model.lm_head(reference)
            loss = (answers if objective is Answers else near_base)(model.lm_head(hidden), base, batch)
            (loss * 0.5).backward()
        else:
            objective().backward(model.lm_head, hidden, batch, 0.5, reference)
        heads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in heads[0].items():
        assert (grad - heads[1][name]).abs().max() <= 1e-5 * heads[1][name].abs().max(), name


@pytest.mark.parametrize("objective", [NearBase, Answers])
def test_a_batch_that_scores_nothing_gives_a_loss_and_no_gradient(objective):
    model = make_llama().requires_grad_(False)
    batch = batches()[0]
    batch.labels.fill_(-100)
    hidden = model.model(batch.input_ids).last_hidden_state.requires_grad_()
    total = objective().backward(model.lm_head, hidden, batch, 1.0, hidden.detach())
    assert total.shape == ()
    assert hidden.grad is None or not hidden.grad.any()


def test_the_base_is_computed_without_looking_at_scores():
    for way in ("plain", "quantized"):
        model, tokens = make_masked(way), torch.arange(10).unsqueeze(0)
        with torch.no_grad(), keep_all_weights(model):
            kept = model(tokens).logits
        with torch.no_grad():
            for module in masked_modules(model).values():
                module.scores.fill_(torch.nan)
            with use_whole_weights(model):
                assert torch.allclose(model(tokens).logits, kept, atol=1e-6)


def test_sequences_log_probs_are_those_of_whole_logits():
    model, batch = make_llama(), batches()[0]
    hidden = model.model(batch.input_ids).last_hidden_state
    whole = scored(model.lm_head(hidden), batch).log_softmax(-1)
    expected = whole.gather(-1, batch.labelled.targets[:, None]).squeeze(-1)
    assert torch.allclose(log_probs_of(model.lm_head, hidden, batch), expected, atol=1e-6)


def test_a_loss_that_is_held_to_the_base_trains_masks_alone():
    rows, train = make_rows(), TrainConfig(steps=1)
    with pytest.raises(ValueError, match="must train masks alone.*got model.embed_tokens.weight to"):
        finetune(make_llama(), rows, train, objective=NearBase())
    model = mask_model(make_llama(), MaskConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="got lm_head.weight to train: take another objective, or leave out mask.mod"):
        train_masks(model, rows, train, objective=NearBase())


def test_the_configuration_knows_of_each_objective_what_its_class_says():
    said = {name: (kind.of_base, kind.remembers) for name, kind in OBJECTIVES.items()}
    assert said == {name: (kind.of_base, kind.remembers) for name, kind in CLASSES.items()}
