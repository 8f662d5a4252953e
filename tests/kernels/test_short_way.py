"""The short ways of products and their gradients on a CPU: usual calls give the same bits; for others they decline."""

import pytest
import torch
from by_name import oracle
from torch import Tensor

import mft_kernels
from mft_kernels import MaskedLinear, reference
from mft_kernels.backends import cpu
from mft_kernels.backends import table as backends
from mft_kernels.mask.held import masked_linear_held
from mft_kernels.ops import served
from mft_kernels.ops.linear import MASKED_LINEAR_PACKED_BACKWARD
from mft_kernels.testing import integer_inputs

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"the CPU library: {cpu.unavailable}")

N, K = 5, 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def usual():
    """Return x, weight, packed, bias: a call that the short way takes."""
    t = integer_inputs(6, N, K)
    packed = mft_kernels.pack_mask(t.scores, torch.tensor(2.0))
    mft_kernels.masked_linear_packed(t.x, t.weight, packed, t.bias)  # so that "auto" has already made its choice
    return {"x": t.x, "weight": t.weight, "packed": packed, "bias": t.bias}


@pytest.fixture
def from_scores():
    """Return x, weight, scores, threshold, bias, mode: a call from scores that the short way takes."""
    t, threshold = integer_inputs(6, N, K), torch.tensor(2.0)
    mft_kernels.masked_linear(t.x, t.weight, t.scores, threshold, t.bias)
    values = t.x, t.weight, t.scores, threshold, t.bias, "magnitude"
    return dict(zip(["x", "weight", "scores", "threshold", "bias", "mode"], values, strict=True))


def by_short_way(call: dict) -> Tensor | None:
    name = "try_masked_linear_packed" if "packed" in call else "try_masked_linear"
    return getattr(torch.ops.mft_cpu, name)(*call.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_short_way_gives_what_the_reference_gives(usual, shape, dtype, bias):
    call = {name: t.to(dtype) if t.is_floating_point() else t for name, t in usual.items()}
    call["x"] = torch.randint(-3, 4, shape).to(dtype)
    call["bias"] = call["bias"] if bias else None
    assert_same(by_short_way(call), oracle.masked_linear_packed(*call.values()))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours, theirs)
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("scores_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("mode", ["magnitude", "value"])
def test_the_short_way_from_scores_gives_what_the_reference_gives(from_scores, shape, dtype, scores_dtype, mode):
    call = {name: t.to(dtype) if name in ("weight", "bias") else t for name, t in from_scores.items()}
    call |= {"x": torch.randint(-3, 4, shape).to(dtype), "mode": mode}
    call |= {name: call[name].to(scores_dtype) for name in ("scores", "threshold")}
    assert_same(by_short_way(call), oracle.masked_linear(*call.values()))


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


# Changes of the tensors that select. For the rest of a call from scores, UNUSUAL applies.
UNUSUAL_SCORES = {
    "scores in fp64": ("scores", lambda s: s.double()),
    "scores in columns": ("scores", lambda s: s.t().contiguous().t()),
    "scores of other rows": ("scores", lambda s: s[:-1].contiguous()),
    "scores elsewhere": ("scores", lambda s: s.to("meta")),
    "a threshold of another dtype": ("threshold", lambda t: t.double()),
    "a threshold a row": ("threshold", lambda t: t.repeat(N)),
    "a threshold of one dimension": ("threshold", lambda t: t[None].clone()),
    "a threshold elsewhere": ("threshold", lambda t: t.to("meta")),
    "another mode": ("mode", lambda _: "largest"),
}
UNUSUAL_FROM_SCORES = {name: how for name, how in UNUSUAL.items() if how[0] != "packed"} | UNUSUAL_SCORES


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_the_short_way_declines_what_is_not_usual(usual, unusual):
    name, changed = UNUSUAL[unusual]
    assert by_short_way(usual | {name: changed(usual[name])}) is None


@pytest.mark.parametrize("unusual", UNUSUAL_FROM_SCORES)
def test_the_short_way_from_scores_declines_what_is_not_usual(from_scores, unusual):
    name, changed = UNUSUAL_FROM_SCORES[unusual]
    assert by_short_way(from_scores | {name: changed(from_scores[name])}) is None


def outcome(call: dict, **backend: str) -> object:
    """Return what the public function returns for a call: a result, or the error."""
    run = mft_kernels.masked_linear_packed if "packed" in call else mft_kernels.masked_linear
    try:
        return run(**call, **backend).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("unusual", [name for name in UNUSUAL if "elsewhere" not in name and "fp64" not in name])
def test_what_is_not_usual_is_served_or_refused_as_by_the_backend_asked_for_by_name(usual, unusual):
    name, changed = UNUSUAL[unusual]
    call = usual | {name: changed(usual[name])}
    assert outcome(call) == outcome(call, backend="cpu")


@pytest.mark.parametrize(
    "unusual", [name for name in UNUSUAL_FROM_SCORES if "elsewhere" not in name and "fp64" not in name]
)
def test_what_is_not_usual_from_scores_is_served_or_refused_as_by_the_backend_asked_for(from_scores, unusual):
    name, changed = UNUSUAL_FROM_SCORES[unusual]
    call = from_scores | {name: changed(from_scores[name])}
    assert outcome(call) == outcome(call, backend="cpu")


@pytest.mark.parametrize("mask", ["usual", "from_scores"])
def test_what_must_be_a_tensor_and_is_none_is_refused_by_name(request, mask):
    call = request.getfixturevalue(mask)
    for name in call.keys() - {"bias", "mode"}:
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"), torch.no_grad():
            getattr(mft_kernels, "masked_linear_packed" if mask == "usual" else "masked_linear")(**call | {name: None})


@pytest.mark.parametrize(
    ("variable", "value", "unset"), [("MFT_KERNELS", "reference", "auto"), ("MFT_AUTOTUNE", "1", "0")]
)
@pytest.mark.parametrize("mask", ["usual", "from_scores"])
def test_the_short_way_leaves_a_call_to_those_whom_the_environment_names(
    request, monkeypatch, mask, variable, value, unset
):
    call = request.getfixturevalue(mask)
    assert by_short_way(call) is not None
    monkeypatch.setenv(variable, value)
    assert by_short_way(call) is None
    for nothing in ("", unset):
        monkeypatch.setenv(variable, nothing)
        assert by_short_way(call) is not None


def test_a_backend_that_auto_asks_first_has_no_short_way_past_it(own_table, usual):
    assert ("masked_linear_packed", torch.float32) in backends.short_ways
    asked = []

    def product(*arguments, **how):
        asked.append(arguments)
        return reference.product(*arguments, **how)

    functions = {"product": product}
    ours = backends.Backend("ours", frozenset({"cpu"}), frozenset({torch.float32}), functions)
    backends.register(ours, before="cpu")
    layer = MaskedLinear(K, N)
    layer(usual["x"].detach())
    mft_kernels.masked_linear_packed(**usual)
    with torch.no_grad():
        layer(usual["x"])
    assert len(asked) == 3


# ---------------------------------------------------------------------------------------------- gradients


@pytest.fixture
def gradients():
    """Return the arguments of masked_linear_packed_backward, for d_x and for d_scores with the sign from bits."""
    t = integer_inputs(6, N, K)
    packed, (signs, _) = mft_kernels.pack_mask(t.scores, torch.tensor(2.0)), torch.ops.mft.pack_signs(t.scores, "auto")
    names = ["grad_output", "x", "weight", "packed", "scores", "signs", "mode", "output_mask"]
    values = t.grad_output, t.x, t.weight, packed, t.scores, signs, "magnitude", [True, False, True, False]
    call = dict(zip(names, values, strict=True))
    MASKED_LINEAR_PACKED_BACKWARD(*values, "auto")  # so that "auto" has already made its choice
    return call


@pytest.fixture
def gradients_from_scores(gradients, from_scores):
    """Return the arguments of masked_linear_backward, for d_x and d_scores."""
    named = {name: gradients[name] for name in ("grad_output", "x", "weight", "scores")}
    return named | {"threshold": from_scores["threshold"], "mode": "magnitude", "output_mask": gradients["output_mask"]}


def gradients_by_short_way(call: dict) -> list[Tensor]:
    name = "try_masked_linear_packed_backward" if "packed" in call else "try_masked_linear_backward"
    return getattr(torch.ops.mft_cpu, name)(*call.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("sign", ["signs", "scores", "value"])
@pytest.mark.parametrize("wanted", ["x", "s", "xs"])
def test_the_short_way_gives_the_gradients_of_the_reference(gradients, dtype, leading, sign, wanted):
    call = gradients | {"output_mask": ["x" in wanted, False, "s" in wanted, False]}
    call |= {name: call[name].to(dtype) for name in ("grad_output", "x", "weight")}
    call |= {
        "x": torch.randint(-3, 4, (*leading, K)).to(dtype),
        "grad_output": torch.randint(-3, 4, (*leading, N)).to(dtype),
    }
    call |= {"signs": {"signs": None}, "scores": {"signs": None}, "value": {"signs": None, "mode": "value"}}[sign]
    if sign == "signs":
        call |= {"signs": gradients["signs"], "scores": None}
    found, expected = gradients_by_short_way(call), oracle.masked_linear_packed_backward(*call.values())
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("scores_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("wanted", ["x", "s", "xs"])
def test_the_short_way_from_scores_gives_the_gradients_of_the_reference(
    gradients_from_scores, dtype, scores_dtype, leading, mode, wanted
):
    call = gradients_from_scores | {"mode": mode, "output_mask": ["x" in wanted, False, "s" in wanted, False]}
    call |= {name: call[name].to(scores_dtype) for name in ("scores", "threshold")}
    call |= {
        "grad_output": torch.randint(-3, 4, (*leading, N)).to(dtype),
        "x": torch.randint(-3, 4, (*leading, K)).to(dtype),
        "weight": call["weight"].to(dtype),
    }
    found, expected = gradients_by_short_way(call), oracle.masked_linear_backward(*call.values())
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


UNUSUAL_GRADIENTS = {
    "a gradient of another length": ("grad_output", lambda g: g[:, :-1].contiguous()),
    "a gradient of another dtype": ("grad_output", lambda g: g.half()),
    "a gradient in columns": ("grad_output", lambda g: g.t().contiguous().t()),
    "a gradient that is one number": ("grad_output", lambda g: g[:1, :1].expand(6, N)),
    "a gradient of nothing": ("grad_output", lambda g: g[:0]),
    "x of fewer rows": ("x", lambda x: x[:-1].contiguous()),
    "x of another dtype": ("x", lambda x: x.half()),
    "weight in fp64": ("weight", lambda w: w.double()),
    "weight of no rows": ("weight", lambda w: w[:0]),
    "packed of other words": ("packed", lambda p: p[:, :1].contiguous()),
    "signs of other words": ("signs", lambda s: s[:, :1].contiguous()),
    "scores in fp64": ("scores", lambda s: s.double()),
    "scores in columns": ("scores", lambda s: s.t().contiguous().t()),
    "d_weight too": ("output_mask", lambda _: [True, True, True, False]),
    "d_bias too": ("output_mask", lambda _: [True, False, True, True]),
    "no sign": ("signs", lambda _: None),
}


@pytest.mark.parametrize("unusual", UNUSUAL_GRADIENTS)
def test_the_short_way_declines_gradients_that_are_not_usual(gradients, unusual):
    name, changed = UNUSUAL_GRADIENTS[unusual]
    call = gradients | {name: changed(gradients[name])}
    if unusual == "no sign":
        call["scores"] = None
    assert gradients_by_short_way(call) == []


UNUSUAL_GRADIENTS_FROM_SCORES = {
    name: how for name, how in UNUSUAL_GRADIENTS.items() if how[0] not in ("packed", "signs")
} | UNUSUAL_SCORES


@pytest.mark.parametrize("unusual", UNUSUAL_GRADIENTS_FROM_SCORES)
def test_the_short_way_from_scores_declines_gradients_that_are_not_usual(gradients_from_scores, unusual):
    name, changed = UNUSUAL_GRADIENTS_FROM_SCORES[unusual]
    assert gradients_by_short_way(gradients_from_scores | {name: changed(gradients_from_scores[name])}) == []


@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_short_way_adds_a_product_as_the_reference_does(into, dtype):
    grad, x = torch.randint(-3, 4, (2, 3, N)).to(dtype), torch.randint(-3, 4, (2, 3, K)).to(dtype)
    out = torch.randint(-3, 4, (N, K)).to(into)
    expected = out.clone()
    oracle.accumulate_product(expected, grad, x)
    assert torch.ops.mft_cpu.try_accumulate_product(out, grad, x)
    assert torch.equal(out, expected)
    kept = out.clone()
    for unusual in (
        (out, grad[:, :2].contiguous(), x),
        (out, grad, x.reshape(6, K)),
        (out, grad, x.double()),
        (out, grad[..., 1:].contiguous(), x),
        (out, grad[:0], x[:0]),
        (out.t(), x, grad),
        (out[:, :-1], grad, x),
    ):
        assert not torch.ops.mft_cpu.try_accumulate_product(*unusual)
    assert torch.equal(out, kept)


@pytest.mark.parametrize("variable", ["MFT_KERNELS", "MFT_AUTOTUNE"])
def test_the_short_ways_of_gradients_leave_a_call_to_those_whom_the_environment_names(
    gradients, gradients_from_scores, monkeypatch, variable
):
    given = torch.zeros(N, K), gradients["grad_output"], gradients["x"]
    assert gradients_by_short_way(gradients) != []
    assert gradients_by_short_way(gradients_from_scores) != []
    assert torch.ops.mft_cpu.try_accumulate_product(*given)
    monkeypatch.setenv(variable, "reference" if variable == "MFT_KERNELS" else "1")
    assert gradients_by_short_way(gradients) == []
    assert gradients_by_short_way(gradients_from_scores) == []
    assert not torch.ops.mft_cpu.try_accumulate_product(*given)


@pytest.mark.parametrize("by", ["layer", "held mask", "scores"])
@pytest.mark.parametrize("learns", ["x", "scores", "both"])
def test_a_step_of_a_layer_asks_no_table(monkeypatch, by, learns):
    """Once "auto" has chosen, forward and backward go to their kernels directly, with the gradients of the long way."""
    layer = MaskedLinear(K, N, bias=False)
    layer.scores.requires_grad_(learns != "x")
    x, grad = torch.randn(6, K, requires_grad=learns != "scores"), torch.ones(6, N)
    buffer, packed = torch.zeros(N, K), layer.packed_mask()
    threshold, held = layer.current_mask().threshold, by == "held mask"
    run = {
        "layer": layer,
        "held mask": lambda x: masked_linear_held(x, layer.weight, packed, grad_buffer=buffer),
        "scores": lambda x: mft_kernels.masked_linear(x, layer.weight, layer.scores, threshold),
    }[by]

    def step() -> list[Tensor | None]:
        buffer.zero_()
        x.grad = layer.scores.grad = None
        run(x).backward(grad)
        return [t if t is None else t.clone() for t in (x.grad, layer.scores.grad, buffer)]

    with monkeypatch.context() as by_the_long_way:
        by_the_long_way.setenv("MFT_KERNELS", "cpu")
        expected = step()
    step()
    monkeypatch.setattr(served, "choose", None)
    version = buffer._version
    for ours, theirs in zip(step(), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert buffer._version == version + 1 + held  # zero_, and the kernel's addition
