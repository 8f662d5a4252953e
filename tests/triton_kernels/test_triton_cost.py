"""The cost model that chooses tiles: its formula, the table of cards, and the chosen tiles over cards and shapes."""

import itertools
import math
from dataclasses import replace

import pytest

from mft_kernels.backends.triton import plan, target
from mft_kernels.backends.triton.cards import CARDS, H100, H100_PCIE, H200, L2_RATE, RTX_4090, card_of
from mft_kernels.backends.triton.cost import LATENCY, MASKING, Jobs, busy_cycles, seconds, sum_seconds
from mft_kernels.backends.triton.plan import MOST_SPLITS, Operands, Problem

#: N and K, from a layer of a model with 135 million parameters to one with 8 billion.
SHAPES = ((576, 1536), (1536, 576), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 16, 64, 512, 1024, 4096)
OPERANDS = (Operands(2, 0), Operands(2, 2), Operands(2, 4), Operands(4, 4))


def target_like(card):
    """Return the target of a card, in the form that new compilers give it."""
    backend = "hip" if isinstance(card.arch, str) else "cuda"
    made = target.make_target(backend, card.arch, card.multiprocessors, card.block_shared, (3, 9), (13, 4))
    return replace(made, bandwidth=card.bandwidth)


TARGETS = {card.name: target_like(card) for card in CARDS} | {"H100, old Triton": target.H100_OLD_TRITON}


def test_a_wave_of_1024_x_4096_is_one_of_256_rows_or_columns_on_132_multiprocessors():
    """Of 128, either would need two waves."""
    chosen = plan.product_tiles(Problem(target.H100, 1024, 4096, 4096, Operands(2, 2)))
    assert (chosen.rows, chosen.splits) == (256, 1)
    for m in TOKENS[2:]:
        assert plan.outer_tiles(Problem(target.H100, m, 1024, 4096, Operands(2))).columns == 256


# ----------------------------------------------------------------------------------------------------------- the model


def cycles(count=100, steps=10, multiply_adds=1e6, read=1000, *, blocks=1, stages=4, rate=1000, **mask):
    """Return the cycles of 100 multiprocessors."""
    return busy_cycles(
        [Jobs(count, steps, multiply_adds, read, 0, **mask)], 100, blocks=blocks, stages=stages, rate=rate
    )


STEPS, ENDS, MASKED = 10 * 1000, 2 * LATENCY, {"multiply_adds": 1, "masked": 2**16}
BYTES = {"steps": 1, "multiply_adds": 0, "read": 9000, "rate": 1}


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        # One job more than places costs a wave; two blocks hide each other's latencies.
        ({"count": 1}, STEPS + ENDS),
        ({"count": 100}, STEPS + ENDS),
        ({"count": 101}, 2 * (STEPS + ENDS)),
        ({"count": 200}, 2 * STEPS + 2 * ENDS),
        ({"count": 200, "blocks": 2}, 2 * STEPS + ENDS),
        ({"count": 201, "blocks": 2}, 3 * STEPS + 2 * ENDS),  # two waves, the second with one job
        # A warp alone masks at half the rate of two; each of four schedulers issues an instruction.
        (MASKED | {"warps": 4}, 10 * MASKING * 2**16 / 2 + ENDS),
        (MASKED | {"warps": 8}, 10 * MASKING * 2**16 / 4 + ENDS),
        (MASKED | {"warps": 16}, 10 * MASKING * 2**16 / 4 + ENDS),
        (MASKED | {"warps": 4, "count": 200, "blocks": 2}, 2 * 10 * MASKING * 2**16 / 4 + ENDS),
        # Few bytes under way leave L2 waiting.
        (BYTES | {"stages": 2}, LATENCY + ENDS),
        (BYTES | {"stages": 3}, LATENCY / 2 + ENDS),
        (BYTES | {"stages": 2, "count": 200, "blocks": 2}, LATENCY + ENDS),
        (BYTES | {"stages": 9}, 9000 / L2_RATE + ENDS),
    ],
    ids=str,
)
def test_the_busiest_multiprocessor_s_cycles(jobs, expected):
    assert cycles(**jobs) == pytest.approx(expected)


def test_unlike_jobs_last_between_their_mean_and_the_longest_more():
    long, short = Jobs(10, 50, 1e6, 1000, 0), Jobs(1000, 1, 1e6, 1000, 0)
    both = busy_cycles([long, short], 100, blocks=1, stages=4, rate=1000)
    work = (10 * 50 + 1000) * 1000 / 100
    assert work < both <= work + 50 * 1000 + 11 * 2 * LATENCY
    alone = busy_cycles([Jobs(1, 5000, 1e6, 1000, 0), short], 100, blocks=1, stages=4, rate=1000)
    assert alone > 5000 * 1000  # the longest job counts, even if it is alone


def test_bytes_that_memory_has_to_give_bound_a_launch():
    jobs = [Jobs(132, 1, 1.0, 1.0, 0)]
    of = {card.name: seconds(card, jobs, memory=1e9, blocks=1, stages=4, rate=2048) for card in (H100, H200)}
    assert of[H100.name] == pytest.approx(1e9 / 3.35e12, rel=0.01)
    assert of[H200.name] == pytest.approx(1e9 / 4.8e12, rel=0.01)
    assert sum_seconds(H100, 1, 4096) == 0 < sum_seconds(H100, 2, 4096) < sum_seconds(H100, 8, 4096 * 64)


# ----------------------------------------------------------------------------------------------------------- the cards


def test_every_card_is_found_by_what_its_device_says():
    for card in CARDS:
        assert card_of(card.arch, card.multiprocessors, card.block_shared, card.bandwidth) == replace(
            card, name=card_of(card.arch, card.multiprocessors, card.block_shared).name
        )


def test_a_card_that_is_not_in_the_table_is_taken_for_its_nearest():
    pcie = card_of(90, 114, H100.block_shared)
    assert (pcie.name, pcie.bandwidth) == (H100_PCIE.name, H100_PCIE.bandwidth)
    slice_of_one = card_of(90, 60, H100.block_shared)
    assert slice_of_one.multiprocessors == 60
    assert slice_of_one.bandwidth == pytest.approx(H100_PCIE.bandwidth * 60 / 114)
    a10 = card_of(86, 72, 99 * 1024, 600e9)
    assert (a10.name, a10.multiprocessors, a10.bandwidth) == (RTX_4090.name, 72, 600e9)
    assert card_of(103, 148, 227 * 1024).name == "B200"
    assert card_of("gfx950", 256, 160 * 1024).multiprocessors == 256


def test_dense_rates_are_those_of_the_data_sheets():
    """In TFLOP/s of bf16 with fp32 sums."""
    for card, sheet in zip(CARDS, (312, 989, 756, 989, 2250, 165, 209.5, 1307), strict=True):
        rate = 2 * card.multiply_adds * card.multiprocessors * card.clock / 1e12
        assert rate == pytest.approx(sheet, rel=0.01), card.name


# ---------------------------------------------------------------------------------------------------- cards and shapes


def expected(problem, tiles):
    """Return the expected seconds of a product."""
    return plan._seconds(problem, tiles, [plan._products(problem, tiles)])


def product_jobs(tiles, m, p, q):
    return math.ceil(m / tiles.rows) * math.ceil(p / tiles.columns) * math.ceil(q / tiles.part(q))


def test_tf32_multiplies_at_half_the_rate_of_16_bits_and_full_precision_on_ordinary_cores():
    def taken(card, element, **exact):
        return expected(Problem(card, 16384, 4096, 4096, Operands(element, **exact)), plan.Tiles(128, 128, 32, 8, 4))

    assert taken(target.RTX_4090, 4) / taken(target.RTX_4090, 2) == pytest.approx(2, rel=0.1)
    assert taken(target.H100, 4, exact=True) > 5 * taken(target.H100, 4)


@pytest.mark.parametrize("name", TARGETS)
def test_no_card_is_left_half_idle_where_splitting_could_fill_it(name):
    card = TARGETS[name]
    for (p, q), m, operands in itertools.product(SHAPES, TOKENS, OPERANDS):
        tiles = plan.product_tiles(Problem(card, m, p, q, operands))
        jobs, whole = product_jobs(tiles, m, p, q), product_jobs(replace(tiles, splits=1), m, p, q)
        most = whole * min(MOST_SPLITS, q // (4 * tiles.inner))
        # A sum over fewer than 4096 may end before a second launch would have begun.
        assert 2 * jobs >= min(card.multiprocessors, most) or q < 4096, (p, q, m, operands, tiles)


@pytest.mark.parametrize("name", TARGETS)
def test_parts_of_a_sum_stay_in_half_of_l2(name):
    card = TARGETS[name]
    l2 = card_of(card.arch, card.multiprocessors, card.shared_memory).l2
    for (p, q), m, operands in itertools.product(SHAPES, TOKENS, OPERANDS):
        for tiles, out in (
            (plan.product_tiles(Problem(card, m, p, q, operands)), p),
            (plan.backward_tiles(Problem(card, m, p, q, operands), weight_grad=False), q),
        ):
            assert tiles.splits == 1 or tiles.splits * m * out * 4 <= l2 / 2


@pytest.mark.parametrize("name", TARGETS)
def test_no_tile_is_taller_than_its_tokens_need(name):
    for (p, q), operands in itertools.product(SHAPES, OPERANDS):
        heights = [plan.product_tiles(Problem(TARGETS[name], m, p, q, operands)).rows for m in (1, 16, 17, 64, 65, 128)]
        assert heights[0] == heights[1] == min(heights)
        assert max(heights[:4]) <= 64
        assert max(heights) <= 128


@pytest.mark.parametrize("name", TARGETS)
def test_more_tokens_are_never_expected_to_take_less_time(name):
    card = TARGETS[name]
    for (p, q), operands in itertools.product(SHAPES, OPERANDS):
        problems = [Problem(card, m, p, q, operands) for m in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)]
        times = [expected(problem, plan.product_tiles(problem)) for problem in problems]
        # Tiles of 16 tokens read activations more often than tiles of 64: on an H200, 16 tokens take 0.05 % longer than
        # 64.
        assert all(few < 1.001 * more for few, more in itertools.pairwise(times)), (p, q, operands)


def test_a_decoded_token_is_bound_by_memory_on_every_card():
    """With every multiprocessor busy, reading weight and scores once is most of the expected time."""
    for card in TARGETS.values():
        problem = Problem(card, 1, 14336, 4096, Operands(2, 2))
        seconds = expected(problem, plan.product_tiles(problem))
        bandwidth = card_of(card.arch, card.multiprocessors, card.shared_memory, card.bandwidth).bandwidth
        assert 1 < seconds / (14336 * 4096 * 4 / bandwidth) < 1.8, card
