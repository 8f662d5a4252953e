"""The cost model that chooses tiles: mistakes of earlier tables, and sanity checks over cards and shapes."""

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


def cuda_jobs(m, tokens, n=4096, k=4096):
    """Return the jobs of the CUDA kernel for sm_90 with bf16 scores.

    Its clusters have two blocks; each step takes 256 features and 64 of K.
    """
    return Jobs(
        count=math.ceil(n / 256) * math.ceil(m / tokens),
        steps=k // 64,
        multiply_adds=128 * tokens * 64,
        read=64 * 2 * (2 * 128 + tokens // 2),  # weight and scores, and half of the tokens
        written=2 * 128 * tokens,
    )


def cuda_cycles(m, tokens, l2_rate=L2_RATE):
    stages = {64: 5, 128: 4, 256: 3}[tokens]
    return busy_cycles([cuda_jobs(m, tokens)], 132 // 2, blocks=1, stages=stages, rate=2048, l2_rate=l2_rate)


# ----------------------------------------------------------------------------------------------- what the review found


def test_on_132_multiprocessors_64_token_tiles_lose_1_8_times_at_512_tokens():
    assert cuda_jobs(512, 128).count == 64  # two fewer than the 66 clusters
    assert cuda_jobs(512, 64).count == 128  # two waves; each reads the weight as often as 128-token tiles do
    assert cuda_cycles(512, 64) / cuda_cycles(512, 128) == pytest.approx(1.8, abs=0.05)


def test_on_132_multiprocessors_128_token_tiles_lose_1_7_times_at_1024_tokens():
    assert (cuda_jobs(1024, 256).count, cuda_jobs(1024, 128).count) == (64, 128)
    assert cuda_cycles(1024, 128) / cuda_cycles(1024, 256) == pytest.approx(1.7, abs=0.05)


@pytest.mark.parametrize("bytes_a_cycle", [24, 32, 48])
def test_the_losses_do_not_hang_on_what_l2_gives_exactly(bytes_a_cycle):
    at = {"l2_rate": bytes_a_cycle}
    assert cuda_cycles(512, 64, **at) / cuda_cycles(512, 128, **at) == pytest.approx(1.8, abs=0.05)
    assert cuda_cycles(1024, 128, **at) / cuda_cycles(1024, 256, **at) == pytest.approx(1.7, abs=0.05)


def test_on_132_multiprocessors_1024_tokens_take_one_wave_of_256():
    chosen = plan.product_tiles(Problem(target.H100, 1024, 4096, 4096, Operands(2, 2)))
    assert (chosen.rows, chosen.splits) == (256, 1)
    assert math.ceil(1024 / 256) * math.ceil(4096 / 128) == 128  # fits 132 in one wave; 128 rows would need two


def test_d_scores_of_1024_x_4096_take_one_wave_of_128_x_256():
    for m in TOKENS[2:]:
        assert plan.outer_tiles(Problem(target.H100, m, 1024, 4096, Operands(2))).columns == 256
    assert math.ceil(1024 / 128) * math.ceil(4096 / 256) == 128  # fits 132 in one wave; 128 x 128 would need two


# ----------------------------------------------------------------------------------------------------------- the model


def test_one_job_more_than_places_costs_a_wave():
    def cycles(count, blocks=1):
        return busy_cycles([Jobs(count, 10, 1e6, 1000, 0)], 100, blocks=blocks, stages=4, rate=1000)

    assert cycles(1) == cycles(100) == cycles(101) / 2 == 10 * 1000 + 2 * LATENCY
    assert cycles(201, blocks=2) == 3 * 10 * 1000 + 2 * 2 * LATENCY  # two waves, the second with one job


def test_two_blocks_hide_each_other_s_latencies():
    jobs = [Jobs(200, 10, 1e6, 1000, 0)]
    one, two = (busy_cycles(jobs, 100, blocks=blocks, stages=4, rate=1000) for blocks in (1, 2))
    assert one - two == 2 * LATENCY


def test_a_warp_alone_masks_at_half_the_rate_of_two():
    def cycles(warps, blocks):
        jobs = [Jobs(100 * blocks, 10, 1, 1000, 0, masked=2**16, warps=warps)]
        return (busy_cycles(jobs, 100, blocks=blocks, stages=4, rate=1000) - 2 * LATENCY) / blocks

    assert cycles(4, 1) == 2 * cycles(8, 1) == 2 * cycles(4, 2) == 10 * MASKING * 2**16 / 2
    assert cycles(8, 1) == cycles(16, 1) == cycles(4, 3)  # each of four schedulers issues an instruction


def test_few_bytes_under_way_leave_l2_waiting():
    def cycles(stages, blocks=1):
        jobs = [Jobs(100 * blocks, 1, 0, 9000, 0)]
        return (busy_cycles(jobs, 100, blocks=blocks, stages=stages, rate=1) - 2 * LATENCY) / blocks

    assert cycles(2) == 9000 / (9000 / LATENCY)
    assert cycles(3) == cycles(2, blocks=2) == cycles(2) / 2
    assert cycles(9) == 9000 / L2_RATE


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


def test_a_step_reads_activations_weight_and_mask_and_a_job_writes_its_tile():
    tiles = plan.Tiles(64, 128, 32, 8, 4)
    problem = Problem(target.H100, 4096, 4096, 4096, Operands(2, 2))
    read = {keep: plan._products(problem._replace(operands=Operands(2, keep)), tiles).read for keep in (0, 2, 4)}
    assert read == {0: 32 * (64 * 2 + 128 * 2.125), 2: 32 * (64 * 2 + 128 * 4), 4: 32 * (64 * 2 + 128 * 6)}
    assert plan._products(problem._replace(m=1), tiles).read == 32 * (1 * 2 + 128 * 4)
    split = plan._products(problem, replace(tiles, splits=3))
    assert (split.count, split.steps, split.written) == (64 * 32 * 3, 43, 64 * 128 * 4)
    outer = plan._outer(Problem(target.H100, 100, 1024, 4096, Operands(2)), plan.Tiles(128, 256, 64, 8, 3))
    assert outer == Jobs(8 * 16, 2, 128 * 256 * 64, 64 * (128 + 256) * 2, 128 * 256 * 6)


def test_the_sum_of_the_parts_is_counted(monkeypatch):
    choose = plan.product_tiles.__wrapped__  # without its cache
    assert choose(Problem(target.H100, 1, 1024, 4096, Operands(2, 2))).splits > 1
    monkeypatch.setattr(plan, "sum_seconds", lambda card, parts, elements: float(parts > 1))
    assert choose(Problem(target.H100, 1, 1024, 4096, Operands(2, 2))).splits == 1


def test_tf32_has_half_the_rate_and_ordinary_cores_little(monkeypatch):
    rates = []
    monkeypatch.setattr(plan, "seconds", lambda *args, rate, **others: rates.append(rate) or 0.0)
    for operands in (Operands(2), Operands(4), Operands(4, exact=True)):
        plan.outer_tiles.__wrapped__(Problem(target.H100, 64, 64, 64, operands))
    assert sorted(set(rates)) == [64, 1024, 2048]


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
