"""Random shapes, layouts and options: the matrix kernels equal the reference on all of them."""

from dataclasses import replace

import pytest
import torch

from mft_kernels import reference
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.target import assume, interpreting
from mft_kernels.by_name import ByName, oracle
from mft_kernels.testing import integer_inputs

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

flat = ByName(ops)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def laid_out(value, layout, offset):
    """The value within memory of NaN (or of -1), from element ``offset`` on: another layout, the same elements."""
    rows, columns = value.shape
    shape, view = {
        "rows": ((rows, columns), lambda m: m),
        "columns": ((columns, rows), lambda m: m.T),
        "pitched": ((rows, columns + 3), lambda m: m[:, 1 : columns + 1]),
        "spread": ((rows, 2 * columns), lambda m: m[:, ::2]),
        "skipping": ((2 * rows, columns), lambda m: m[::2]),
    }[layout]
    around = torch.full((torch.Size(shape).numel() + offset,), -1, dtype=value.dtype, device=value.device)
    if value.is_floating_point():
        around.fill_(torch.nan)
    return view(around[offset:].view(shape)).copy_(value)


@st.composite
def layouts(draw):
    return draw(st.sampled_from(("rows", "columns", "pitched", "spread", "skipping"))), draw(st.integers(0, 9))


@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    scores_dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(("magnitude", "value")),
    threshold=st.sampled_from((-torch.inf, -1.0, 0.0, 2.0, 2.5, torch.inf, torch.nan)),
    by_row=st.booleans(),
    has_bias=st.booleans(),
    where=st.tuples(*[layouts()] * 4),
    expanded=st.sampled_from((None, "x", "grad_output", "weight", "scores")),
    output_mask=st.lists(st.booleans(), min_size=4, max_size=4),
    choose=st.sampled_from((ops.always_fused, ops.always_scratch)),
    packed=st.booleans(),
    multiprocessors=st.sampled_from((1, 2, 3, 1000)),
    data=st.data(),
)
@settings(max_examples=60 if interpreting() else 300, deadline=None)
def test_any_arguments_equal_the_reference(
    device, targets, shape, dtype, scores_dtype, mode, threshold, by_row, has_bias, where, expanded, output_mask,
    choose, packed, multiprocessors, data,
):  # fmt: skip
    target = targets[data.draw(st.sampled_from(sorted(targets)))]
    t = integer_inputs(*shape, dtype, scores_dtype, seed=sum(shape))
    t.scores[t.scores == 0] = -3
    t = replace(t, bias=t.bias.to(device))
    for name, (layout, offset) in zip(("x", "weight", "scores", "grad_output"), where):
        value = laid_out(getattr(t, name).to(device), layout, offset)
        t = replace(t, **{name: value[:1].expand(value.shape) if name == expanded and len(value) else value})
    thresholds = torch.tensor(threshold, dtype=scores_dtype, device=device)
    if by_row:
        thresholds = thresholds + (torch.arange(shape[1], device=device) % 3).to(scores_dtype)
    bits, signs = reference.pack_mask(t.scores.cpu(), thresholds.cpu(), mode), reference.pack_signs(t.scores.cpu())[0]
    bits, signs = bits.to(device), signs.to(device)
    mask = (bits,) if packed else (t.scores, thresholds)
    bias = t.bias if has_bias else None
    sign = (None, signs, mode) if packed else (mode,)
    op = "masked_linear_packed" if packed else "masked_linear"
    forward = (t.x, t.weight, *mask, bias) + (() if packed else (mode,))
    backward = (t.grad_output, t.x, t.weight, *mask, *sign, output_mask)
    with assume(replace(target, multiprocessors=multiprocessors)):
        results = (
            getattr(flat, op)(*forward, choose=choose),
            *getattr(flat, op + "_backward")(*backward, choose=choose),
        )
    on_cpu = [[a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments] for arguments in (forward, backward)]
    expected = (getattr(oracle, op)(*on_cpu[0]), *getattr(oracle, op + "_backward")(*on_cpu[1]))
    for got, want in zip(results, expected):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)
