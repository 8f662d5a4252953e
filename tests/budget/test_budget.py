"""Masks under a budget: what is dropped and from which layers, with the same result in every way of running a step."""

import copy

import pytest
import torch
from tiny import make_llama, make_rows
from tiny_architectures import MIXTURES
from tiny_ways import EXACT, WAYS

from mft.config import MaskConfig, TrainConfig
from mft.engines.in_place_adamw import in_place
from mft.masks.budget import Budget, budget_of, grow_budget
from mft.masks.convert import keep_all_weights, mask_model, masked_modules, merge_model
from mft.masks.export import save_masks
from mft.training.loop import train_masks
from mft_kernels import MaskedGroupedLinear, float_from_fixed

BUDGET = 0.03


def masked(dtype=torch.float32, **changes):
    layers = {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1, 2, 3]}
    return mask_model(make_llama(dtype), MaskConfig(**layers | {"budget": BUDGET, "mode": "magnitude"} | changes))


def train(way, model=None, rows=None, **options):
    model = masked() if model is None else model
    settings = TrainConfig(**{"lr": 1e-3, "steps": 4, "batch_size": 2, "accumulation": 2} | options)
    return model, train_masks(model, make_rows() if rows is None else rows, settings, way=way)


def scores_of(model):
    """Return the scores of all layers, one after another, in fp64."""
    scores = [m.scores.detach() for m in masked_modules(model).values()]
    return torch.cat([(float_from_fixed(s) if s.dtype == torch.int16 else s).double().flatten() for s in scores])


def masks_of(model):
    return torch.cat([module.mask().flatten() for module in masked_modules(model).values()])


def smallest(values, count):
    """Return a mask that is False at the ``count`` smallest values; none of these may tie with others."""
    ordered = values.sort().values
    assert ordered[count - 1] < ordered[count]
    return values >= ordered[count]


def test_the_quota_grows_evenly_over_the_ramp():
    budget = Budget(0.1, 0.5, "magnitude", 1000, fills=True)
    assert budget.quota == 100  # without a run
    found = []
    for step in range(9):
        budget.grow(step, 8)
        found.append(budget.quota)
    assert found == [0, 25, 50, 75, 100, 100, 100, 100, 100]
    at_once = Budget(0.1, 0.0, "magnitude", 1000, fills=True)
    at_once.grow(0, 8)
    assert at_once.quota == 100


def test_a_model_begins_as_it_is():
    for model in (masked(), masked(mode="value"), masked(init="normal")):
        assert masks_of(model).all()
        assert all(module.keep_ratio == 1 for module in masked_modules(model).values())


def test_without_a_ramp_the_smallest_weights_of_the_model_are_dropped():
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(10)  # this layer has no small weights
    weight = model.model.layers[2].mlp.up_proj.weight.data
    weight[0, :5] = 0.0
    before = copy.deepcopy(model)
    layers = {"target_modules": ["up_proj"], "layers_to_transform": [1, 2, 3]}
    mask_model(model, MaskConfig(**layers, budget=BUDGET, budget_ramp=0, mode="magnitude"))
    values = torch.cat([before.model.layers[i].mlp.up_proj.weight.detach().abs().flatten() for i in (1, 2, 3)])
    kept = smallest(values.masked_fill(values == 0, torch.inf), int(BUDGET * len(values)))
    assert torch.equal(masks_of(model), kept)
    first, second, third = (m.mask().float().mean().item() for m in masked_modules(model).values())
    assert first > 0.99 > max(second, third)
    scores = scores_of(model)[values != 0]
    assert scores.square().mean().sqrt() == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_the_budget_is_dropped_where_the_scores_of_all_layers_are_smallest(way, mode):
    model, reports = train(way, masked(mode=mode, fill_budget=True))
    scores = scores_of(model)
    assert torch.equal(masks_of(model), smallest(scores.abs() if mode == "magnitude" else scores, int(0.03 * 12288)))
    shares = [report.dropped for report in reports]
    assert shares == pytest.approx([BUDGET * min(1, step / (4 * 0.67)) for step in (1, 2, 3, 4)], abs=1e-4)
    thresholds = {module.threshold for module in masked_modules(model).values()}
    assert len(thresholds) == 1
    by_layer = [int((~module.mask()).sum()) for module in masked_modules(model).values()]
    assert len(set(by_layer)) > 1  # a share of each layer would give equal numbers


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_a_weight_is_dropped_only_once_its_score_is_below_0(way):
    """Half of the quota is needed: no more is dropped. Half as much is not enough: then of these the lowest go."""
    free, _ = train(way, masked(mode="value", budget=0.9, budget_ramp=0))
    below = scores_of(free) < 0
    assert torch.equal(masks_of(free), ~below)
    assert 0 < below.float().mean() < 0.9
    quota = int(below.sum()) // 2
    bounded, _ = train(way, masked(mode="value", budget=quota / below.numel() + 1e-9, budget_ramp=0))
    scores = scores_of(bounded)
    assert (scores < 0).sum() > quota
    assert torch.equal(masks_of(bounded), smallest(scores, quota))


def test_a_budget_is_filled_in_magnitude_mode_and_where_it_is_asked_for():
    filled = [
        masked(mode=mode, fill_budget=fill, budget_ramp=0) for mode, fill in (("magnitude", None), ("value", True))
    ]
    assert all(int((~masks_of(model)).sum()) == int(BUDGET * 12288) for model in filled)
    assert masks_of(masked(mode="value", budget_ramp=0)).all()
    with pytest.raises(ValueError, match="fill_budget must be true or null with mode = magnitude.*got False"):
        MaskConfig(budget=BUDGET, fill_budget=False, mode="magnitude")
    with pytest.raises(ValueError, match="fill_budget must be left out without budget, got True"):
        MaskConfig(keep_ratio=0.9, fill_budget=True)


@pytest.fixture(scope="module")
def plain():
    return train("plain")


def assert_equal(ours, theirs, exact=EXACT):
    assert (scores_of(ours[0]) - scores_of(theirs[0])).abs().max() <= exact
    assert [r.loss for r in ours[1]] == pytest.approx([r.loss for r in theirs[1]], abs=exact)
    assert [r.dropped for r in ours[1]] == [r.dropped for r in theirs[1]]


@pytest.mark.parametrize("dtype", ["bfloat16", "int16"])
def test_sixteen_bit_scores_share_a_threshold(dtype):
    """Ties are kept, so somewhat less than the budget is dropped."""
    one, other = (train(way, masked(torch.bfloat16, scores_dtype=dtype), moments="8bit") for way in WAYS[1:])
    assert_equal(one, other)
    assert torch.equal(masks_of(one[0]), masks_of(other[0]))
    assert 0.02 < one[1][-1].dropped <= BUDGET


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_experts_share_the_threshold_of_the_other_layers(way, separate):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIXTURES["olmoe"]().eval()
    mask_model(model, MaskConfig(budget=BUDGET, mode="magnitude"))
    found = [module for module in masked_modules(model).values() if isinstance(module, MaskedGroupedLinear)]
    assert found
    train(way, model)
    assert torch.equal(masks_of(model), smallest(scores_of(model).abs(), int(BUDGET * len(scores_of(model)))))
    assert len({int((~mask).sum()) for module in found for mask in module.mask()}) > 1


def test_a_merged_model_has_its_budget_dropped_and_none_any_more(plain):
    model = copy.deepcopy(plain[0])
    kept = masks_of(model)
    base = make_llama()
    names = list(masked_modules(model))
    merged = merge_model(model)
    assert budget_of(merged) is None
    weights = torch.cat([merged.get_submodule(name).weight.flatten() for name in names])
    assert torch.equal(weights != 0, kept)
    expected = torch.cat([base.get_submodule(name).weight.flatten() for name in names])
    assert torch.equal(weights, torch.where(kept, expected, 0))


def test_saved_scores_select_in_a_new_model_what_they_did(plain):
    model = masked()
    model.load_state_dict(plain[0].state_dict())
    assert torch.equal(masks_of(model), masks_of(plain[0]))


def test_a_model_without_its_masks_has_them_again_afterwards(plain):
    before = masks_of(plain[0])
    with keep_all_weights(plain[0]):
        assert masks_of(plain[0]).all()
    assert torch.equal(masks_of(plain[0]), before)


def test_a_loop_that_never_grows_its_budget_drops_scores_below_0_and_is_told(tmp_path):
    """An optimiser in place selects by itself, so there the budget is a bound without a call too."""
    rows = torch.tensor(make_rows(4)["input_ids"])
    model = masked(mode="value", budget=1e-3)
    optimizer = torch.optim.AdamW([m.scores for m in masked_modules(model).values()], lr=1.0)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    assert torch.equal(masks_of(model), scores_of(model) >= 0)
    with pytest.warns(UserWarning, match=r"drop .*% of the weights, more than mask.budget = 0.001: call mft.grow"):
        save_masks(model, tmp_path / "masks")
    placed = masked(mode="value", budget=1e-3)
    with in_place(placed, lr=1.0) as optimizer:
        placed(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    assert int((~masks_of(placed)).sum()) == int(1e-3 * 12288)
    save_masks(placed, tmp_path / "placed")


def test_a_loop_of_one_s_own_learns_as_train_masks():
    model, steps = masked(), 4
    model.requires_grad_(False)
    scores = [module.scores.requires_grad_() for module in masked_modules(model).values()]
    optimizer = torch.optim.AdamW(scores, lr=1e-3, weight_decay=0.0, betas=(0.0, 0.99))
    rows = make_rows(4)
    ids = torch.tensor(rows["input_ids"])
    grow_budget(model, 0, steps)
    for step in range(1, steps + 1):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        grow_budget(model, step, steps)
    ours, _ = train("plain", rows=rows, schedule="constant", warmup_ratio=0, batch_size=4, accumulation=1)
    assert (scores_of(model) - scores_of(ours)).abs().max() <= EXACT
    assert torch.equal(masks_of(model), masks_of(ours))
    grow_budget(make_llama(), 1, steps)  # a model without a budget
