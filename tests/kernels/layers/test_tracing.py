"""make_fx traces masked layers as it traces nn.Linear, and the traced graph follows the scores."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mft_kernels import MaskedGroupedLinear, MaskedLinear, MaskedMultiheadAttention
from mft_kernels.testing import integer_inputs

X = torch.arange(24.0).view(4, 6) - 12


def model() -> nn.Sequential:
    t = integer_inputs(4, 5, 6)
    layer = MaskedLinear(6, 5, keep_ratio=0.5)
    with torch.no_grad():
        for name in ("weight", "scores", "bias"):
            getattr(layer, name).copy_(getattr(t, name))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 3))


def forward(model: nn.Module, _, x: Tensor) -> tuple[Tensor, ...]:
    return (model(x),)


def without_gradients(model: nn.Module, _, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (model(x),)


def functional(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return (functional_call(model, parameters, (x,)),)


def backward(model: nn.Module, _, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])


def functional_backward(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    y = functional_call(model, parameters, (x,))
    return torch.autograd.grad(y.square().sum(), [p for p in parameters.values() if p.requires_grad])


def assert_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def ops_of(traced: GraphModule) -> set[str]:
    return {str(node.target).split(".")[1] for node in traced.graph.nodes if str(node.target).startswith("mft.")}


@pytest.mark.parametrize("call", [forward, without_gradients, backward])
@pytest.mark.parametrize(("pre_dispatch", "remembered"), [(False, True), (True, False)])
def test_a_module_is_traced_and_the_graph_follows_its_scores(call, remembered, pre_dispatch):
    """In the modes "fake" and "symbolic", make_fx needs parameters as arguments, for nn.Linear too."""
    module = model()
    if pre_dispatch and call is backward:
        module = module[:1]  # with a traced nn.ReLU, torch 2.13 keeps the activations in such a graph
    if remembered:
        module(X)  # makes the mask that later forwards use
    traced = make_fx(lambda x: call(module, None, x), pre_dispatch=pre_dispatch)(X)
    assert "masked_linear_by_ratio" in ops_of(traced)
    assert_equal(traced(X), call(module, None, X))
    with torch.no_grad():
        module[0].scores.copy_(module[0].scores.flip(0))
    assert_equal(traced(X), call(module, None, X))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("call", [functional, functional_backward])
@pytest.mark.parametrize(("plain", "remembered"), [(False, True), (True, False)])
def test_a_functional_call_is_traced_and_takes_other_parameters(call, plain, remembered, tracing_mode):
    module, other = model(), model()
    if remembered:
        module(X)
    with torch.no_grad():
        other[0].scores.copy_(other[0].scores.flip(0))
    first, second = (
        {k: p.detach().requires_grad_(p.requires_grad) if plain else p for k, p in m.named_parameters()}
        for m in (module, other)
    )
    traced = make_fx(lambda parameters, x: call(module, parameters, x), tracing_mode=tracing_mode)(first, X)
    assert "masked_linear_by_ratio" in ops_of(traced)
    assert_equal(traced(first, X), call(module, first, X))
    assert_equal(traced(second, X), call(module, second, X))


def test_a_symbolic_trace_takes_another_number_of_tokens():
    module = model()
    parameters = dict(module.named_parameters())
    traced = make_fx(lambda p, x: functional_backward(module, p, x), tracing_mode="symbolic")(parameters, X)
    longer = torch.cat([X, X + 1, X - 1])
    assert_equal(traced(parameters, longer), functional_backward(module, parameters, longer))


def experts() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = MaskedGroupedLinear(integer_inputs(4, 10, 6).weight.view(2, 5, 6), keep_ratio=0.5)
    return layer, (X, torch.tensor([1, 4], dtype=torch.int32))


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = MaskedMultiheadAttention.from_attention(nn.MultiheadAttention(6, 2, batch_first=True))
    layer.out_proj = MaskedLinear.from_linear(layer.out_proj, keep_ratio=0.5)
    x = X[None]
    return layer, (x, x, x)


@pytest.mark.parametrize("made", [experts, attention])
def test_experts_and_attention_are_traced_with_a_backward_pass(made):
    layer, arguments = made()

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        y = layer(*arguments)
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])

    traced = make_fx(call)(*arguments)
    for _ in range(2):
        assert_equal(traced(*arguments), call(*arguments))
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("scores"):
                    parameter.copy_(parameter.flip(0))
