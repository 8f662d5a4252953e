"""One-shot masks compared with their definitions, and that they leave the model as it was."""

import pytest
import torch
from tiny import make_gpt2, make_llama, make_rows, masked_llama, padded_rows

from mft.config import IMPORTANCE_METHODS, MaskConfig
from mft.importance.importance import importance
from mft.importance.initial_scores import initialise_scores
from mft.masks.convert import masked_modules
from mft_study.one_shot import one_shot_mask

UP, Q = "model.layers.2.mlp.up_proj", "model.layers.3.self_attn.q_proj"
LAYERS = MaskConfig(layers_to_transform=[2, 3], keep_ratio=0.9)
ALL = {"rows": 6, "batch_size": 4}  # for padded_rows: every row, in batches whose last one is short


def wanda_by_hand(model, name, rows):
    """Return |weight| times the norm of each input over the first 12 - i tokens of row i, one row at a time."""
    inputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: inputs.append(args[0][0]))
    with torch.no_grad():
        for number, ids in enumerate(rows["input_ids"]):
            model(torch.tensor([ids[: 12 - number]]))
    handle.remove()
    return model.get_submodule(name).weight.detach().abs() * torch.cat(inputs).norm(dim=0)


def test_magnitude_is_the_weights_size():
    model = make_llama()
    found = importance(model, [UP], "magnitude", None)
    assert torch.equal(found[UP], model.get_submodule(UP).weight.detach().abs())


def test_rows_share_the_sum_of_their_sizes():
    model = make_llama(torch.bfloat16)
    found = importance(model, [UP], "magnitude_rows", None)[UP]
    sums = model.get_submodule(UP).weight.detach().double().abs().sum(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sums.float()[:, None].expand(64, 32))


def test_wanda_is_size_times_norm_of_the_input_without_padding():
    model, rows = make_llama(), padded_rows()
    found = importance(model, [UP, Q], "wanda", rows, **ALL)
    for name in (UP, Q):
        torch.testing.assert_close(found[name], wanda_by_hand(model, name, rows))


def test_a_row_without_a_label_has_no_padding():
    model, rows = make_llama(), make_rows(2)
    unlabelled = rows.map(lambda row: {"labels": [-100] * 12})
    for a, b in zip(
        importance(model, [Q], "wanda", rows).values(), importance(model, [Q], "wanda", unlabelled).values()
    ):
        assert torch.equal(a, b)


def test_the_gradient_ranks_by_what_dropping_costs_to_first_order():
    model, rows = make_llama(), padded_rows()
    found = importance(model, [UP, Q], "gradient", rows, **ALL)
    batch = rows.with_format("torch")[:]
    model(batch["input_ids"], labels=batch["labels"]).loss.backward()
    for name, weight in ((UP, model.get_submodule(UP).weight), (Q, model.get_submodule(Q).weight)):
        torch.testing.assert_close(found[name], -weight.grad * weight.detach(), rtol=1e-4, atol=1e-9)


def test_fisher_adds_half_the_mean_square_of_a_tokens_gradient():
    model, rows = make_llama(), padded_rows()
    found = importance(model, [UP, Q], "fisher", rows, rows=6, batch_size=1)
    first = importance(model, [UP, Q], "gradient", rows, **ALL)
    tokens = sum(label != -100 for row in rows["labels"] for label in row)
    for name in (UP, Q):
        weight, squares = model.get_submodule(name).weight, 0.0
        for row in rows.with_format("torch"):
            model.zero_grad()
            (model(row["input_ids"][None], labels=row["labels"][None]).loss * (row["labels"] != -100).sum()).backward()
            squares += weight.grad.square()
        expected = first[name] + squares / tokens * weight.detach().square() / 2
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("keep_ratio", [0.9, 0.5])
@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_the_most_important_share_is_kept(method, keep_ratio):
    model, rows = make_llama(), padded_rows()
    found = importance(model, [UP, Q], method, rows, seed=3)
    one_shot_mask(model, MaskConfig(layers_to_transform=[2, 3], keep_ratio=keep_ratio, seed=3), method, rows)
    for name in (UP, Q):
        mask, values = masked_modules(model)[name].mask(), found[name]
        if method == "wanda":
            dropped = int((1 - keep_ratio) * values.shape[1])
            assert (mask.sum(1) == values.shape[1] - dropped).all()
            assert torch.equal(mask, values > values.sort(dim=1).values[:, dropped - 1 : dropped])
        else:
            share = len(values) if method == "magnitude_rows" else values.numel()  # this method drops whole rows
            dropped = int((1 - keep_ratio) * share) * (values.numel() // share)
            assert (~mask).sum() == dropped
            assert values[mask].min() > values[~mask].max()


def test_ties_are_all_kept():
    model = make_llama()
    weight = model.get_submodule(UP).weight.data
    weight[:, :] = torch.arange(64 * 32).view(64, 32) + 1.0
    weight[:10] = 7.0  # 320 of 2048 weights: the cut at 10 % falls among them
    one_shot_mask(model, LAYERS, "magnitude", None)
    assert masked_modules(model)[UP].mask().all()


def test_equal_importance_in_a_row_goes_by_column_so_that_wanda_keeps_each_rows_share():
    from mft_study.one_shot import _row_ranks

    assert _row_ranks(torch.tensor([[5.0, 5, 5, 1], [1, 2, 3, 4]])).tolist() == [[4, 3, 2, 1], [1, 2, 3, 4]]


@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_the_model_is_left_as_it_was_found(method):
    model, rows = make_llama().train(), make_rows(4)
    up = model.get_submodule(UP)
    model.lm_head.weight.requires_grad_(False)
    up.weight.grad = grad = torch.ones(64, 32)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    importance(model, [UP, Q], method, rows)
    assert model.training
    assert up.weight.grad is grad
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0], name
        assert p.grad is None or name == f"{UP}.weight"
        assert torch.equal(p, before[name][1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_random_mask_follows_the_seed_and_the_layers_name_alone():
    both = importance(make_llama(), [UP, Q], "random", None, seed=1)
    assert torch.equal(importance(make_llama(), [Q], "random", None, seed=1)[Q], both[Q])
    assert not torch.equal(importance(make_llama(), [Q], "random", None, seed=2)[Q], both[Q])
    twins = [UP, UP.replace("up", "gate")]
    assert (
        len({tuple(values.flatten().tolist()) for values in importance(make_llama(), twins, "random", None).values()})
        == 2
    )


def test_the_calibration_rows_follow_the_seed():
    model, rows = make_llama(), make_rows(8)
    a, b = (importance(model, [Q], "wanda", rows, rows=2, seed=seed)[Q] for seed in (0, 1))
    assert not torch.equal(a, b)
    assert torch.equal(a, importance(model, [Q], "wanda", rows, rows=2, batch_size=2, seed=0)[Q])


@pytest.mark.parametrize("scores_dtype", ["float32", "bfloat16", "int16"])
@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_scores_to_train_begin_with_the_one_shot_mask(method, scores_dtype):
    rows = padded_rows()
    model = initialise_scores(masked_llama(scores_dtype=scores_dtype, seed=3), method, rows)
    one_shot = one_shot_mask(make_llama(), LAYERS, method, rows)
    for name, module in masked_modules(model).items():
        if scores_dtype == "float32":
            assert torch.equal(module.mask(), masked_modules(one_shot)[name].mask()), name
            assert module.scores.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)
            assert (module.scores > 0).all()
        else:  # rounding makes ties, and ties are kept
            disagree = module.mask() != masked_modules(one_shot)[name].mask()
            assert disagree.float().mean() < 0.02
            assert (module.mask() | ~disagree).all()


def test_scores_to_train_are_in_proportion_to_importance():
    model = initialise_scores(masked_llama(), "magnitude", None)
    module = masked_modules(model)[UP]
    torch.testing.assert_close(module.scores / module.scores.max(), module.weight.abs() / module.weight.abs().max())


@pytest.mark.parametrize("method", ["wanda", "gradient", "fisher"])
def test_a_masked_layer_counts_as_if_it_kept_every_weight(method):
    rows = padded_rows()
    model = masked_llama(keep_ratio=0.5)
    masks = {name: module.mask() for name, module in masked_modules(model).items()}
    found = importance(model, list(masks), method, rows)
    plain = importance(make_llama(), list(masks), method, rows)
    for name, module in masked_modules(model).items():
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-9)
        assert torch.equal(module.mask(), masks[name])
        assert module.scores.requires_grad
        assert module.scores.grad is None


def test_conv1d_counts_its_weight_the_other_way_round():
    model = make_gpt2()
    for method in IMPORTANCE_METHODS:
        found = importance(model, ["transformer.h.1.mlp.c_fc"], method, make_rows(4))
        assert found["transformer.h.1.mlp.c_fc"].shape == (128, 32)
    one_shot_mask(model, MaskConfig(layers_to_transform=1, keep_ratio=0.9), "wanda", make_rows(4))
    assert (masked_modules(model)["transformer.h.1.mlp.c_fc"].mask().sum(1) == 32 - 3).all()


def test_what_does_not_vary_is_refused():
    model = make_llama()
    model.get_submodule(Q).weight.data.fill_(0.5)
    with pytest.raises(ValueError, match=rf"importance of {Q} by magnitude must vary, got 0.5 for every weight"):
        importance(model, [UP, Q], "magnitude", None)
    model.get_submodule(Q).weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"importance of {Q} by magnitude must be finite, got values from nan to nan"):
        importance(model, [Q], "magnitude", None)
    unlabelled = make_rows(2).map(lambda row: {"labels": [-100] * 12})
    with pytest.raises(
        ValueError, match="dataset must have at least one labelled token for a gradient, got 0 labels in the rows drawn"
    ):
        importance(make_llama(), [Q], "gradient", unlabelled)


def test_wrong_arguments_are_told():
    model, rows = make_llama(), make_rows(2)
    with pytest.raises(ValueError, match="method must be one of random, .* got 'wandb'; did you mean wanda"):
        importance(model, [Q], "wandb", rows)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        importance(model, [Q], "wanda", rows, rows=0)
    with pytest.raises(ValueError, match="dataset must hold at least one row to calibrate on, got 0"):
        importance(model, [Q], "wanda", rows.select([]))
    with pytest.raises(ValueError, match="no linear layer named 'model.layers.3.q_proj'"):
        importance(model, ["model.layers.3.q_proj"], "magnitude", rows)
    with pytest.raises(ValueError, match="mask.threshold must be null for a one-shot mask: give keep_ratio, got 0.1"):
        one_shot_mask(model, MaskConfig(threshold=0.1), "magnitude", rows)
    with pytest.raises(ValueError, match="must not be masked already"):
        one_shot_mask(masked_llama(), LAYERS, "magnitude", rows)
