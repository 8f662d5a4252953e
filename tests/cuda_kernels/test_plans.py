"""Launches that the CUDA kernels plan for cards not in this machine: tiles, parts of sums, and the chosen kernel."""

import itertools
from dataclasses import replace

import emulated
import pytest

from mft_kernels.backends.triton.cards import A100, CARDS, H100, H100_PCIE, H200
from mft_kernels.backends.triton.cost import LAUNCH, Jobs, seconds, sum_seconds

HOPPERS = (H100, H100_PCIE, H200)
#: P and Q of a product, from a layer of a model with 135 million parameters to the head of one with 8 billion.
SHAPES = (
    (576, 1536),
    (1536, 576),
    (1024, 4096),
    (4096, 4096),
    (8192, 4096),
    (4096, 14336),
    (14336, 4096),
    (128256, 4096),
)
TOKENS = (1, 16, 64, 65, 128, 256, 512, 1000, 1024, 2048, 4096)
MASKS = ("bf16", "words", "words, transposed")
#: Without packed masks whose rows do not begin at multiples of 16 bytes, which TMA does not read.
CASES = [
    (m, (p, q), mask)
    for m, (p, q), mask in itertools.product(TOKENS, SHAPES, MASKS)
    if mask == "bf16" or (p if mask == "words, transposed" else q) != 576
]


def quotient(a, b):
    return -(-a // b)


NVIDIAS = tuple(card for card in CARDS if isinstance(card.arch, int))


def device_of(card):
    return {
        "capability": card.arch,
        "multiprocessors": card.multiprocessors,
        "shared_bytes": card.shared,
        "l2_bytes": card.l2,
    }


def known(card):
    """Return the card with the rates that tile_cost.h has for its architecture."""
    _, memory, launch, l2 = emulated.rates(card.arch)
    clock = launch / LAUNCH
    return replace(card, clock=clock, bandwidth=memory * card.multiprocessors * clock, l2_rate=l2)


def planned(kernel, card, m, shape, mask):
    p, q = shape
    transposed = mask == "words, transposed"
    of = {name: emulated.Matrix(None, 1, *sizes) for name, sizes in {"out": (m, p, p), "in": (m, q, q)}.items()}
    n, k = (q, p) if transposed else (p, q)
    asked = emulated.Product(out=of["out"], weight=emulated.Matrix(None, 1, n, k, k), transposed=transposed)
    setattr(asked, "in", of["in"])
    if mask == "bf16":
        asked.keep.scores = asked.weight
    else:
        asked.keep.words = 128
    return emulated.plan(kernel, asked, device_of(card))


def operands(m, shape, mask):
    """Return the bytes of the operands."""
    p, q = shape
    return 2 * m * (p + q) + p * q * (4 if mask == "bf16" else 2 + 1 / 8)


def hopper_seconds(card, m, shape, mask, tokens, parts):
    """Return the seconds of product_sm90: clusters of two blocks, 256 features, 64 of Q per step (product_sm90.cuh)."""
    p, q = shape
    weight = 128 * 64 * 2 + {"bf16": 128 * 64 * 2, "words": 128 * 16, "words, transposed": 64 * 16}[mask]
    tile = tokens * 64 * 2
    jobs = Jobs(
        count=quotient(p, 256) * quotient(m, tokens) * parts,
        steps=2 * quotient(quotient(q, 128), parts),
        multiply_adds=128 * tokens * 64,
        read=weight + tile // 2,
        written=(2 if parts == 1 else 4) * 128 * tokens,
    )
    stages = min(8, (227 * 1024 - 2 * 3 * 32 * 128 - 1024) // (weight + tile))
    clusters = replace(card, multiprocessors=max(1, card.multiprocessors // 2))
    busy = {"memory": operands(m, shape, mask), "blocks": 1, "stages": stages, "rate": 2048}
    return seconds(clusters, [jobs], **busy) + sum_seconds(card, parts, m * p)


def ways(card, m, shape):
    """Yield the possible (tokens, parts): no taller than necessary, four steps per part, two waves, half of L2."""
    p, q = shape
    for tokens in (64, 128, 256):
        if tokens > 64 and m <= tokens // 2:
            continue
        tiles, pairs = quotient(p, 256) * quotient(m, tokens), quotient(q, 128)
        most = min(16, q // 256, card.multiprocessors // tiles, card.l2 // 2 // (4 * m * quotient(p, 256) * 256))
        yield from ((tokens, s) for s in range(1, max(1, most) + 1) if quotient(pairs, quotient(pairs, s)) == s)


@pytest.mark.parametrize("multiprocessors", [2, 78, 114, 132, 144])
def test_the_hopper_product_is_cut_by_the_model_of_triton_s(multiprocessors):
    card = replace(H100, multiprocessors=multiprocessors)
    for case in CASES:
        plan = planned("product_sm90", card, *case)
        expected = {way: hopper_seconds(known(card), *case, *way) for way in ways(card, *case[:2])}
        assert plan.cycles == pytest.approx(min(expected.values()) * known(card).clock), case
        assert expected[plan.tokens, plan.parts] == pytest.approx(min(expected.values())), case
        m, (p, _), _ = case
        assert plan.workspace == (plan.parts > 1) * plan.parts * m * quotient(p, 256) * 256 * 4


def test_few_tiles_are_cut_so_that_most_multiprocessors_work():
    """4096 x 4096 on an H100: 16 tiles of up to 256 tokens for 66 clusters; from 1024 tokens on, tiles suffice."""
    of = {m: planned("product_sm90", H100, m, (4096, 4096), "bf16") for m in (1, 64, 128, 256, 512, 1024, 4096)}
    ways = {m: (plan.tokens, plan.parts) for m, plan in of.items()}
    assert ways == {
        1: (64, 4),
        64: (64, 4),
        128: (128, 4),
        256: (256, 4),
        512: (256, 2),
        1024: (256, 1),
        4096: (256, 1),
    }


@pytest.mark.parametrize("card", HOPPERS, ids=lambda card: card.name)
def test_one_card_s_figures_choose_for_every_hopper(card):
    """A choice by an H100's bandwidth and clock loses at most a ninth on a Hopper card with other rates."""
    for case in CASES:
        plan = planned("product_sm90", card, *case)
        best = min(hopper_seconds(card, *case, *way) for way in ways(card, *case[:2]))
        assert hopper_seconds(card, *case, plan.tokens, plan.parts) <= 10 / 9 * best, case


@pytest.mark.parametrize("card", HOPPERS, ids=lambda card: card.name)
def test_hopper_s_own_product_is_expected_to_win_but_for_some_small_weights(card):
    general = [
        case
        for case in CASES
        if (case[0] > 16 or "transposed" in case[2])  # otherwise decode_sm80: test_decode.py
        and planned("product_general", card, *case).cycles < planned("product_sm90", card, *case).cycles
    ]
    assert max(p * q for _, (p, q), _ in general) <= 1024 * 4096
    assert max(m for m, *_ in general) <= 1024
    worst = max(planned("product_sm90", card, *c).cycles / planned("product_general", card, *c).cycles for c in general)
    assert worst < 1.1


# ------------------------------------------------------------------------------------------------- the general product


def general_seconds(card, m, shape, mask, tokens, parts, rate):
    """Return the seconds of product_sm80: tiles of 64 or 128 tokens and 128 features, 32 of Q per step.

    Two blocks share a multiprocessor.
    """
    p, q = shape
    jobs = Jobs(
        count=quotient(p, 128) * quotient(m, tokens) * parts,
        steps=quotient(quotient(q, 32), parts),
        multiply_adds=128 * tokens * 32,
        read=32 * (2 * tokens + 128 * (4 if mask == "bf16" else 2 + 1 / 8)),
        written=(2 if parts == 1 else 4) * 128 * tokens,
    )
    half = card.shared // 2 - 1024
    stages = min(4, (half if half >= 2 * jobs.read else card.shared - 1024) // int(jobs.read))
    launch = seconds(card, [jobs], memory=operands(m, shape, mask), blocks=2, stages=stages, rate=rate)
    return launch + sum_seconds(card, parts, m * p)


def general_ways(card, m, shape):
    """Yield the possible (tokens, parts): no taller than necessary, 256 of Q per part, two waves, half of L2."""
    p, q = shape
    steps, of_l2 = quotient(q, 32), card.l2 // 2 // (4 * m * quotient(p, 128) * 128)
    for tokens in (64, 128)[: 1 + (m > 64)]:
        most = min(16, steps // 8, 4 * card.multiprocessors // (quotient(p, 128) * quotient(m, tokens)), of_l2)
        yield from ((tokens, s) for s in range(1, max(1, most) + 1) if quotient(steps, quotient(steps, s)) == s)


def by_rule_of_thumb(card, m, shape):
    """Return a cut by rule of thumb: parts only for few tokens, two blocks for each multiprocessor."""
    p, q = shape
    steps = quotient(q, 32)
    parts = min(2 * card.multiprocessors // quotient(p, 128), steps // 8, 16) if m <= 64 else 1
    return (64 if m <= 64 else 128), quotient(steps, quotient(steps, parts)) if parts > 1 else 1


@pytest.mark.parametrize("card", NVIDIAS, ids=lambda card: card.name)
def test_the_general_product_is_cut_by_the_model(card):
    rate = emulated.rates(card.arch)[0]
    for case in CASES:
        m, (p, q), _ = case
        plan = planned("product_general", card, *case)
        expected = {way: general_seconds(known(card), *case, *way, rate) for way in general_ways(card, m, (p, q))}
        assert plan.cycles == pytest.approx(min(expected.values()) * known(card).clock), case
        assert expected[plan.tokens, plan.parts] == pytest.approx(min(expected.values())), case
        assert plan.workspace == (plan.parts > 1) * plan.parts * m * quotient(p, 128) * 128 * 4
        assert plan.workspace <= card.l2 // 2
        # The rule of thumb and a single part are among the ways, so neither can be expected to take less.
        assert {by_rule_of_thumb(card, m, (p, q)), (128 if m > 64 else 64, 1)} <= {*expected}, case


def test_the_general_product_s_parts_win_most_behind_64_tokens():
    """4096 x 4096 on an A100: 32 tiles of 128 tokens for 108 multiprocessors."""
    of = {m: planned("product_general", A100, m, (4096, 4096), "bf16") for m in (17, 64, 65, 128, 256, 512, 1024)}
    assert {m: (plan.tokens, plan.parts) for m, plan in of.items()} == {
        17: (64, 3),
        64: (64, 3),
        65: (128, 3),
        128: (128, 3),
        256: (128, 3),
        512: (128, 2),
        1024: (128, 1),
    }
    rate = emulated.rates(80)[0]
    gains = {
        m: general_seconds(known(A100), m, (4096, 4096), "bf16", *by_rule_of_thumb(A100, m, (4096, 4096)), rate)
        / (plan.cycles / known(A100).clock)
        for m, plan in of.items()
    }
    assert min(gains[65], gains[128]) > 1.5
    assert gains[256] > gains[512] > 1.1
    assert max(gains[17], gains[64]) < 1.05


# ----------------------------------------------------------------------------------------------------------- d_scores

#: N and K.
WEIGHTS = ((576, 576), (576, 1536), (1536, 576), (1024, 1024), (1024, 4096), (4096, 4096), (14336, 4096))
MANY = (1, 64, 500, 512, 1000, 1024, 2048, 4096, 8192, 16384, 65536)
GRADS = [*itertools.product(MANY, WEIGHTS)]


def planned_grad(kernel, card, m, shape):
    n, k = shape
    of = {"weight": (n, k, k), "d_scores": (n, k, k), "grad_output": (m, n, n), "x": (m, k, k)}
    asked = emulated.ScoreGrad(**{name: emulated.Matrix(None, 1, *sizes) for name, sizes in of.items()})
    return emulated.plan(kernel, asked, device_of(card))


def grad_seconds(card, m, shape, parts, rate):
    """Return the seconds of score_grad_sm80: tiles of 128 x 128, 32 tokens per step."""
    n, k = shape
    jobs = Jobs(
        count=quotient(n, 128) * quotient(k, 128) * parts,
        steps=quotient(quotient(m, 32), parts),
        multiply_adds=128 * 128 * 32,
        read=2 * 128 * 32 * 2,
        written=128 * 128 * (6 if parts == 1 else 4),
    )
    stages = 4 if card.shared // 2 - 1024 >= 4 * jobs.read else 3
    launch = seconds(card, [jobs], memory=2 * m * (n + k) + 6 * n * k, blocks=2, stages=stages, rate=rate)
    finished = (parts > 1) * 6 * n * k / (card.l2_rate * card.multiprocessors * card.clock)
    return launch + sum_seconds(card, parts, n * k) + finished


def cutlass_seconds(card, m, shape):
    """Return the seconds of score_grad_sm90: clusters of two blocks, tiles of 128 x 256, 64 tokens per step.

    The blocks of a cluster share x by multicast.
    """
    n, k = shape
    jobs = Jobs(
        count=quotient(n, 256) * quotient(k, 256),
        steps=quotient(m, 64),
        multiply_adds=128 * 256 * 64,
        read=2 * 64 * (128 + 256 // 2),
        written=6 * 128 * 256,
    )
    clusters = replace(card, multiprocessors=card.multiprocessors // 2)
    return seconds(clusters, [jobs], memory=2 * m * (n + k) + 6 * n * k, blocks=1, stages=4, rate=2048)


def parts_of_grads(card, m, shape):
    n, k = shape
    tiles, steps = quotient(n, 128) * quotient(k, 128), quotient(m, 32)
    of_l2 = card.l2 // 2 // (4 * n * quotient(k, 128) * 128)
    most = min(16, m // 256, 4 * card.multiprocessors // tiles, of_l2)
    return [s for s in range(1, max(1, most) + 1) if s == 1 or quotient(steps, quotient(steps, s)) == s]


@pytest.mark.parametrize("card", NVIDIAS, ids=lambda card: card.name)
def test_tokens_of_d_scores_are_cut_by_the_model(card):
    rate = emulated.rates(card.arch)[0]
    for case in GRADS:
        plan = planned_grad("score_grad_sm80", card, *case)
        expected = {s: grad_seconds(known(card), *case, s, rate) for s in parts_of_grads(card, *case)}
        assert plan.cycles == pytest.approx(min(expected.values()) * known(card).clock), case
        assert expected[plan.parts] == pytest.approx(min(expected.values())), case
        n, k = case[1]
        assert plan.workspace == (plan.parts > 1) * plan.parts * n * quotient(k, 128) * 128 * 4
        own = planned_grad("score_grad_sm90", card, *case)
        assert own.cycles == pytest.approx(cutlass_seconds(known(card), *case) * known(card).clock), case


def test_few_tiles_of_many_tokens_are_cut_on_every_card():
    for card in NVIDIAS:
        parts = {case: planned_grad("score_grad_sm80", card, *case).parts for case in GRADS}
        assert parts[16384, (576, 576)] >= 4
        assert parts[16384, (576, 1536)] >= 2
        # Few tokens, or more tiles than there is room for with two blocks each.
        assert {parts[m, shape] for m, shape in GRADS if m < 512 or shape[0] * shape[1] >= 4096**2} == {1}


@pytest.mark.parametrize("card", HOPPERS, ids=lambda card: card.name)
def test_on_hopper_the_general_d_scores_serves_small_weights(card):
    """For 576 x 1536 on 132 multiprocessors, CUTLASS's kernel has 36 blocks; the general one has 60 tiles and parts."""
    for case in GRADS:
        general, own = (planned_grad(f"score_grad_{arch}", card, *case).cycles for arch in ("sm80", "sm90"))
        small = case[1][0] * case[1][1] <= 1024**2
        assert own > general if small else case[0] < 500 or own < general, case
    case = (8192, (576, 1536))
    general, own = (planned_grad(f"score_grad_{arch}", card, *case) for arch in ("sm80", "sm90"))
    assert own.cycles / general.cycles > 1.3
    assert general.parts > 1


def test_an_h100_s_l2_gives_what_a_plain_gemm_of_790_tflops_needs():
    """Tiles of 128 x 256 and 64 of K per step; the two blocks of a cluster share the 256."""
    step_flops, step_bytes = 2 * 128 * 256 * 64, 2 * 64 * (128 + 256 // 2)
    needed = 790e12 / step_flops * step_bytes
    assert emulated.rates(90)[3] * H100.multiprocessors * H100.clock == pytest.approx(needed, rel=0.01)


def test_what_is_known_of_an_architecture_is_what_is_published_of_its_cards():
    for card in NVIDIAS:
        multiply_adds, memory, launch, l2 = emulated.rates(card.arch)
        assert multiply_adds == card.multiply_adds * {90: 1 / 2, 100: 1 / 4}.get(card.arch, 1)
        assert memory == pytest.approx(card.bandwidth / card.clock / card.multiprocessors, rel=0.3), card.name
        assert launch == pytest.approx(LAUNCH * card.clock, rel=0.15), card.name
        assert l2 == (25.6 if card.arch == 90 else card.l2_rate)
