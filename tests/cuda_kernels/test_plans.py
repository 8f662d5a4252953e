"""Launches that the CUDA kernels plan for cards not in this machine: tiles, parts of sums, and the chosen kernel."""

import itertools

import emulated
import pytest

from mft_kernels.backends.triton.cards import A100, CARDS, H100, H100_PCIE, H200
from mft_kernels.backends.triton.cost import LAUNCH


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


# ------------------------------------------------------------------------------------------------- the general product


#: Tokens, and P and Q of a product: from a layer of a model with 135 million parameters to one with 8 billion.
CASES = [*itertools.product((1, 64, 65, 512, 1000, 4096), ((576, 1536), (1536, 576), (4096, 4096), (4096, 14336)))]


def test_the_general_product_is_cut_for_few_tokens_and_parts_fit_into_half_of_l2():
    """4096 x 4096 on an A100: 32 tiles of 128 tokens for 108 multiprocessors."""
    of = {m: planned("product_general", A100, m, (4096, 4096), "bf16") for m in (17, 64, 65, 128, 256, 512, 1024)}
    assert {m: (plan.tokens, plan.parts) for m, plan in of.items()} == {
        **dict.fromkeys((17, 64), (64, 3)),
        **dict.fromkeys((65, 128, 256), (128, 3)),
        512: (128, 2),
        1024: (128, 1),
    }
    for card, (m, shape), mask in itertools.product(NVIDIAS, CASES, ("bf16", "words", "words, transposed")):
        plan = planned("product_general", card, m, shape, mask)
        assert plan.workspace == (plan.parts > 1) * plan.parts * m * quotient(shape[0], 128) * 128 * 4, (card.name, m)
        assert plan.workspace <= card.l2 // 2, (card.name, m, shape, mask)


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


@pytest.mark.parametrize("card", [H100, H100_PCIE, H200], ids=lambda card: card.name)
def test_on_hopper_its_own_kernels_serve_large_weights_and_the_general_d_scores_small_ones(card):
    for m, shape in itertools.product((500, 1000, 4096), ((4096, 4096), (14336, 4096), (576, 576), (1024, 1024))):
        general, own = (planned_grad(f"score_grad_{arch}", card, m, shape).cycles for arch in ("sm80", "sm90"))
        assert (general < own) == (shape[0] <= 1024), (m, shape)
        general, own = (planned(f"product_{arch}", card, m, shape, "bf16").cycles for arch in ("general", "sm90"))
        assert own < general or shape[0] <= 1024, (m, shape)


def test_what_is_known_of_an_architecture_is_what_is_published_of_its_cards():
    for card in NVIDIAS:
        multiply_adds, memory, launch, l2 = emulated.rates(card.arch)
        assert multiply_adds == card.multiply_adds * {90: 1 / 2, 100: 1 / 4}.get(card.arch, 1)
        assert memory == pytest.approx(card.bandwidth / card.clock / card.multiprocessors, rel=0.3), card.name
        assert launch == pytest.approx(LAUNCH * card.clock, rel=0.15), card.name
        assert l2 == card.l2_rate
