"""Forms, tiles and launches of the Triton kernels: what the host decides, for GPUs that this machine lacks."""

import itertools

import pytest
import torch
from by_name import ByName

from mft_kernels.backends.triton import launch, ops, plan, target
from mft_kernels.backends.triton.plan import Operands, Problem

flat = ByName(ops)

TARGETS = (target.A100, target.H100, target.H100_OLD_TRITON, target.B200, target.MI300X)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 14336), (1024, 4096), (1000, 1001))
TOKENS = (1, 16, 17, 64, 512, 513, 1024, 4096, 16384)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(card, function):
    with target.assume(card), launch.record() as launches:
        function()
    return launches


def backward(m, n=4096, k=4096, dtype=torch.bfloat16):
    x, grad, weight = empty(m, k, dtype=dtype), empty(m, n, dtype=dtype), empty(n, k, dtype=dtype)
    scores, threshold = empty(n, k, dtype=torch.float32), empty(dtype=torch.float32)
    return flat.masked_linear_backward(grad, x, weight, scores, threshold, "magnitude", [True, False, True, False])


@pytest.mark.parametrize(
    ("compiler", "assembler", "swapped"),
    [((3, 9), (13, 4), True), ((3, 10), (14, 0), True), ((3, 9), (12, 9), False), ((3, 6), (13, 4), False)],
)
def test_sm_90_multiplies_from_registers_only_where_compiler_and_assembler_are_safe(compiler, assembler, swapped):
    assert target.make_target("cuda", 90, 132, 232448, compiler, assembler).swapped == swapped
    assert target.make_target("cuda", 90, 132, 232448, compiler, assembler).descriptors


def test_only_hopper_and_newer_use_descriptors():
    assert [t.descriptors for t in TARGETS] == [False, True, True, True, False]
    assert not target.make_target("cuda", 120, 170, 101376, (3, 9), (13, 4)).descriptors  # sm_120 has no wgmma either


def test_small_layers_and_few_tokens_take_one_launch_large_layers_on_fast_cards_two():
    def most(card, n, k):
        return max(
            (m for m in (2**i for i in range(12)) if plan.one_launch(Problem(card, m, n, k, Operands(2, 2)))), default=0
        )

    found = {card: (most(card, 576, 1536), most(card, 4096, 4096)) for card in TARGETS}
    assert found == {
        target.A100: (512, 1024),
        target.H100: (1024, 128),
        target.H100_OLD_TRITON: (1024, 128),
        target.B200: (1024, 16),
        target.MI300X: (1024, 256),
    }
    assert not any(plan.one_launch(Problem(card, 1, 576, 1536, Operands(4, 4))) for card in TARGETS)  # fp32 spills


def test_few_tokens_split_the_sum_and_the_parts_cover_it_once():
    for card, (n, k), m in itertools.product(TARGETS, SHAPES, TOKENS):
        tiles = plan.product_tiles(Problem(card, m, n, k, Operands(2, 2, aligned=True)))
        size = tiles.part(k)
        parts = -(-k // size)
        assert size % tiles.inner == 0
        assert (parts - 1) * size < k <= parts * size
        assert parts <= tiles.splits
    assert plan.product_tiles(Problem(target.H100, 1, 1024, 4096, Operands(2, 2, aligned=True))).splits > 1
    assert plan.product_tiles(Problem(target.H100, 4096, 4096, 4096, Operands(2, 2, aligned=True))).splits == 1


DECODING = (target.A100, target.H100, target.H100_OLD_TRITON, target.B200, target.RTX_4090)


@pytest.mark.parametrize("card", DECODING, ids=["A100", "H100", "H100, old Triton", "B200", "RTX 4090"])
def test_a_decoded_token_of_experts_fills_the_card_in_one_launch_of_tiles_of_16(card):
    """8 of 128 experts, and 2 of 8: the offsets have no values that could be read."""
    for experts, rows, n, k in ((128, 8, 1536, 2048), (128, 8, 2048, 768), (8, 2, 14336, 4096), (8, 2, 4096, 14336)):
        weight, words = empty(experts, n, k), empty(experts, n, k // 32, dtype=torch.int32)
        offsets = empty(experts, dtype=torch.int32)
        with target.assume(card), launch.record() as launches:
            flat.grouped_product(empty(rows, k), weight, None, None, words, offsets, None, "value", False)
        (product,) = launches
        jobs = rows * -(-n // product.options["BLOCK_P"])
        assert product.options["BLOCK_M"] == 16
        assert product.grid[0] == jobs or product.grid[0] % card.multiprocessors == 0
        assert product.grid[0] >= 0.85 * card.multiprocessors, ((experts, rows, n, k), product.grid)


def test_rows_an_expert_and_not_rows_in_all_choose_the_tile():
    for card in (target.A100, target.H100):
        heights = [
            plan.product_tiles(Problem(card, 4096 // e, 4096, 4096, Operands(2), e)).rows for e in (1, 8, 128, 1024)
        ]
        assert heights[0] == heights[1] > heights[2] > heights[3] == 16
    of_one, of_two = (plan.product_tiles(Problem(target.H100, 1, 1024, 4096, Operands(2), e)) for e in (None, 1))
    assert of_one.splits > of_two.splits == 1


def test_tiles_fit_shared_memory_with_at_least_two_stages():
    smaller = target.make_target("cuda", 89, 128, 101376, (3, 9), (12, 9))
    for card, element, keep in itertools.product((*TARGETS, smaller), (2, 4), (0, 2, 4)):
        operands = Operands(element, keep, aligned=True)
        tiles = plan.product_tiles(Problem(card, 4096, 4096, 4096, operands))
        activations, masked = tiles.inner * tiles.rows * element, tiles.inner * tiles.columns * (element + keep)
        assert tiles.stages >= 2
        # On sm_90 and sm_100, the newest activations wait in shared memory and masked values in registers; on gfx942
        # both do.
        needed = (tiles.stages - (card.backend == "hip")) * activations + (tiles.stages - 1) * masked
        assert tiles.blocks * needed <= card.shared_memory, (card, operands)


def test_precision_of_fp32_follows_torchs_setting():
    def precision():
        entries = launches_of(target.H100, lambda: backward(2048, dtype=torch.float32))
        return {entry.options["PRECISION"] for entry in entries}

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision() == {"ieee"}
        torch.set_float32_matmul_precision("high")
        assert precision() == {"tf32"}
    finally:
        torch.set_float32_matmul_precision(before)
