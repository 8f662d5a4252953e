"""The cpu backend's kernel for many masks on one weight: each row has the same bits as with its mask alone."""

import pytest
import torch
from by_name import ByName, oracle
from products import DTYPES

from mft_kernels import masked_linear_many
from mft_kernels.backends import cpu
from mft_kernels.testing import integer_inputs, random_inputs

flat = ByName(cpu)


def masks_of(count, n, k, seed=0):
    """Return random bits, in the padding too: no kernel may read those."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-(2**31), 2**31, (n, -(-k // 32)), generator=generator, dtype=torch.int64).to(torch.int32)
        for _ in range(count)
    ]


def product(way, x, weight, masks, tasks, bias=None):
    """Compute in one pass over the weight, by "dots" or "tiles", whatever is faster."""
    return torch.ops.mft_cpu.try_masked_linear_many(x, weight, masks, tasks, bias, way)


@pytest.fixture(params=["dots", "tiles"])
def way(request, capability, dtype):
    if request.param == "tiles" and (dtype != torch.bfloat16 or not capability.startswith("amx")):
        pytest.skip(f"{capability} has no tiles of {dtype}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_the_reference_on_integers(way, dtype):
    # A mask has one row (then 8 weight rows are taken at a time), several, or more than a tile. Columns are whole words
    # and a partial one. 560 rows are more than a turn; 700 columns are more than a block of the tiles.
    # 33 tokens with a mask are more than a panel, 140 in all are more than a pass over the weight.
    few = ([0, 1], [2, -1, 0, 1, 2, 2, 0], [1] * 5 + [-1] * 2)
    for n, k in ((1, 1), (7, 33), (8, 32), (19, 64), (33, 31), (50, 59), (37, 700), (560, 70)):
        for tasks in (*few, [-1, 0, 2] * 16 + [0] * 17 + [1], [0, 1] * 70):
            t = integer_inputs(len(tasks), n, k, dtype)
            arguments = (t.x, t.weight, masks_of(3, n, k), torch.tensor(tasks))
            for bias in (t.bias, None):
                assert torch.equal(product(way, *arguments, bias), oracle.masked_linear_many(*arguments, bias)), (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(70, 96), (41, 133)])
def test_a_row_has_the_bits_of_its_mask_alone(way, n, k, dtype, threads, take_path):
    take_path("few" if way == "dots" else "fused")
    t, masks = random_inputs(18, n, k, dtype), masks_of(3, n, k)
    x, tasks = t.x.view(6, 3, k), torch.tensor([2, -1, 0, 2, 1, 0])  # three tokens per row
    masks[2] = masks[2].flip(0).contiguous()
    every = [*masks, torch.full_like(masks[0], -1)]
    expected = torch.stack(
        [flat.masked_linear_packed(x[i], t.weight, every[task], t.bias) for i, task in enumerate(tasks)]
    )
    for count in (1, 3):
        threads(count)
        assert torch.equal(product(way, x, t.weight, masks, tasks, t.bias), expected)
    memory = torch.empty(t.weight.numel() + 1, dtype=dtype)[1:]  # misaligned
    assert torch.equal(product(way, x, memory.view(n, k).copy_(t.weight), masks, tasks, t.bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_have_the_bits_of_the_product_of_all_that_share_their_mask(capability, dtype, threads):
    t, masks = random_inputs(1800, 24, 45, dtype), masks_of(2, 24, 45)
    every = [*masks, torch.full_like(masks[0], -1)]
    for chosen in ([1] * 1800, [1, 0, -1] * 600):
        tasks = torch.tensor(chosen)
        for count in (1, 3):
            threads(count)
            y = masked_linear_many(t.x, t.weight, masks, tasks, t.bias)
            for task in set(chosen):
                rows = tasks == task
                expected = flat.masked_linear_packed(t.x[rows], t.weight, every[task], t.bias)
                assert torch.equal(y[rows], expected)
