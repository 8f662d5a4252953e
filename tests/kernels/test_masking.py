"""One selection for each change of the scores, and never a stale mask."""

import ctypes

import pytest
import torch
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from mft_kernels import MaskedLinear
from mft_kernels.mask import masking
from mft_kernels.testing import random_inputs


@pytest.fixture
def selections(monkeypatch):
    """Return the list of shapes selected from so far. A list of the scores would keep them alive."""
    made = []
    select = masking.select_mask

    def counted(*args, **kwargs):
        made.append(args[0].shape)
        return select(*args, **kwargs)

    monkeypatch.setattr(masking, "select_mask", counted)
    return made


def test_sixteen_micro_batches_and_their_step_make_one_selection_a_matrix(selections):
    layers = torch.nn.Sequential(MaskedLinear(8, 8), torch.nn.ReLU(), MaskedLinear(8, 8))
    optimizer = torch.optim.AdamW([layers[0].scores, layers[2].scores], lr=1e-3)
    for _ in range(3):
        for _ in range(16):
            layers(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(selections) == 3 * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: checkpoint(layer, x, use_reentrant=True),
        lambda layer, x: checkpoint(layer, x, use_reentrant=False),
        *(
            lambda layer, x, seen_by=seen_by: call_within(seen_by(), layer, x)
            for seen_by in (
                lambda: torch.autocast("cpu", torch.bfloat16),
                lambda: torch.device("cpu"),
                lambda: profile(acc_events=True),
            )
        ),
    ],
    ids=["reentrant checkpoint", "checkpoint", "autocast", "function mode", "profiler"],
)
def test_a_call_that_is_repeated_or_that_others_see_makes_no_further_selection(selections, call):
    layer, x = MaskedLinear(8, 8), torch.randn(4, 8, requires_grad=True)
    for _ in range(3):
        call(layer, x).square().mean().backward()
    assert len(selections) == 1


def call_within(context, layer, x):
    with context:
        return layer(x)


def test_a_graph_remembers_no_mask_and_uses_one_that_is_remembered(selections):
    torch._dynamo.reset()
    layer = MaskedLinear(8, 8, keep_ratio=0.9)
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.AdamW([layer.scores], lr=0.1)
    x = torch.randn(4, 8)

    def selected_in_two_passes():
        selections.clear()
        for _ in range(2):
            compiled(x).square().mean().backward()
        return len(selections)

    assert selected_in_two_passes() == 4
    assert layer.scores.memo is None
    layer(x)
    assert selected_in_two_passes() == 0
    optimizer.step()
    assert selected_in_two_passes() == 4
    assert torch.equal(layer(x), compiled(x))


def test_the_backward_pass_of_an_op_that_a_graph_calls_uses_the_mask_of_its_forward_pass():
    layer = MaskedLinear(8, 8, bias=False, keep_ratio=0.5, init="normal")
    x = torch.randn(4, 8, requires_grad=True)
    layer(x)  # it remembers a mask
    with torch.no_grad():
        layer.scores.copy_(layer.scores.flip(1))
    y = torch.ops.mft.masked_linear_by_ratio(
        x, layer.weight, layer.scores, None, 0.5, None, "magnitude", "matrix", "auto"
    )
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 8) @ layer.merge().weight)


@torch.no_grad()
def test_an_optimiser_that_writes_behind_the_version_is_seen():
    class RawWriter(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                ctypes.memset(p.data_ptr() + 4 * 256, 0, 4 * 128)  # rows that are not in the sample

    layer = MaskedLinear(128, 64, bias=False, keep_ratio=0.5, init="normal")
    x = torch.eye(128)
    assert (layer(x)[:, 2] != 0).any()
    RawWriter([layer.scores]).step()
    assert (layer(x)[:, 2] == 0).all()


def test_keep_ratio_threshold_and_mode_may_change_at_any_time():
    layer = MaskedLinear(10, 10, keep_ratio=0.9, init="normal")
    assert layer.mask().sum() == 91  # 100 - int((1 - 0.9) * 100), which is 100 - 9 in binary fractions
    layer.keep_ratio = 0.5
    assert layer.mask().sum() == 50
    layer.threshold = 0.0
    assert layer.mask().all()
    layer.mode = "value"
    assert torch.equal(layer.mask(), layer.scores >= 0)


def test_scores_made_in_inference_mode_are_never_stale():
    with torch.inference_mode():
        layer = MaskedLinear(8, 8, keep_ratio=0.5)
        before = layer.mask()
        layer.scores.copy_(layer.scores.flip(1))
        assert torch.equal(layer.mask(), before.flip(1))


@pytest.mark.parametrize("mode", ["magnitude", "value"])
def test_gradients_equal_those_of_the_stateless_op_also_for_a_score_of_zero(mode):
    import mft_kernels

    t = random_inputs(6, 5, 37)
    t.scores[0, :5] = 0
    threshold = mft_kernels.kept_threshold(t.scores, 0.8, mode=mode)
    grads = []
    for by_ratio in (True, False):
        leaves = [v.clone().requires_grad_() for v in (t.x, t.weight, t.scores, t.bias)]
        x, weight, scores, bias = leaves
        if by_ratio:
            y = mft_kernels.masked_linear_by_ratio(x, weight, scores, bias, keep_ratio=0.8, mode=mode)
        else:
            y = mft_kernels.masked_linear(x, weight, scores, threshold, bias, mode=mode)
        y.backward(t.grad_output)
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if mode == "magnitude":
        assert not grads[0][2][0, :5].any()


def test_a_captured_graph_holds_the_selection_and_asks_the_host_nothing(selections, monkeypatch):
    scores = torch.tensor([[3.0, 1], [2, 4]])
    monkeypatch.setattr(masking, "_is_capturing", lambda _: True)
    for values in ([[3.0, 1], [2, 4]], [[1.0, 3], [4, 2]]):
        scores.data = torch.tensor(values)
        mask = masking.current_mask(scores, 0.5, None, "magnitude")
        assert mask.threshold.item() == 3
        assert mask.signs is None  # the host does not know whether a score is 0
    assert len(selections) == 2
    assert masking.current_mask(scores, 0.5, 2.0, "magnitude").threshold.item() == 2
    scores.data = torch.tensor([[torch.nan, 1], [2, 4]])
    assert not masking.current_mask(scores, 0.5, None, "magnitude").packed.any()
