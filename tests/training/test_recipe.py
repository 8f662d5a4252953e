"""The training loop: what it learns, what it must not depend on, and how it stops."""

import copy

import pytest
import torch
from tiny import equal, make_gemma2, make_gpt2, make_llama, make_rows, masked_llama

from mft.config import MaskConfig, TrainConfig
from mft.data.batches import find_labelled
from mft.engines.master_weights import MasterAdamW
from mft.masks.convert import mask_model, masked_modules
from mft.models.causal_lm import decoder_layers, first_trainable_layer, head_of, run_decoder, split_at_head
from mft.models.frozen_layers import FrozenPrefix, PrefixMemory
from mft.models.token_loss import backward_labelled_loss
from mft.training.loop import NonFiniteLoss, finetune, schedule_factor, train_loop, train_masks


def score_gradients(model):
    return {name: module.scores.grad for name, module in masked_modules(model).items()}


@pytest.fixture
def gradients_at_steps(monkeypatch):
    """Return the gradients that AdamW received, one list per step."""
    steps, step = [], torch.optim.AdamW.step

    def recording_step(self, *args):
        steps.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    return steps


def test_full_finetuning_learns():
    reports = finetune(make_llama(), make_rows(), TrainConfig(lr=1e-2, steps=30, batch_size=8))
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert [report.step for report in reports] == list(range(1, 31))


def test_training_masks_learns_and_moves_scores_alone():
    model = masked_llama(layers=range(4), init="magnitude")
    before = copy.deepcopy(model.state_dict())
    reports = train_masks(model, make_rows(), TrainConfig(lr=1e-2, steps=40, batch_size=8))
    assert reports[-1].loss < reports[0].loss - 0.05  # a random model offers little to select
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".scores"), name


def test_training_chosen_weights_moves_them_alone():
    model, name = make_llama().requires_grad_(False), "model.layers.3.mlp.down_proj.weight"
    before = copy.deepcopy(model.state_dict())
    model.get_parameter(name).requires_grad_(True)
    train_loop(model, make_rows(), TrainConfig(lr=1e-2, steps=2))
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved == [name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_micro_batches_give_the_gradient_of_one_batch(dtype, gradients_at_steps):
    """Also if rows score different numbers of tokens."""
    rows = make_rows(4)
    labels = [[-100] * i * 3 + row["labels"][i * 3 :] for i, row in enumerate(rows)]
    rows = rows.remove_columns("labels").add_column("labels", labels)
    losses = [
        finetune(make_llama(dtype), rows, TrainConfig(steps=1, batch_size=batch_size, accumulation=accumulation))[
            0
        ].loss
        for batch_size, accumulation in ((4, 1), (1, 4))
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert len(gradients_at_steps) == 2
    for one, four in zip(*gradients_at_steps):
        assert (one - four).norm() <= tolerance * one.norm()


def test_small_updates_of_bf16_weights_are_not_rounded_away():
    """256 steps of 1e-5 on weights of 0.1, whose spacing is 5e-4: each single step would vanish."""
    model = make_llama(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.nn.init.constant_(weight, 0.1)
    before = weight.detach().clone()
    finetune(model, make_rows(), TrainConfig(lr=1e-5, steps=256, schedule="constant"))
    assert ((weight - before).abs() > 0).float().mean() > 0.5
    assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_16_bit_gradients_are_summed_in_fp32_whatever_the_block(monkeypatch, transposed):
    monkeypatch.setattr("mft.engines.master_weights._BLOCK", 4)
    weight = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
    with MasterAdamW([weight], TrainConfig(steps=1)) as optimizer:
        given = [torch.randn(5, 3).T if transposed else torch.randn(3, 5) for _ in range(3)]
        for grad in given:
            (weight * grad.bfloat16()).sum().backward()
        expected = sum(grad.bfloat16().float() for grad in given)
        assert torch.equal(optimizer.masters[0].grad, expected)
        assert weight.grad is None


def test_a_nonfinite_loss_stops_and_names_step_rows_and_documents():
    model, rows, seen = make_llama(), make_rows(4), []
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    message = r"got nan at step \d of 4 in the batch of rows \[[23]\] \(documents \[101\]\)"
    with pytest.raises(NonFiniteLoss, match=message):
        finetune(
            model,
            rows.map(lambda row: row | {"input_ids": [7] * 12} if row["document"] == 101 else row),
            TrainConfig(lr=1e-3, steps=4, seed=1),
            on_step=seen.append,
        )
    assert seen
    assert all(torch.isfinite(torch.tensor(report.loss)) for report in seen)


def test_a_batch_without_labels_changes_nothing():
    rows = make_rows(2).map(lambda row: {"labels": [-100] * 12})
    report = finetune(make_llama(), rows, TrainConfig(steps=1))[0]
    assert report.loss == 0


def test_clipping_bounds_the_gradient(gradients_at_steps):
    finetune(make_llama(), make_rows(), TrainConfig(steps=2, max_grad_norm=1e-3))
    for gradients in gradients_at_steps:
        assert torch.stack([gradient.norm() for gradient in gradients]).norm() <= 1.001e-3


def test_the_linear_schedule_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=20, warmup_ratio=0.2)
    factors = [schedule_factor(step, 20, config) for step in range(1, 21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[-1] == pytest.approx(1 / 16)
    assert factors[4:] == sorted(factors[4:], reverse=True)


# ---------------------------------------------------------------------------------------------- the loss


def test_the_chunked_loss_and_its_gradients_are_the_models_own(monkeypatch):
    monkeypatch.setattr("mft.models.token_loss.CHUNK", 5)
    rows = make_rows(3).with_format("torch")[:]
    labels = rows["labels"].clone()
    labels[0, :7] = -100
    own, ours = make_llama(), make_llama()
    loss = own(input_ids=rows["input_ids"], labels=labels).loss
    loss.backward()
    count = (labels[:, 1:] != -100).sum()
    total = backward_labelled_loss(
        head_of(ours), run_decoder(ours, rows["input_ids"]), find_labelled(labels), 1 / count
    )
    assert total / count == pytest.approx(loss.item(), rel=1e-5)
    for p, q in zip(own.parameters(), ours.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_capped_logits_are_taken_from_the_model():
    model = make_gemma2()
    ids = make_rows(2).with_format("torch")[:]["input_ids"]
    run, head = split_at_head(model, ids)
    torch.testing.assert_close(head(run(model, ids)), model(ids).logits)
    assert isinstance(head, torch.nn.Identity)


# ---------------------------------------------------------------------------------------------- the frozen prefix


@pytest.mark.parametrize("make", [make_llama, lambda: make_gpt2(n_layer=4)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("remember", [False, True])
def test_gradients_above_a_frozen_prefix_are_those_of_the_whole_model(make, remember):
    ids = make_rows(4).with_format("torch")[:]["input_ids"]
    config = MaskConfig.paper(layers_to_transform=[2, 3])
    whole, split = mask_model(make(), config), mask_model(make(), config)
    head = head_of(whole)
    backward_labelled_loss(head, run_decoder(whole, ids), find_labelled(ids), 1.0)
    prefix = FrozenPrefix(split, memory=PrefixMemory() if remember else None)
    assert prefix.first == 2
    if remember:
        prefix(ids, [0, 1, 2, 3])
    backward_labelled_loss(head_of(split), prefix(ids, [0, 1, 2, 3]), find_labelled(ids), 1.0)
    for (name, expected), found in zip(score_gradients(whole).items(), score_gradients(split).values()):
        assert expected.abs().max() > 0
        assert torch.equal(found, expected), name


def plainly_frozen_llama():
    model = make_llama().requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("make", [masked_llama, plainly_frozen_llama])
def test_no_graph_is_recorded_below_the_first_trained_layer(make):
    model = make()
    model.enable_input_require_grads()  # as trainers do for gradient checkpointing
    recorded = {}
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda m, a, output, number=number: recorded.update({number: output.requires_grad}))
    FrozenPrefix(model)(make_rows(2).with_format("torch")[:]["input_ids"], [0, 1])
    assert recorded == {0: False, 1: False, 2: True, 3: True}


def test_a_remembered_row_runs_its_frozen_layers_once():
    model, calls = masked_llama(), []
    decoder_layers(model)[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    memory = PrefixMemory()
    train_masks(model, make_rows(4), TrainConfig(steps=12), memory=memory)
    looking = 4  # before the first step: does it draw at random, is the head plain, do layers pass hidden states only
    assert len(calls) == 4 + looking
    assert sorted(memory.states) == [0, 1, 2, 3]


def test_training_from_memory_learns_what_training_without_does():
    """Up to rounding: a row was remembered in a batch with other rows."""
    runs = [masked_llama() for _ in range(2)]
    for model, remember in zip(runs, (True, False)):
        train_masks(model, make_rows(4), TrainConfig(lr=1e-2, steps=10, batch_size=2), remember=remember)
    for a, b in zip(masked_modules(runs[0]).values(), masked_modules(runs[1]).values()):
        assert (a.scores - b.scores).norm() <= 1e-3 * b.scores.norm()


def test_a_full_memory_changes_no_result():
    row = 12 * 32 * 4
    full, free = masked_llama(), masked_llama()
    memory = PrefixMemory(max_bytes=2 * row)
    train_masks(full, make_rows(4), TrainConfig(lr=1e-2, steps=8), memory=memory)
    train_masks(free, make_rows(4), TrainConfig(lr=1e-2, steps=8), remember=False)
    assert len(memory.states) == 2
    for a, b in zip(masked_modules(full).values(), masked_modules(free).values()):
        assert torch.equal(a.scores, b.scores)


def test_layers_that_pass_more_than_hidden_states_are_refused_a_memory():
    model = masked_llama()
    second, third = decoder_layers(model)[1], decoder_layers(model)[2]
    kept = []
    second.register_forward_hook(lambda m, args, output: kept.append(args[0]))
    third.register_forward_pre_hook(lambda m, args: (args[0] + 10 * kept.pop(),) if kept else None)
    with pytest.raises(ValueError, match="must pass on hidden states only"):
        train_masks(model, make_rows(2), TrainConfig(steps=4))


def test_dropout_forbids_a_memory():
    def remembered(**changes):
        model = mask_model(make_llama(**changes), MaskConfig.paper(layers_to_transform=[3]))
        memory = PrefixMemory()
        train_masks(model, make_rows(4), TrainConfig(steps=2), memory=memory)
        return len(memory.states)

    assert remembered() > 0
    assert remembered(attention_dropout=0.1) == 0


def test_a_trainable_embedding_leaves_no_frozen_prefix():
    model = masked_llama()
    assert first_trainable_layer(model) == 2
    model.get_input_embeddings().weight.requires_grad_(True)
    assert first_trainable_layer(model) == 0


def gpt2():
    return make_gpt2(dropout=0.1, n_layer=3, n_head=2)


def masked_gpt2():
    return mask_model(gpt2(), MaskConfig(layers_to_transform=[1, 2]))


@pytest.mark.parametrize(("make", "run"), [(gpt2, finetune), (masked_gpt2, train_masks)])
def test_the_seed_of_the_run_decides_its_dropout(make, run):
    def losses(seed, before):
        model = make()
        torch.manual_seed(before)
        expected = torch.get_rng_state()
        reports = run(model, make_rows(8), TrainConfig(lr=1e-2, steps=2, batch_size=8, seed=seed))
        assert torch.equal(torch.get_rng_state(), expected)  # the run does not use the caller's random numbers
        return [report.loss for report in reports], learned_of(model)

    (one, learned), (again, learned_again), (other, _) = losses(1, before=2), losses(1, before=3), losses(4, before=2)
    assert one == again
    assert all(map(torch.equal, learned, learned_again))
    assert other[0] != pytest.approx(one[0], rel=1e-5)  # every step sees all rows, so their order is not the difference


def learned_of(model):
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("make", [masked_llama, masked_gpt2])
def test_gradient_checkpointing_changes_no_result_and_drops_the_same_in_both_passes(make):
    runs = []
    for checkpointing in (False, True):
        model = make()
        train = TrainConfig(lr=1e-2, steps=3, batch_size=2, gradient_checkpointing=checkpointing)
        runs.append(([report.loss for report in train_masks(model, make_rows(4), train)], learned_of(model)))
        assert not any(layer.gradient_checkpointing for layer in decoder_layers(model))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1], runs[1][1]):
        torch.testing.assert_close(a, b)


def test_before_update_sees_the_gradients_of_a_step_and_may_change_them():
    model, seen = masked_llama(init="magnitude"), []
    before = copy.deepcopy(model.state_dict())

    def erase(step, steps):
        gradients = score_gradients(model).values()
        seen.append((step, steps, all(grad.abs().sum() > 0 for grad in gradients)))
        for grad in gradients:
            grad.zero_()

    train_masks(model, make_rows(), TrainConfig(lr=1e-2, steps=3, accumulation=2), before_update=erase)
    assert seen == [(1, 3, True), (2, 3, True), (3, 3, True)]
    assert equal(model.state_dict(), before)


def test_before_update_comes_before_clipping():
    def blow_up(step, steps):
        for grad in score_gradients(models[1]).values():
            grad.mul_(1000)

    models = [masked_llama(init="magnitude") for _ in range(2)]
    train = TrainConfig(lr=1e-2, steps=2, max_grad_norm=1e-6)
    for model, hook in zip(models, (None, blow_up)):
        train_masks(model, make_rows(), train, before_update=hook)
    for one, other in zip(*(masked_modules(model).values() for model in models)):
        torch.testing.assert_close(one.scores, other.scores)


def test_before_update_is_refused_where_it_has_no_gradients_to_show():
    with pytest.raises(ValueError, match="before_update must be None unless way is plain, .* got 'resident'"):
        train_masks(masked_llama(), make_rows(), TrainConfig(steps=1), way="resident", before_update=lambda *_: None)
