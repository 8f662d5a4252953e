"""The kernels over experts in the form and with the tiles of each card, whatever the rows.

tests/ops/test_expert_products.py tests the results, which are the same for every backend.
"""

from dataclasses import replace

import pytest
import torch
from by_name import ByName
from exact import HALF
from experts import assert_product_equals_reference, assert_sums_equal_reference, integer_experts

from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import record
from mft_kernels.backends.triton.target import assume

flat = ByName(ops)

#: Rows of each expert, for tiles of 16, 64 and 128, each with full tiles, short ones and none.
ROWS = ((0, 1, 32, 0, 19, 0), (40, 0, 66), (0, 130, 70))
NAMES = ("x", "weight", "scores", "bias", "offsets", "grad_output", "threshold")


def hostile(t, device):
    """Set rows of no expert to NaN, and the weights of experts without rows to Inf, which their scores keep."""
    nobodys = int(t.offsets[-1])
    t.x[nobodys:] = t.grad_output[nobodys:] = torch.nan
    for e, rows in enumerate(t.groups()):
        if rows.start == rows.stop:
            t.weight[e] = t.scores[e] = torch.inf
    return replace(t, **{name: getattr(t, name).to(device) for name in NAMES})


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, for NaN times a number
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_form_and_tile_equals_the_reference(device, target, rows):
    """Neither axis is a multiple of a tile, so reading all matrices as one would read into the next."""
    if target.backend == "interpreter" and rows is not ROWS[0]:
        pytest.skip("the interpreter's own tiles hang on no number of rows")
    t = hostile(integer_experts(72, 88, HALF, HALF, rows=rows, transposed=rows is ROWS[1]), device)
    with assume(replace(target, multiprocessors=1)):
        for mask in ((t.scores, t.threshold, None), (None, None, t.words())):
            forward = (t.x, t.weight, *mask, t.offsets, t.bias, "magnitude", t.transposed)
            with record() as launches:
                flat.grouped_product(*forward)
            assert [one.options["DESCRIPTORS"] for one in launches] == [target.descriptors]
            assert_product_equals_reference(flat, *forward)
            d_x = (t.grad_output, t.weight, *mask, t.offsets, None, "magnitude", not t.transposed)
            assert_product_equals_reference(flat, *d_x)
        assert_sums_equal_reference(flat, t, None, torch.float32, accumulate=True)
        assert_sums_equal_reference(flat, t, "scores", HALF, accumulate=False)


@pytest.mark.parametrize(("pitch", "column", "mode"), [(45, 3, "magnitude"), (48, 8, "value")])
def test_no_descriptor_makes_one_matrix_of_matrices_inside_larger_ones(device, targets, pitch, column, mode):
    """Not even if rows begin at multiples of 16 bytes. Offsets and thresholds have their own strides."""
    t = integer_experts(24, 40, HALF, HALF)
    t = replace(t, **{name: getattr(t, name).to(device) for name in NAMES})
    around = torch.full((7, 26, pitch), torch.nan, dtype=HALF, device=device)
    weight, scores = around[:, 1:25, column : column + 40], torch.full_like(around, torch.nan)[:, 2:, :40]
    t.weight, t.scores = weight.copy_(t.weight), scores.copy_(t.scores)
    x, grad = (torch.cat([v, torch.full_like(v, torch.nan)], 1)[:, : v.shape[1]] for v in (t.x, t.grad_output))
    offsets, thresholds = (torch.stack([v, v + 9], 1)[:, 0] for v in (t.offsets, t.threshold))
    mask = t.scores, thresholds, None
    with assume(targets.get("H100") or targets["GPU"]):
        for a in (x, t.x):
            assert_product_equals_reference(flat, a, t.weight, *mask, offsets, None, mode, False)
        assert_product_equals_reference(flat, grad, t.weight, *mask, offsets, None, mode, True)
        strided = replace(t, x=x, grad_output=grad, offsets=offsets)
        assert_sums_equal_reference(flat, strided, "scores", torch.float32, accumulate=True, mode=mode)
