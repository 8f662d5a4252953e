"""MaskedGroupedLinear: state, selection and holding, as in MaskedLinear, for each expert."""

import copy
import pickle

import pytest
import torch
from experts import integer_experts

from mft_kernels import MaskAdamW, MaskedGroupedLinear

LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])


def _layer(transposed=False, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 40, 24, generator=generator) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    return MaskedGroupedLinear(weight, transposed=transposed, **options)


@pytest.mark.parametrize("init", ["normal", "magnitude", "constant"])
def test_each_expert_keeps_the_ratio_whatever_its_scale(init):
    layer = _layer(keep_ratio=0.8, init=init)
    kept = layer.mask().float().mean((1, 2))
    assert torch.allclose(kept, torch.full((3,), 0.8), atol=2e-3)
    assert layer.current_mask().threshold.shape == (3,)
    assert layer.scores.detach().square().mean((1, 2)).sqrt().sub(0.02).abs().max() < 2e-3


def test_a_fixed_threshold_is_one_for_all():
    layer = _layer(threshold=0.02)
    assert torch.equal(layer.mask(), layer.scores.detach().abs() >= 0.02)


@LAYOUTS
def test_held_masks_add_into_the_buffer_what_autograd_gives(transposed):
    t = integer_experts(45, 37, transposed=transposed)
    layer = MaskedGroupedLinear(t.weight, t.bias, transposed=transposed, keep_ratio=0.7)
    x = t.x.clone().requires_grad_()
    y = layer(x, t.offsets)
    y.backward(t.grad_output)
    d_x, d_scores = x.grad, layer.scores.grad
    buffer, packed = torch.zeros_like(t.weight), layer.packed_mask()
    for weight in (None, lambda: t.weight):
        layer.hold(packed, buffer.zero_(), weight=weight)
        x.grad = None
        held = layer(x, t.offsets)
        held.backward(t.grad_output)
        assert torch.equal(held, y)
        assert torch.equal(x.grad, d_x)
        assert torch.equal(buffer * t.weight * layer.scores.detach().sign(), d_scores)
        layer(t.x, t.offsets).backward(t.grad_output)  # with an x that needs no gradient
        assert torch.equal(buffer * t.weight * layer.scores.detach().sign(), 2 * d_scores)
    layer.release()
    assert torch.equal(layer(x, t.offsets), y)


def test_a_weight_changed_before_the_backward_pass_is_an_error():
    t = integer_experts(16, 32)
    layer = MaskedGroupedLinear(t.weight)
    layer.hold(layer.packed_mask(), torch.zeros_like(t.weight))
    y = layer(t.x, t.offsets)
    layer.weight.data.zero_()
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weight must stay as it is until the backward pass"):
        y.backward(t.grad_output)


def test_a_step_equals_that_of_each_expert_alone():
    layer = _layer(keep_ratio=0.8)
    singles = [torch.nn.Parameter(s.detach().clone()) for s in layer.scores]
    ours, theirs = MaskAdamW([layer.scores], lr=1e-3, moments="fp32"), MaskAdamW(singles, lr=1e-3, moments="fp32")
    for step in range(3):
        grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(step))
        threshold, packed = ours.step_one(layer.scores, grad, layer.weight, keep_ratio=0.8)
        for e, single in enumerate(singles):
            t, p = theirs.step_one(single, grad[e], layer.weight[e], keep_ratio=0.8)
            assert torch.equal(layer.scores[e], single)
            assert torch.equal(packed[e], p)
            assert torch.equal(threshold[e], t)


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.int16], ids=str)
def test_scores_that_are_not_finite_are_named_with_their_expert(scores_dtype):
    layer = _layer(keep_ratio=0.8, scores_dtype=scores_dtype)
    layer.module_name = "mlp.experts.up_proj"
    with torch.no_grad():
        layer.scores[1, 2, 3] = 0x7C00 if scores_dtype == torch.int16 else float("nan")
    with pytest.raises(ValueError, match=r"module 'mlp.experts.up_proj' must be finite, got 1 .*, in expert 1;"):
        layer(torch.ones(2, 24), torch.tensor([0, 1, 2], dtype=torch.int32))
    optimizer = MaskAdamW([layer.scores], lr=0.0)
    threshold, packed = optimizer.step_one(layer.scores, torch.zeros(3, 40, 24), layer.weight, keep_ratio=0.8)
    bad = threshold.view(torch.float16).isnan() if scores_dtype == torch.int16 else threshold.isnan()
    assert bad.tolist() == [False, True, False]
    assert not packed[1].any()


def test_copies_pickles_and_states_carry_scores_and_rule():
    layer = _layer(keep_ratio=0.8)
    x, offsets = torch.ones(3, 24), torch.tensor([1, 1, 3], dtype=torch.int32)
    y = layer(x, offsets)
    assert torch.equal(copy.deepcopy(layer)(x, offsets), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, offsets), y)
    other = _layer(keep_ratio=0.8, init="normal")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, offsets), y)
    with pytest.raises(RuntimeError, match=r"keep_ratio=0\.8"):
        _layer(keep_ratio=0.7).load_state_dict(layer.state_dict())
