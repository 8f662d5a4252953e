"""mft_kernels/layers/stateless.py: a module that takes over one of these forwards computes as with its own."""

import copy
import inspect
from types import MethodType

import pytest
import torch
from torch import nn

from mft_kernels import MaskedLinear
from mft_kernels.layers import stateless as layers
from mft_kernels.testing import integer_inputs


def taken_over(module: nn.Module) -> nn.Module:
    """Replace the module's forward as kernelize does."""
    module.forward = MethodType(layers.MaskedLinear.forward, module)
    return module


def masked(dtype=torch.float32, **selection) -> MaskedLinear:
    """Return a layer of small integers, 37 to 8, so that sums are exact."""
    t = integer_inputs(6, 8, 37, dtype)
    layer = MaskedLinear(37, 8, dtype=dtype, **selection)
    with torch.no_grad():
        for name in ("weight", "scores", "bias"):
            getattr(layer, name).copy_(getattr(t, name))
    return layer


def run(layer: nn.Module) -> list[torch.Tensor]:
    """Return the output, and the gradients of x and of the trained parameters."""
    x = integer_inputs(6, 8, 37, layer.weight.dtype).x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def assert_same(got, expected):
    assert len(got) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_layer_is_a_forward_and_no_state():
    """The Kernel Hub requires this of a layer; its words are in docs/how-to/kernel-hub.md."""
    found = [c for _, c in inspect.getmembers(layers, inspect.isclass) if c.__module__ == layers.__name__]
    assert found == [layers.MaskedLinear]
    for layer in found:
        assert issubclass(layer, nn.Module)
        assert layer.__init__ is nn.Module.__init__
        members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
        assert members <= {"can_torch_compile", "has_backward"}
        assert [*inspect.signature(layer.forward).parameters] == ["self", "x"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "selection", [{"keep_ratio": 0.5}, {"threshold": 2.0}, {"keep_ratio": 0.5, "mode": "value"}], ids=str
)
def test_output_and_gradients_are_the_layers_own(selection, dtype):
    layer = masked(dtype, **selection)
    assert_same(run(taken_over(copy.deepcopy(layer))), run(layer))


def test_a_held_mask_is_what_is_computed_with():
    layer = masked(keep_ratio=0.5)
    packed = layer.packed_mask()
    layer.scores.data.zero_()  # which keeps every weight
    outputs = []
    for one in (layer, taken_over(copy.deepcopy(layer))):
        buffer = torch.zeros_like(one.scores)
        one.hold(packed, buffer)
        outputs.append([*run(one)[:2], buffer])
        assert buffer.count_nonzero() > 0, "what the scores would get is added there"
        one.release()
        assert not torch.equal(run(one)[0], outputs[-1][0])
    assert all(torch.equal(a, b) for a, b in zip(*outputs))


def test_a_module_of_ones_own_needs_the_annotated_members_alone():
    class Own(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            self.bias = None
            self.scores = nn.Parameter(layer.scores.detach().clone())
            self.keep_ratio, self.threshold, self.mode = layer.keep_ratio, layer.threshold, layer.mode

    layer = masked(keep_ratio=0.5)
    layer.bias = None
    assert_same(run(taken_over(Own(layer))), run(layer))


def test_it_compiles_in_one_graph():
    layer = masked(keep_ratio=0.5)
    compiled = torch.compile(taken_over(copy.deepcopy(layer)), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled), run(layer))
