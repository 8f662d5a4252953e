"""Calls that only their kernel has to see skip the dispatcher; if anything else has to see a call, it still does."""

from typing import ClassVar

import pytest
import torch
from by_name import oracle
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, _check_for_subclass_arg
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import mft_kernels
from mft_kernels import MaskedLinear
from mft_kernels.mask.held import masked_linear_held
from mft_kernels.ops.route import is_seen_by_others
from mft_kernels.testing import integer_inputs

OPS = ("masked_linear", "masked_linear_packed", "masked_linear_by_ratio")
BACKWARD = ("masked_linear_backward", "masked_linear_packed_backward", "masked_linear_by_ratio_backward")


@pytest.fixture
def dispatched(monkeypatch):
    """Return the list of ops that are called through the dispatcher, in order."""
    seen = []

    class Watched:
        def __init__(self, op):
            self.op = op

        def __call__(self, *arguments):
            seen.append(self.op.__name__)
            return self.op(*arguments)

        def __getattr__(self, name):
            return getattr(self.op, name)

    for name in (*OPS, *BACKWARD, "accumulate_score_grad"):
        monkeypatch.setattr(torch.ops.mft, name, Watched(getattr(torch.ops.mft, name)))
    return seen


class Layer:
    """One masked product in every way to ask for it."""

    def __init__(self):
        t = integer_inputs(6, 5, 37)
        self.x, self.weight, self.scores, self.bias = t.x, t.weight, t.scores, t.bias
        self.threshold = torch.tensor(2.0)
        self.packed = mft_kernels.pack_mask(t.scores, self.threshold)
        self.module = MaskedLinear(37, 5, threshold=2.0)
        with torch.no_grad():
            for name in ("weight", "scores", "bias"):
                getattr(self.module, name).copy_(getattr(t, name))
        self.module.requires_grad_(False)
        self.expected = oracle.masked_linear(t.x, t.weight, t.scores, self.threshold, t.bias, "magnitude")

        self.ways = (
            (OPS[0], lambda x: mft_kernels.masked_linear(x, self.weight, self.scores, self.threshold, self.bias)),
            (OPS[1], lambda x: mft_kernels.masked_linear_packed(x, self.weight, self.packed, self.bias)),
            (OPS[1], lambda x: masked_linear_held(x, self.weight, self.packed, self.bias)),
            (OPS[2], self.module),
        )


@pytest.fixture
def layer():
    return Layer()


class SeeingDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class SeeingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass whose results are of the subclass too."""


class Wrapped(torch.Tensor):
    """A subclass that sees the ops."""

    seen: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        plain = [a.inner if isinstance(a, Wrapped) else a for a in args]
        return return_and_correct_aliasing(func, args, kwargs or {}, func(*plain, **(kwargs or {})))


# ---------------------------------------------------------------------------------------------- direct


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_that_nothing_else_has_to_see_is_direct(context, layer, dispatched):
    with context():
        for _ in range(2):
            for _, call in layer.ways:
                y = call(layer.x)
                assert torch.equal(y, layer.expected)
                assert not y.requires_grad
                assert y.is_inference() == torch.is_inference_mode_enabled()
    assert dispatched == []


@pytest.mark.parametrize("name", ["x", "weight", "bias", "scores"])
def test_autograd_alone_sees_a_call_without_the_dispatcher(name, layer, dispatched):
    """The gradients equal those through the dispatcher, which a mode enforces."""
    for owner in (layer, layer.module):
        if hasattr(owner, name):
            getattr(owner, name).requires_grad_()
    for i, (op, call) in enumerate(layer.ways):
        # Packed masks give the scores no gradient, and masked_linear_held gives only x one.
        constant = (i in (1, 2) and name == "scores") or (i == 2 and name != "x")
        source = layer.module.get_parameter(name) if i == 3 and name != "x" else getattr(layer, name)
        y = call(layer.x)
        assert y.requires_grad != constant
        if constant:
            continue
        (direct,) = torch.autograd.grad(y.square().sum(), source)
        assert dispatched == []
        with SeeingDispatch():
            (by_dispatcher,) = torch.autograd.grad(call(layer.x).square().sum(), source)
        assert op in dispatched
        assert set(dispatched) & set(BACKWARD)
        assert torch.equal(direct, by_dispatcher)
        dispatched.clear()


# ---------------------------------------------------------------------------------------------- seen by others


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        SeeingDispatch,
        SeeingFunctions,
        lambda: torch.device("cpu"),
        lambda: profile(acc_events=True),  # torch 2.11 does not warn about it
        forward_ad.dual_level,
    ],
    ids=["autocast", "dispatch mode", "function mode", "device", "profiler", "forward mode"],
)
def test_a_context_that_has_to_see_calls_does(context, layer, dispatched):
    with torch.no_grad(), context():
        for op, call in layer.ways:
            dispatched.clear()
            torch.testing.assert_close(call(layer.x).float(), layer.expected, rtol=1e-2, atol=1e-2)
            assert set(dispatched) == {op}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_tracers_see_the_ops(layer):
    for op, call in layer.ways[:3]:
        graph = make_fx(call)(layer.x).graph
        assert any(f"mft.{op}" in str(node.target) for node in graph.nodes)
    with torch.no_grad():
        traced = torch.jit.trace(layer.module, layer.x)
    assert "mft::masked_linear_by_ratio" in str(traced.graph)
    assert torch.equal(traced(layer.x), layer.expected)


@torch.no_grad()
def test_subclasses_see_a_call_and_are_what_it_returns(layer, dispatched):
    for op, call in layer.ways:
        dispatched.clear()
        y = call(layer.x.as_subclass(Named))
        assert type(y) is Named
        assert torch.equal(y.as_subclass(torch.Tensor), layer.expected)
        assert set(dispatched) == {op}
        Wrapped.seen.clear()
        assert torch.equal(call(Wrapped(layer.x)), layer.expected)
        assert getattr(torch.ops.mft, op).default in Wrapped.seen


@torch.no_grad()
@pytest.mark.parametrize("place", range(5))
def test_a_subclass_sees_a_call_whichever_argument_it_is(place):
    t = integer_inputs(3, 5, 7)
    given = [t.x, t.weight, t.scores, torch.tensor(0.1), t.bias]
    expected = mft_kernels.masked_linear(*given)
    given[place] = Wrapped(given[place])
    Wrapped.seen.clear()
    assert torch.equal(mft_kernels.masked_linear(*given), expected)
    assert torch.ops.mft.masked_linear.default in Wrapped.seen


@torch.no_grad()
def test_fakes_and_batches_see_a_call(layer, dispatched):
    for op, call in layer.ways:
        dispatched.clear()
        assert torch.equal(vmap(call)(layer.x), layer.expected)
        assert dispatched[0] == op
        dispatched.clear()
        plain = {name: p.detach() for name, p in layer.module.named_parameters()}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = mode.from_tensor(layer.x)
            if call is layer.module and _check_for_subclass_arg(layer.module.scores):
                # torch 2.11 needs a fake if a parameter is of a subclass; 2.13 takes any parameter.
                fakes = {name: mode.from_tensor(value) for name, value in plain.items()}
                y = functional_call(layer.module, fakes, x)
            else:
                y = call(x)
            assert isinstance(y, FakeTensor)
        assert dispatched == [op]


@torch.no_grad()
def test_tensors_that_are_not_what_their_memory_holds_are_not_direct(layer, dispatched):
    negative = torch.complex(layer.x, -layer.x).conj().imag  # a view of -x, with a bit that means: negate
    assert negative.is_neg()
    functional = torch._to_functional_tensor(layer.x)
    assert not is_seen_by_others(layer.x, layer.weight, None)
    for tensor in (negative, functional, layer.x.to("meta"), layer.x.to_sparse()):
        assert is_seen_by_others(layer.x, tensor)
    for op, call in layer.ways:
        dispatched.clear()
        assert torch.equal(call(negative), layer.expected)
        assert set(dispatched) <= {op}  # on a short way the dispatcher negates, as it does for torch's ops
    assert mft_kernels.masked_linear_packed(
        layer.x.to("meta"), layer.weight.to("meta"), layer.packed.to("meta")
    ).is_meta
