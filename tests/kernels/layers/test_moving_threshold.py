"""A threshold that changes: read as a number, and an input of the graph under torch.compile."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mft_kernels import MaskedGroupedLinear, MaskedLinear

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([2, 6], dtype=torch.int32)
CUTS = (0.01, 0.02, 0.03)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def matrix(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedLinear(8, 16, **options)


def experts(**options):
    weight = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    layer = MaskedGroupedLinear(weight, torch.ones(2, 16), **options)
    forward = layer.forward
    layer.forward = lambda x: forward(x, OFFSETS)
    return layer


def result(forward, layer):
    layer.zero_grad()
    y = forward(X)
    y.square().sum().backward()
    return y.detach(), layer.scores.grad


CASES = [(matrix, {}), (matrix, {"mode": "value"}), (matrix, {"scores_dtype": torch.bfloat16}), (experts, {})]


@pytest.mark.parametrize(("make", "options"), CASES, ids=["matrix", "value", "bf16 scores", "experts"])
def test_a_moved_threshold_is_read_by_the_graph_that_there_is(make, options):
    layer = make(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for cut in CUTS:
        layer.move_threshold(cut)
        assert layer.threshold == cut
        for ours, theirs in zip(result(compiled, layer), result(layer, layer)):
            torch.testing.assert_close(ours, theirs)
        assert not layer.mask().all()
    assert counter.frame_count == 1


def test_a_threshold_that_is_set_again_stays_and_finds_scores_that_are_not_finite():
    layer = matrix()
    compiled = torch.compile(layer, backend="aot_eager")
    layer.move_threshold(0.03)
    compiled(X)
    layer.threshold = 0.01
    torch.testing.assert_close(compiled(X), layer(X))
    layer.scores.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
        compiled(X)


def test_int16_scores_are_selected_by_their_codes():
    layer = matrix(scores_dtype=torch.int16)
    compiled = torch.compile(layer, backend="aot_eager")
    for cut in CUTS:
        layer.move_threshold(cut)
        torch.testing.assert_close(compiled(X), layer(X))


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.bfloat16().float()]
)
def test_a_copy_and_a_cast_keep_it(change):
    layer = matrix()
    layer.move_threshold(0.0123456789)
    layer = change(layer)
    assert layer.threshold == 0.0123456789
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(X), layer(X))
    assert list(layer.state_dict()) == ["weight", "bias", "scores", "_extra_state"]


def test_a_layer_pickled_by_an_earlier_version_has_its_threshold():
    layer = matrix()
    state = layer.__dict__ | {"threshold": 0.25}
    del state["_threshold"], state["_moving_threshold"]
    older = MaskedLinear.__new__(MaskedLinear)
    older.__setstate__(state)
    assert older.threshold == 0.25
    assert torch.equal(older(X), torch.nn.functional.linear(X, older.merged_weight(), older.bias))


def test_an_exported_layer_has_the_threshold_of_its_export():
    layer = matrix()
    layer.move_threshold(0.02)
    expected = layer(X)
    for strict in (False, True):
        exported = torch.export.export(layer, (X,), strict=strict).module()
        layer.move_threshold(0.03)
        torch.testing.assert_close(exported(X), expected)
        layer.move_threshold(0.02)
