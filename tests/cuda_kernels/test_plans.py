"""Launches that the CUDA kernels plan for cards not in this machine: tiles, parts of sums, and the chosen kernel."""

import itertools

import emulated
import pytest

from mft_kernels.backends.triton.cards import A100, CARDS, H100, H100_PCIE, H200
from mft_kernels.backends.triton.cost import LAUNCH

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
TOKENS = (1, 16, 64, 65, 128, 512, 1000, 4096)
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


def test_the_general_product_is_cut_for_few_tokens_and_parts_fit_into_half_of_l2():
    """4096 x 4096 on an A100: 32 tiles of 128 tokens for 108 multiprocessors."""
    of = {m: planned("product_general", A100, m, (4096, 4096), "bf16") for m in (17, 64, 65, 128, 256, 512, 1024)}
    assert {m: (plan.tokens, plan.parts) for m, plan in of.items()} == {
        **dict.fromkeys((17, 64), (64, 3)),
        **dict.fromkeys((65, 128, 256), (128, 3)),
        512: (128, 2),
        1024: (128, 1),
    }
    for card, case in itertools.product(NVIDIAS, CASES):
        m, (p, _), _ = case
        plan = planned("product_general", card, *case)
        assert plan.workspace == (plan.parts > 1) * plan.parts * m * quotient(p, 128) * 128 * 4, (card.name, case)
        assert plan.workspace <= card.l2 // 2, (card.name, case)


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


def test_few_tiles_of_many_tokens_are_cut_on_every_card():
    for card in NVIDIAS:
        plans = {case: planned_grad("score_grad_sm80", card, *case) for case in GRADS}
        assert plans[16384, (576, 576)].parts >= 4
        assert plans[16384, (576, 1536)].parts >= 2
        # Few tokens, or more tiles than there is room for with two blocks each.
        assert {plans[m, shape].parts for m, shape in GRADS if m < 512 or shape[0] * shape[1] >= 4096**2} == {1}
        for (_, (n, k)), plan in plans.items():
            assert plan.workspace == (plan.parts > 1) * plan.parts * n * quotient(k, 128) * 128 * 4


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
