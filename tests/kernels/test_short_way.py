"""The short way of masked_linear_packed on a CPU: what is usual, bit for bit as the long way; all else is declined."""

import pytest
import torch
from torch import Tensor

import mft_kernels
from mft_kernels import MaskedLinear, backends, cpu, reference
from mft_kernels.testing import integer_inputs

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"the CPU library: {cpu.unavailable}")

N, K = 5, 37


@pytest.fixture
def usual():
    """x, weight, packed, bias: a call that the short way takes."""
    t = integer_inputs(6, N, K)
    packed = mft_kernels.pack_mask(t.scores, torch.tensor(2.0))
    mft_kernels.masked_linear_packed(t.x, t.weight, packed, t.bias)  # so that "auto" has asked its table
    return {"x": t.x, "weight": t.weight, "packed": packed, "bias": t.bias}


def by_short_way(call: dict[str, Tensor]) -> Tensor | None:
    return torch.ops.mft_cpu.try_masked_linear_packed(*call.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_short_way_gives_what_the_reference_gives(usual, shape, dtype, bias):
    call = {name: t.to(dtype) if t.is_floating_point() else t for name, t in usual.items()}
    call["x"] = torch.randint(-3, 4, shape).to(dtype)
    call["bias"] = call["bias"] if bias else None
    y = by_short_way(call)
    expected = reference.masked_linear_packed(*call.values())
    assert torch.equal(y, expected)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())


UNUSUAL = {
    "x of another length": ("x", lambda x: x[:, :-1].contiguous()),
    "x of another dtype": ("x", lambda x: x.bfloat16()),
    "x of integers": ("x", lambda x: x.long()),
    "x of no dimension": ("x", lambda x: x[0, 0].clone()),
    "x in columns": ("x", lambda x: x.t().contiguous().t()),
    "x elsewhere": ("x", lambda x: x.to("meta")),
    "x sparse": ("x", lambda x: x.to_sparse()),
    "weight of one dimension": ("weight", lambda w: w[0].clone()),
    "weight in fp64": ("weight", lambda w: w.double()),
    "weight in columns": ("weight", lambda w: w.t().contiguous().t()),
    "weight elsewhere": ("weight", lambda w: w.to("meta")),
    "weight of other rows": ("weight", lambda w: w[:-1].contiguous()),
    "packed of other rows": ("packed", lambda p: p[:1].contiguous()),
    "packed of other words": ("packed", lambda p: p[:, :1].contiguous()),
    "packed of int64": ("packed", lambda p: p.long()),
    "packed elsewhere": ("packed", lambda p: p.to("meta")),
    "bias of one": ("bias", lambda b: b[:1].clone()),
    "bias of two dimensions": ("bias", lambda b: b[None].clone()),
    "bias of another dtype": ("bias", lambda b: b.half()),
    "bias elsewhere": ("bias", lambda b: b.to("meta")),
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_the_short_way_declines_what_is_not_usual(usual, unusual):
    name, changed = UNUSUAL[unusual]
    assert by_short_way(usual | {name: changed(usual[name])}) is None


def outcome(call: dict[str, Tensor], **backend: str) -> object:
    """What the public function makes of a call: a result, or the error."""
    try:
        return mft_kernels.masked_linear_packed(**call, **backend).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("unusual", [name for name in UNUSUAL if "elsewhere" not in name and "fp64" not in name])
def test_what_is_not_usual_is_served_or_refused_as_by_the_backend_asked_for_by_name(usual, unusual):
    name, changed = UNUSUAL[unusual]
    call = usual | {name: changed(usual[name])}
    assert outcome(call) == outcome(call, backend="cpu")


@pytest.mark.parametrize(
    ("variable", "value", "unset"), [("MFT_KERNELS", "reference", "auto"), ("MFT_AUTOTUNE", "1", "0")]
)
def test_the_short_way_leaves_a_call_to_those_whom_the_environment_names(usual, monkeypatch, variable, value, unset):
    assert by_short_way(usual) is not None
    monkeypatch.setenv(variable, value)
    assert by_short_way(usual) is None
    for nothing in ("", unset):
        monkeypatch.setenv(variable, nothing)
        assert by_short_way(usual) is not None


def test_a_backend_that_auto_asks_first_has_no_short_way_past_it(usual, monkeypatch):
    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))
    monkeypatch.setattr(backends, "_order", list(backends._order))
    assert ("masked_linear_packed", torch.float32) in backends.short_ways
    asked = []

    def masked_linear_packed(*arguments):
        asked.append(arguments)
        return reference.masked_linear_packed(*arguments)

    ops = {"masked_linear_packed": masked_linear_packed}
    ours = backends.Backend("ours", frozenset({"cpu"}), frozenset({torch.float32}), ops)
    try:
        backends.register(ours, before="cpu")
        layer = MaskedLinear(K, N)
        layer(usual["x"].detach())
        mft_kernels.masked_linear_packed(**usual)
        with torch.no_grad():
            layer(usual["x"])
        assert len(asked) == 3
    finally:
        monkeypatch.undo()
        backends._chosen.clear()
        backends.short_ways.clear()
