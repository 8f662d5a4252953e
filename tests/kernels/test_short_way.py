"""The short ways of products and their gradients on a CPU: usual calls give the same bits; for others they decline."""

import itertools

import pytest
import torch
from by_name import oracle
from products import DTYPES, MODES
from torch import Tensor

import mft_kernels
from mft_kernels import MaskedLinear, reference
from mft_kernels.backends import cpu
from mft_kernels.backends import table as backends
from mft_kernels.ops.linear import MASKED_LINEAR_PACKED_BACKWARD
from mft_kernels.testing import integer_inputs

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"the CPU library: {cpu.unavailable}")

N, K = 5, 37
FORWARD = ("masked_linear_packed", "masked_linear")
BACKWARD = ("masked_linear_packed_backward", "masked_linear_backward")
every_op = pytest.mark.parametrize("op", [*FORWARD, *BACKWARD])


def usual(op: str) -> dict:
    """Return the arguments, by name, of a call that the op's short way takes."""
    t, threshold = integer_inputs(6, N, K), torch.tensor(2.0)
    packed, (signs, _) = mft_kernels.pack_mask(t.scores, threshold), torch.ops.mft.pack_signs(t.scores, "auto")
    call = {"grad_output": t.grad_output} if op in BACKWARD else {}
    call |= {"x": t.x, "weight": t.weight}
    if "packed" in op:
        call |= {"packed": packed}
        call |= {"scores": t.scores, "signs": signs, "mode": "magnitude"} if op in BACKWARD else {"bias": t.bias}
    else:
        call |= {"scores": t.scores, "threshold": threshold}
        call |= {"mode": "magnitude"} if op in BACKWARD else {"bias": t.bias, "mode": "magnitude"}
    return call | ({"output_mask": [True, False, True, False]} if op in BACKWARD else {})


@pytest.fixture(autouse=True)
def auto_has_chosen():
    """Call each op once, because before its first call nobody knows that the short way is the backend's."""
    for op in FORWARD:
        getattr(mft_kernels, op)(**usual(op))
    MASKED_LINEAR_PACKED_BACKWARD(*usual(BACKWARD[0]).values(), "auto")


def by_short_way(op: str, call: dict) -> list[Tensor]:
    """Return the results; none if the short way declines."""
    found = getattr(torch.ops.mft_cpu, f"try_{op}")(*call.values())
    return [] if found is None else [found] if isinstance(found, Tensor) else found


def assert_equals_the_reference(op: str, call: dict) -> None:
    expected = getattr(oracle, op)(*call.values())
    expected = [expected] if isinstance(expected, Tensor) else expected
    for ours, theirs in zip(by_short_way(op, call), expected, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@every_op
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_gives_what_the_reference_gives(op, dtype, scores_dtype):
    start = usual(op)
    start |= {name: v.to(dtype) for name, v in start.items() if name in ("weight", "bias")}
    start |= {name: v.to(scores_dtype) for name, v in start.items() if name in ("scores", "threshold")}
    every_leading = [(), (1,), (2, 3), *([(0,)] if op in FORWARD else [])]
    for leading, mode in itertools.product(every_leading, MODES):
        call = (
            start | {"x": torch.randint(-3, 4, (*leading, K)).to(dtype)} | ({"mode": mode} if "mode" in start else {})
        )
        if op in FORWARD:
            for bias in (call["bias"], None):
                assert_equals_the_reference(op, call | {"bias": bias})
            continue
        call["grad_output"] = torch.randint(-3, 4, (*leading, N)).to(dtype)
        for d_x, d_scores in ((True, False), (False, True), (True, True)):
            call["output_mask"] = [d_x, False, d_scores, False]
            assert_equals_the_reference(op, call | ({"signs": None} if "signs" in call else {}))
            if "signs" in call and mode == "magnitude" and scores_dtype == torch.float32:
                assert_equals_the_reference(op, call | {"scores": None})


#: What makes a call unusual: the argument, and its change.
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
    "scores in fp64": ("scores", lambda s: s.double()),
    "scores in columns": ("scores", lambda s: s.t().contiguous().t()),
    "scores of other rows": ("scores", lambda s: s[:-1].contiguous()),
    "scores elsewhere": ("scores", lambda s: s.to("meta")),
    "a threshold of another dtype": ("threshold", lambda t: t.double()),
    "a threshold a row": ("threshold", lambda t: t.repeat(N)),
    "a threshold of one dimension": ("threshold", lambda t: t[None].clone()),
    "a threshold elsewhere": ("threshold", lambda t: t.to("meta")),
    "another mode": ("mode", lambda _: "largest"),
    "signs of other words": ("signs", lambda s: s[:, :1].contiguous()),
    "a gradient of another length": ("grad_output", lambda g: g[:, :-1].contiguous()),
    "a gradient of another dtype": ("grad_output", lambda g: g.half()),
    "a gradient in columns": ("grad_output", lambda g: g.t().contiguous().t()),
    "a gradient that is one number": ("grad_output", lambda g: g[:1, :1].expand(6, N)),
    "a gradient of nothing": ("grad_output", lambda g: g[:0]),
    "x of fewer rows": ("x", lambda x: x[:-1].contiguous()),
    "weight of no rows": ("weight", lambda w: w[:0]),
    "neither scores nor signs": ("signs", lambda _: None),
    "d_weight too": ("output_mask", lambda _: [True, True, True, False]),
    "d_bias too": ("output_mask", lambda _: [True, False, True, True]),
}
#: Fewer rows of x are as usual if there is no gradient of more.
FORWARD_TOO = [name for name in UNUSUAL if name != "x of fewer rows"]
CASES = [
    (op, name)
    for op in (*FORWARD, *BACKWARD)
    for name in (FORWARD_TOO if op in FORWARD else UNUSUAL)
    if UNUSUAL[name][0] in usual(op) and (op, name) != (BACKWARD[0], "another mode")  # which chooses "value" too
]


def changed(op: str, unusual: str) -> dict:
    call, (name, change) = usual(op), UNUSUAL[unusual]
    nothing = {"scores": None} if unusual.startswith("neither") else {}
    return call | {name: change(call[name])} | nothing


@pytest.mark.parametrize(("op", "unusual"), CASES)
def test_it_declines_what_is_not_usual(op, unusual):
    assert by_short_way(op, changed(op, unusual)) == []


def outcome(op: str, call: dict, **backend: str) -> object:
    """Return what the public function returns for a call: a result, or the error."""
    try:
        return getattr(mft_kernels, op)(**call, **backend).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("op", "unusual"), [case for case in CASES if case[0] in FORWARD and not case[1].endswith(("elsewhere", "fp64"))]
)
def test_what_is_not_usual_is_served_or_refused_as_by_the_backend_asked_for_by_name(op, unusual):
    call = changed(op, unusual)
    assert outcome(op, call) == outcome(op, call, backend="cpu")


@pytest.mark.parametrize("op", FORWARD)
def test_what_must_be_a_tensor_and_is_none_is_refused_by_name(op):
    for name in usual(op).keys() - {"bias", "mode"}:
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"), torch.no_grad():
            getattr(mft_kernels, op)(**usual(op) | {name: None})


@every_op
@pytest.mark.parametrize(("variable", "value"), [("MFT_KERNELS", "reference"), ("MFT_AUTOTUNE", "1")])
def test_it_leaves_a_call_to_whom_the_environment_names(monkeypatch, op, variable, value):
    out, grad, x = torch.zeros(N, K), torch.ones(6, N), torch.ones(6, K)
    monkeypatch.setenv(variable, value)
    assert by_short_way(op, usual(op)) == []
    assert not torch.ops.mft_cpu.try_accumulate_product(out, grad, x)
    for nothing in ("", {"MFT_KERNELS": "auto", "MFT_AUTOTUNE": "0"}[variable]):
        monkeypatch.setenv(variable, nothing)
        assert by_short_way(op, usual(op))


def test_a_backend_that_auto_asks_first_has_no_short_way_past_it(own_table):
    call, asked = usual(FORWARD[0]), []
    mft_kernels.masked_linear_packed(**call)

    def product(*arguments, **how):
        asked.append(arguments)
        return reference.product(*arguments, **how)

    ours = backends.Backend("ours", frozenset({"cpu"}), frozenset({torch.float32}), {"product": product})
    backends.register(ours, before="cpu")
    layer = MaskedLinear(K, N)
    layer(call["x"])
    mft_kernels.masked_linear_packed(**call)
    with torch.no_grad():
        layer(call["x"])
    assert len(asked) == 3


@pytest.mark.parametrize("into", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_added_as_the_reference_does(into, dtype):
    grad, x = torch.randint(-3, 4, (2, 3, N)).to(dtype), torch.randint(-3, 4, (2, 3, K)).to(dtype)
    out = torch.randint(-3, 4, (N, K)).to(into)
    expected = out.clone()
    oracle.accumulate_product(expected, grad, x)
    add = torch.ops.mft_cpu.try_accumulate_product
    assert add(out, grad, x)
    assert torch.equal(out, expected)
    for unusual in (
        (out, grad[:, :2].contiguous(), x),
        (out, grad, x.reshape(6, K)),
        (out, grad, x.double()),
        (out, grad[..., 1:].contiguous(), x),
        (out, grad[:0], x[:0]),
        (out.t(), x, grad),
        (out[:, :-1], grad, x),
    ):
        assert not add(*unusual)
    assert torch.equal(out, expected)
