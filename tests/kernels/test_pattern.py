"""Patterns of a mask: each row, or each group of adjacent inputs, keeps the same number of weights."""

import pytest
import torch
from products import MODES

import mft_kernels
from mft_kernels import MaskAdamW, MaskedLinear, fixed_from_float, reference
from mft_kernels.mask.masking import Rule
from mft_kernels.ops.select import select_mask
from mft_kernels.testing import random_inputs

RULES = [("row", 0.7), ("row", 0.0), ("row", 1.0), ("2:4", 0.5), ("4:8", 0.5)]
FORMATS = {"fp32": torch.Tensor.float, "bf16": torch.Tensor.bfloat16, "int16": fixed_from_float}


def loop_mask(scores, keep_ratio, mode, pattern):
    """Select by a loop: of each group, drop the last of the lowest until the rest is kept."""
    values = [[abs(v) if mode == "magnitude" else v for v in row] for row in scores.tolist()]
    columns = scores.shape[1]
    size, kept = columns, columns - int((1 - keep_ratio) * columns)
    if pattern != "row":
        kept, size = int(pattern[0]), int(pattern[2])
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for n, row in enumerate(values):
        for begin in range(0, columns, size):
            left = list(range(begin, begin + size))
            while len(left) > kept:
                lowest = min(left, key=lambda k: (row[k], -k))
                left.remove(lowest)
                mask[n, lowest] = False
    return mask


def some_scores(*shape, ties):
    generator = torch.Generator().manual_seed(0)
    if ties:  # 0 of both signs among them
        return torch.randint(-2, 3, shape, generator=generator) * torch.tensor([0.01, -0.01]).repeat(shape[1] // 2)
    return 0.02 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pattern", "keep_ratio"), RULES)
def test_each_group_keeps_its_largest_and_of_equal_ones_the_first(pattern, keep_ratio, mode, form, ties):
    scores = FORMATS[form](some_scores(9, 48, ties=ties))
    numbers = mft_kernels.float_from_fixed(scores) if form == "int16" else scores.float()
    expected = loop_mask(numbers, keep_ratio, mode, pattern)
    threshold, packed, signs, zeros = select_mask(scores, keep_ratio, None, mode, pattern)
    assert torch.equal(packed, reference.pack_bits(expected))
    assert torch.equal(signs, reference.pack_bits(numbers > 0))
    assert zeros == (numbers == 0).sum()
    assert threshold == 0


def test_a_row_keeps_its_share_for_a_number_of_inputs_that_no_word_ends_with():
    layer = MaskedLinear(37, 5, keep_ratio=0.9, init="normal", pattern="row")
    assert layer.mask().sum(1).tolist() == [37 - int((1 - 0.9) * 37)] * 5
    assert "pattern='row'" in repr(layer)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_a_score_that_is_not_finite_is_an_error_that_names_the_module(pattern):
    layer = MaskedLinear(8, 4, keep_ratio=0.5, pattern=pattern)
    layer.module_name = "up_proj"
    with torch.no_grad():
        layer.scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match="scores of module 'up_proj' must be finite"):
        layer(torch.ones(1, 8))
    assert not select_mask(layer.scores, 0.5, None, "magnitude", pattern)[1].any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["row", "2:4", "4:8"])
def test_product_and_gradients_are_those_of_the_mask(pattern, mode, compiled):
    layer = MaskedLinear(16, 6, keep_ratio=0.5, mode=mode, init="normal", pattern=pattern)
    t = random_inputs(5, 6, 16)
    x = t.x.float().requires_grad_()
    if compiled:
        torch._dynamo.reset()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    y.backward(t.grad_output.float())
    mask = loop_mask(layer.scores, 0.5, mode, pattern)
    masked = torch.where(mask, layer.weight, 0)
    torch.testing.assert_close(y, t.x.float() @ masked.T + layer.bias)
    torch.testing.assert_close(x.grad, t.grad_output.float() @ masked)
    factor = layer.weight * (layer.scores.sign() if mode == "magnitude" else 1)
    torch.testing.assert_close(layer.scores.grad, t.grad_output.float().T @ t.x.float() * factor)
    assert torch.equal(layer.merge().weight, masked)


def test_a_changed_pattern_selects_again():
    layer, x = MaskedLinear(16, 6, bias=False, keep_ratio=0.5, init="normal"), torch.eye(16)
    before = layer(x)
    layer.pattern = "2:4"
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x).T != 0, loop_mask(layer.scores, 0.5, "magnitude", "2:4"))


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_step_returns_the_mask_of_the_pattern(moments):
    layer = MaskedLinear(16, 6, keep_ratio=0.5, init="normal", pattern="2:4")
    optimizer = MaskAdamW([layer.scores], lr=0.05, moments=moments)
    hint = torch.tensor(0.0)
    for _ in range(2):
        grad = torch.randn(6, 16)
        threshold, packed = optimizer.step_one(layer.scores, grad, keep_ratio=0.5, threshold=hint, pattern="2:4")
        assert threshold == 0
        assert torch.equal(packed, reference.pack_bits(loop_mask(layer.scores, 0.5, "magnitude", "2:4")))


def test_the_pattern_is_saved_and_a_state_without_one_is_of_a_matrix():
    layer = MaskedLinear(16, 6, keep_ratio=0.5, init="normal", pattern="4:8")
    other = MaskedLinear(16, 6, keep_ratio=0.5, pattern="4:8")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mask(), layer.mask())
    with pytest.raises(RuntimeError, match="pattern='4:8', got one with .*pattern='matrix': set these"):
        MaskedLinear(16, 6, keep_ratio=0.5).load_state_dict(layer.state_dict())

    old = MaskedLinear(16, 6, keep_ratio=0.5).state_dict()
    old["_extra_state"] = old["_extra_state"][:4]
    MaskedLinear(16, 6, keep_ratio=0.5).load_state_dict(old)
    with pytest.raises(RuntimeError, match="pattern='matrix', got one with .*pattern='4:8'"):
        other.load_state_dict(old)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "1:2"}, "pattern must be one of matrix, row, 2:4, 4:8, got '1:2'"),
        ({"pattern": "2:4"}, "keep_ratio must be 0.5 with pattern 2:4, got 0.99: set it to 0.5, or pattern to row"),
        ({"pattern": "4:8", "keep_ratio": 0.5}, r"no multiple of 8, got 4:8 for a weight of \(6, 12\): choose row"),
        ({"pattern": "row", "threshold": 0.1}, "pattern must be matrix with a threshold, got row and threshold 0.1"),
    ],
)
def test_a_rule_that_no_mask_can_follow_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLinear(12, 6, **options)
    layer = MaskedLinear(12, 6)
    layer.module_name = "q_proj"
    for name, value in options.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match="of module 'q_proj' must"):
        layer.mask()
    with pytest.raises(ValueError, match=message):
        layer(torch.ones(1, 12))


def test_experts_have_no_pattern():
    layer = mft_kernels.MaskedGroupedLinear(torch.randn(2, 4, 8), keep_ratio=0.5)
    layer.pattern = "row"
    with pytest.raises(ValueError, match=r"must be matrix for experts in one parameter, got row .*\(2, 4, 8\)"):
        layer.mask()


def test_a_layer_without_state_takes_the_pattern():
    from mft_kernels.layers import stateless

    layer, x = MaskedLinear(16, 6, keep_ratio=0.5, init="normal", pattern="2:4"), torch.eye(16)
    assert torch.equal(stateless.MaskedLinear.forward(layer, x), layer(x))


def test_the_rule_names_what_a_layer_selects_by():
    assert MaskedLinear(8, 4, keep_ratio=0.5, pattern="2:4").rule == Rule(0.5, None, "magnitude", "2:4")
