"""The competitors of a layer and of a matrix compute what ours computes, and nothing beyond the request."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layer_competitors import (
    DENSE,
    EAGER,
    FROM_SCORES,
    HELD,
    IN_PLACE,
    LORA,
    MODULE,
    PAPER,
    LayerCompetitors,
    inputs_of,
)
from benchmarks.matrix_competitors import eager_pack, eager_step
from mft_kernels import kept_threshold, pack_mask, score_step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["d_x", "d_scores", "step"])
@pytest.mark.parametrize("name", [DENSE, IN_PLACE, FROM_SCORES, MODULE, HELD, EAGER, PAPER, LORA])
def test_every_competitor_makes_the_gradients_that_are_asked(name, op, dtype):
    n, k, m = 24, 40, 3
    found = LayerCompetitors(n, k, dtype).call(name, op, inputs_of(m, n, k, dtype))()
    learned = {HELD: [], LORA: [(16, k), (n, 16)]}.get(name, [(n, k)])
    wanted = {"d_x": [(m, k)], "d_scores": learned, "step": [(m, k), *learned]}[op]
    assert [tuple(grad.shape) for grad in found or []] == wanted
    assert all(grad.dtype in (dtype, torch.float32) for grad in found or [])


@pytest.mark.parametrize(("op", "products"), [("d_x", 1), ("d_scores", 1), ("step", 3)])
def test_the_eager_form_does_no_product_that_nobody_asks_for(op, products):
    call = LayerCompetitors(24, 40).call(EAGER, op, inputs_of(3, 24, 40))
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == products * 2 * 3 * 24 * 40


def test_the_formulations_from_scores_agree():
    n, k = 24, 64
    made, inputs = LayerCompetitors(n, k), inputs_of(5, n, k)
    results = {name: made.call(name, "step", inputs)() for name in (FROM_SCORES, EAGER, PAPER)}
    for name in (EAGER, PAPER):
        for ours, theirs in zip(results[FROM_SCORES], results[name]):
            # The paper's layer multiplies by the gradient of |scores|, ours by the sign; bf16 sums differ in order.
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    held = made.call(HELD, "forward", inputs)()
    torch.testing.assert_close(held, made.call(FROM_SCORES, "forward", inputs)(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(held, made.call(IN_PLACE, "forward", inputs)(), rtol=0.02, atol=0.02)


def test_the_eager_packing_is_the_packed_mask():
    scores = torch.randn(6, 96).bfloat16()
    threshold = kept_threshold(scores, 0.9)
    assert torch.equal(eager_pack(scores, threshold), pack_mask(scores, threshold))


def test_the_eager_optimiser_step_is_ours_late_in_a_run():
    torch.manual_seed(0)
    grad, weight = torch.randn(4, 32), torch.randn(4, 32)
    start = [0.02 * torch.randn(4, 32), 0.1 * torch.randn(4, 32), 0.1 + torch.rand(4, 32)]
    ours, theirs = ([tensor.clone() for tensor in start] for _ in range(2))
    score_step(ours[0], grad, weight, ours[1], ours[2], step=100_000, lr=3e-4)
    eager_step(*theirs, grad, weight)
    torch.testing.assert_close(ours, theirs)
