"""The public ops over codes: gradients, layouts, PyTorch's machinery, and what they refuse.

test_quantized.py tests the results of each backend's kernels.
"""

import re

import pytest
import torch
from coded_weights import KINDS, coded
from torch.library import opcheck

import mft_kernels
from mft_kernels import pack_mask, reference
from mft_kernels.backends.table import registered
from mft_kernels.codes import FORMATS
from mft_kernels.testing import integer_inputs


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_strides_autocast_opcheck_and_compile(kind):
    weight = coded(6, 64, kind, integers=True)
    codes, absmax, shape, levels = weight
    values = weight.dense(torch.float32)
    t = integer_inputs(10, 6, 64, torch.float32)
    packed = pack_mask(t.scores, torch.tensor(2.0))
    kept = torch.where(reference.unpack_mask(packed, [6, 64]), values, 0)
    x, bias = t.x.view(2, 5, 64).requires_grad_(), t.bias.requires_grad_()
    options = {"shape": shape, "kind": levels}

    def eager(x):
        return mft_kernels.masked_linear_quantized(x, codes, absmax, packed, bias, **options)

    grad = t.grad_output.view(2, 5, 6)
    for function in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        x.grad = bias.grad = None
        y = function(x)
        assert torch.equal(y, x @ kept.T + bias)
        y.backward(grad)
        assert torch.equal(x.grad, grad @ kept)
        assert torch.equal(bias.grad, grad.sum((0, 1)))
    wide = torch.stack([t.x, t.x], -1)[..., 0]
    assert torch.equal(mft_kernels.masked_linear_quantized(wide, codes, absmax, packed, **options), t.x @ kept.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert eager(x).dtype == torch.bfloat16
    ops = torch.ops.mft
    opcheck(ops.masked_linear_quantized, (x, codes, absmax, packed, bias, shape, levels, "auto"))
    opcheck(ops.masked_linear_quantized_d_x, (t.grad_output, codes, absmax, None, shape, levels, "auto"))
    opcheck(ops.dequantize, (codes, absmax, shape, levels, torch.bfloat16, "auto"))
    d_x = ops.masked_linear_quantized_d_x(t.grad_output, codes, absmax, None, shape, levels, "auto")
    assert torch.equal(d_x, t.grad_output @ values)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_strides_and_no_tokens_are_taken_and_have_gradients(backend, kind):
    if not registered(backend).takes_operand(FORMATS[kind]):
        pytest.skip(f"{backend} has no products over {kind}")
    codes, absmax, shape, kind = coded(6, 64, kind, integers=True)
    generator = torch.Generator().manual_seed(1)
    for size in ((2, 3), (0, 3)):
        x = torch.randint(-1, 2, (64, *size), generator=generator).float().movedim(0, -1).requires_grad_()
        bias = torch.randint(-1, 2, (6,), generator=generator).float().requires_grad_()
        found = []
        for by in (backend, "reference"):
            y = mft_kernels.masked_linear_quantized(x, codes, absmax, None, bias, shape=shape, kind=kind, backend=by)
            found.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
        for got, expected in zip(*found):
            assert torch.equal(got, expected)


def test_nf4_takes_the_scales_of_double_quantisation_too():
    codes, absmax, shape, kind = coded(6, 64, "nf4-dq")
    dense = [mft_kernels.dequantize(codes, absmax, shape=shape, kind=each) for each in ("nf4", kind)]
    assert torch.equal(*dense)


NESTED = [torch.zeros(6).byte(), torch.zeros(1), torch.zeros(256), torch.tensor(0.0)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "fp4"}, ValueError, "kind must be one of ('nf4', 'nf4-dq', 'int8', 'int4'), got 'fp4'"),
        ({"kind": "int4"}, ValueError, "absmax must be (12,) for int4 of (6, 64), got (6,)"),
        ({"kind": "int4", "absmax": NESTED}, ValueError, "absmax must have length 1 for int4, got 4"),
        ({"kind": "nf4-dq"}, ValueError, "absmax must have length 4 for nf4-dq, got 1"),
        ({"shape": (6, 66)}, ValueError, "codes must be 198 bytes for nf4 of (6, 66), got (192,)"),
        ({"codes": torch.zeros(6, 64)}, TypeError, "codes must be torch.uint8 for nf4, got torch.float32"),
        ({"absmax": torch.zeros(7)}, ValueError, "absmax must be (6,) for nf4 of (6, 64), got (7,)"),
        (
            {"absmax": torch.zeros(6).byte()},
            TypeError,
            "absmax must be torch.float32 for nf4, got torch.uint8: give all 4 scales of nf4-dq",
        ),
        ({"absmax": NESTED[:2]}, ValueError, "absmax must have length 1 or 4 for nf4, got 2"),
        (
            {"absmax": [*NESTED[:2], torch.zeros(16), NESTED[3]]},
            ValueError,
            "absmax[2] must be (256,) for nf4 of (6, 64), got (16,)",
        ),
        ({"x": torch.zeros(2, 63)}, ValueError, "x must end in in_features = 64, got shape (2, 63)"),
        ({"packed": torch.zeros(6, 3).int()}, ValueError, "packed must be (6, 2), 1 bit per weight"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must be (6,), got (5,)"),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias must have x's dtype torch.float32, got torch.float16"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(change, error, message):
    codes, absmax, *_ = coded(6, 64, "nf4")
    arguments = {"x": torch.zeros(2, 64), "codes": codes.flatten(), "absmax": absmax, "shape": (6, 64)}
    with pytest.raises(error, match=re.escape(message)):
        mft_kernels.masked_linear_quantized(**arguments | change)
