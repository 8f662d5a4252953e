"""The kernels over experts equal their oracle: in the form and with the tiles of each card, whatever the rows."""

from dataclasses import replace

import pytest
import torch
from exact import HALF, assert_same
from experts import integer_experts

from mft_kernels import reference
from mft_kernels.backends.triton import ops, select
from mft_kernels.backends.triton.launch import record
from mft_kernels.backends.triton.target import assume
from mft_kernels.by_name import ByName, oracle
from mft_kernels.testing import assert_within_budget

flat = ByName(ops)

#: Rows an expert: tiles of 16, of 64 and of 128 of them, each with full tiles, short ones and none.
ROWS = ((0, 1, 32, 0, 19, 0), (40, 0, 66), (0, 130, 70))
NAMES = ("x", "weight", "scores", "bias", "offsets", "grad_output", "threshold")


def on(device, t):
    return replace(t, **{name: getattr(t, name).to(device) for name in NAMES})


def assert_equals_oracle(op, *arguments):
    """Of ours, against the oracle on a CPU; of a sum its first argument."""
    on_cpu = [a.cpu().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    got, expected = getattr(flat, op)(*arguments), getattr(oracle, op)(*on_cpu)
    if op == "grouped_score_grad":
        got, expected = arguments[0], on_cpu[0]
    assert_same(got, expected)


def hostile(t, device):
    """What is nobody's is NaN, what has no rows Inf, all of which its scores keep."""
    nobodys = int(t.offsets[-1])
    t.x[nobodys:] = t.grad_output[nobodys:] = torch.nan
    for e, rows in enumerate(t.groups()):
        if rows.start == rows.stop:
            t.weight[e] = t.scores[e] = torch.inf
    return on(device, t)


def masks_of(t):
    """scores, threshold and bits, as a product takes them."""
    each = zip(t.scores.cpu(), t.threshold.cpu())
    words = torch.stack([reference.pack_mask(s, c, "magnitude") for s, c in each])
    return (t.scores, t.threshold, None), (None, None, words.to(t.scores.device))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN times a number
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_form_and_tile_equals_the_oracle(device, target, rows):
    """Neither axis is a multiple of a tile, so that what reads all matrices as one reads into the next."""
    if target.backend == "interpreter" and rows is not ROWS[0]:
        pytest.skip("the interpreter's own tiles hang on no number of rows")
    t = hostile(integer_experts(72, 88, HALF, HALF, rows=rows, transposed=rows is ROWS[1]), device)
    left, right = (t.x, t.grad_output) if t.transposed else (t.grad_output, t.x)
    with assume(replace(target, multiprocessors=1)):
        for mask in masks_of(t):
            forward = (t.x, t.weight, *mask, t.offsets, t.bias, "magnitude", t.transposed)
            with record() as launches:
                flat.grouped_product(*forward)
            assert [one.options["DESCRIPTORS"] for one in launches] == [target.descriptors]
            assert_equals_oracle("grouped_product", *forward)
            d_x = (t.grad_output, t.weight, *mask, t.offsets, None, "magnitude", not t.transposed)
            assert_equals_oracle("grouped_product", *d_x)
        out = torch.ones(t.weight.shape, device=device)
        assert_equals_oracle("grouped_score_grad", out, left, right, t.offsets, None, None, None, "magnitude", True)
        out = torch.ones(t.weight.shape, dtype=HALF, device=device)
        assert_equals_oracle(
            "grouped_score_grad", out, left, right, t.offsets, t.weight, t.scores, None, "magnitude", False
        )


@pytest.mark.parametrize(("pitch", "column", "mode"), [(45, 3, "magnitude"), (48, 8, "value")])
def test_matrices_inside_larger_ones_are_read_as_they_lie(device, targets, pitch, column, mode):
    """Of which no descriptor makes one matrix, even where rows begin at multiples of 16 bytes."""
    t = on(device, integer_experts(24, 40, HALF, HALF))
    around = torch.full((7, 26, pitch), torch.nan, dtype=HALF, device=device)
    weight, scores = around[:, 1:25, column : column + 40], torch.full_like(around, torch.nan)[:, 2:, :40]
    weight.copy_(t.weight)
    scores.copy_(t.scores)
    x, grad = (torch.cat([v, torch.full_like(v, torch.nan)], 1)[:, : v.shape[1]] for v in (t.x, t.grad_output))
    offsets, thresholds = (torch.stack([v, v + 9], 1)[:, 0] for v in (t.offsets, t.threshold))
    mask, out = (scores, thresholds, None), torch.ones(7, 24, 40, device=device)
    with assume(targets.get("H100") or targets["GPU"]):
        for a in (x, t.x):
            assert_equals_oracle("grouped_product", a, weight, *mask, offsets, None, mode, False)
        assert_equals_oracle("grouped_product", grad, weight, *mask, offsets, None, mode, True)
        assert_equals_oracle("grouped_score_grad", out, grad, x, offsets, weight, scores, None, mode, True)


@pytest.mark.parametrize("ends", [[5, 2, 40, 30, 99, 7, 8], [-3, -1, 4, 4, 2, 0, -9], [70, 0, 0, 0, 0, 0, 0]], ids=str)
def test_offsets_that_fall_or_exceed_the_rows_are_taken_as_the_oracle_takes_them(device, ends):
    t = on(device, integer_experts(16, 32, HALF, HALF))
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    mask = t.scores, t.threshold, None
    assert_equals_oracle("grouped_product", t.x, t.weight, *mask, offsets, t.bias, "magnitude", False)
    out = torch.ones(t.weight.shape, device=device)
    for accumulate in (True, False):
        arguments = (t.grad_output, t.x, offsets, t.weight, t.scores, None, "magnitude", accumulate)
        assert_equals_oracle("grouped_score_grad", out, *arguments)


@pytest.mark.parametrize(("n", "k", "rows"), [(5, 0, (2, 0, 3)), (0, 5, (2, 0, 3)), (1, 1, (1,)), (5, 7, (0, 0))])
def test_axes_of_none_and_of_one(device, n, k, rows):
    t = on(device, integer_experts(n, k, HALF, rows=rows, nobodys=0 if sum(rows) == 0 else 2))
    for mask in masks_of(t):
        for bias in (t.bias, None):
            assert_equals_oracle("grouped_product", t.x, t.weight, *mask, t.offsets, bias, "magnitude", False)
        arguments = (t.grad_output, t.weight, *mask, t.offsets, None, "magnitude", True)
        assert_equals_oracle("grouped_product", *arguments)
    for accumulate in (True, False):
        out = torch.ones(t.weight.shape, device=device)
        arguments = (t.grad_output, t.x, t.offsets, None, None, None, "magnitude", accumulate)
        assert_equals_oracle("grouped_score_grad", out, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_of_many_matrices_has_its_own_kth_largest(device, dtype):
    """Of more scores than one program takes, at addresses that no wide load can read, one not finite."""
    scores = torch.randn(4, 3, select._BLOCK + 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[1, 2, 5], scores[3] = torch.nan, 0.25
    for keep_ratio in (0.0, 0.3, 0.9):
        found = select.select(scores.to(device), keep_ratio, "magnitude", each=True)
        assert_same(found, oracle.kept_thresholds(scores, keep_ratio, "magnitude"))
        assert found.isnan().tolist() == [False, True, False, False]


def test_rounding_errors_stay_within_twice_those_of_pytorch(device):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 96, generator=generator), torch.randn(3, 24, 96, generator=generator) * 0.02
    offsets, thresholds = torch.tensor([5, 5, 29], dtype=torch.int32), torch.full((3,), 0.01)

    def run(module, dtype, where):
        given = (x.to(dtype), weight.to(dtype), weight.to(dtype), thresholds.to(dtype), None, offsets, None)
        return module.grouped_product(*(v if v is None else v.to(where) for v in given), "magnitude", False).cpu()

    assert_within_budget(run(flat, HALF, device), run(oracle, HALF, "cpu"), run(oracle, torch.float64, "cpu"))
