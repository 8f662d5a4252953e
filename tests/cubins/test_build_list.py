"""The list of `make cubins` contains every launch of layers and ops, except what LEFT_OUT names."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from by_name import ByName

from building import cubin_calls as listed
from building.ahead import recorded
from building.cubin_calls import BF16, DTYPES, FP16, FP32, MODES
from building.cubins import TARGETS, launches
from mft.masks.banked_linear import BankedLinear, TaskPerRow
from mft.masks.quantize import QuantizedLinear
from mft.models.codes.weight import QuantizedWeight
from mft_kernels import MaskAdamW, MaskedLinear
from mft_kernels.backends import table as backends
from mft_kernels.backends.triton import functions as triton_functions
from mft_kernels.backends.triton import ops, select
from mft_kernels.backends.triton.launch import record
from mft_kernels.backends.triton.specialise import identity
from mft_kernels.backends.triton.target import assume

flat = ByName(ops)

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

#: (M, N, K) of a Llama, a Qwen, a head, and small ones. The list is made from other sizes.
SIZES = (
    (1, 5120, 5120), (1, 64, 256), (2, 5632, 2048), (16, 128, 256), (18, 2048, 5632), (33, 4864, 896),
    (64, 32000, 2048), (70, 5120, 1024), (128, 1024, 1024), (250, 5120, 13824), (513, 2560, 2560), (1024, 4864, 896),
    (3000, 896, 4864), (8192, 5632, 2048),
)  # fmt: skip
BOTH, KINDS = (False, True), ("nf4", "nested", "int8", "int4")
#: All options of each op.
OPTIONS: dict[str, dict[str, tuple]] = {
    "selection": {"dtype": DTYPES, "mode": MODES, "by_row": BOTH},
    "flips": {"dtype": DTYPES, "held": BOTH},
    "masked_weight": {"dtype": DTYPES, "mask": ("words", *itertools.product(DTYPES, MODES)), "by_row": BOTH},
    "forward": {
        "dtype": DTYPES,
        "mask": ("words", *itertools.product(DTYPES, MODES)),
        "bias": BOTH,
        "by_row": BOTH,
        "tf32": BOTH,
    },
    "backward": {
        "dtype": DTYPES,
        "mask": ("words", *itertools.product(DTYPES, MODES)),
        "scores": DTYPES,
        "sign": ("bits", "scores", "none"),
        "wanted": ("x", "x scores", "scores", "weight", "x weight scores"),
        "tf32": BOTH,
    },
    "sums": {"dtype": DTYPES, "of_sums": DTYPES, "sign": (None, "bits", "scores", "none"), "tf32": BOTH},
    "codes_forward": {"dtype": DTYPES, "kind": KINDS, "masked": BOTH, "bias": BOTH, "tf32": BOTH},
    "codes_d_x": {"dtype": DTYPES, "kind": KINDS, "masked": BOTH, "tf32": BOTH},
    "many_masks": {
        "dtype": DTYPES,
        "masks": (1, 3, 6, 12),
        "bias": BOTH,
        "tasks": (torch.int64, torch.int32),
        "tf32": BOTH,
    },
    "experts_product": {"dtype": DTYPES, "transposed": BOTH},
    "experts_sums": {"dtype": DTYPES},
    "experts_selection": {"dtype": DTYPES, "mode": MODES},
    "step": {
        "scores": (FP32, BF16, torch.int16),
        "mode": MODES,
        "weight": (None, *DTYPES),
        "grad": DTYPES,
        "moments": listed.MOMENTS,
        "scaled": BOTH,
        "keep_ratio": (0.9, None),
    },
}
EXPERTS = 4


def experts_product(m: int, n: int, k: int, dtype: torch.dtype, transposed: bool) -> None:
    """Use a packed mask, as layers do."""
    a, weight = listed.empty(m, n if transposed else k, dtype=dtype), listed.empty(EXPERTS, n, k, dtype=dtype)
    words, offsets = (listed.empty(EXPERTS, *rest, dtype=torch.int32) for rest in ((n, -(-k // 32)), ()))
    flat.grouped_product(a, weight, None, None, words, offsets, None, "value", transposed)


def experts_sums(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Use sums as held layers do."""
    x, grad = listed.empty(m, k, dtype=dtype), listed.empty(m, n, dtype=dtype)
    out, offsets = listed.empty(EXPERTS, n, k, dtype=FP32), listed.empty(EXPERTS, dtype=torch.int32)
    flat.grouped_score_grad(out, grad, x, offsets, None, None, None, "magnitude", True)


def experts_selection(n: int, k: int, dtype: torch.dtype, mode: str) -> None:
    """Select one threshold per expert."""
    select.select(listed.empty(EXPERTS, n, k, dtype=dtype), 0.9, mode, each=True)


OF_EXPERTS = {each.__name__: each for each in (experts_product, experts_sums, experts_selection)}
Asked = dict[str, Any]
#: Reason: what is left out. The installed Triton compiles it, or the reference serves it.
LEFT_OUT: dict[str, Callable[[Asked], bool]] = {
    "no step of ours takes fp16 scores": lambda a: (
        a.get("mask", "words")[0] == FP16 or (a.get("scores") == FP16 and a["wanted"] != "x")
    ),
    "layers have one threshold": lambda a: a.get("by_row", False),
    "over experts: they would not fit a bundle": lambda a: a["op"].startswith("experts"),
    "layers freeze the weight": lambda a: "weight" in a.get("wanted", ""),
    "no layer of ours holds int4": lambda a: a.get("kind") == "int4",
    "in TF32 the products of layers alone, whose masks are words": lambda a: (
        a["tf32"] and (a["op"].startswith(("codes", "many")) or a.get("mask", "words") != "words")
    ),
    "a mask a row is for serving, in 16 bits": lambda a: a["op"] == "many_masks" and a["dtype"] == FP32,
    "tasks are in int64, as torch counts": lambda a: a.get("tasks") == torch.int32,
    "layers add up grad.T @ x; with weight and sign fp32 sums by packed signs": lambda a: (
        a["op"] == "sums" and a["sign"] is not None and (a["of_sums"] != FP32 or a["sign"] == "scores")
    ),
    "a buffer is in fp32 or in the weight's dtype": lambda a: (
        a["op"] == "sums" and a["sign"] is None and a["of_sums"] not in (FP32, a["dtype"])
    ),
    "with a weight a step finds the next mask, without one it steps by d_scores alone": lambda a: (
        a["op"] == "step"
        and (
            (a["keep_ratio"] is None) != (a["weight"] is None)
            or (a["weight"] is None and (a["grad"] != a["scores"] or a["scaled"]))
        )
    ),
    "steps of fp16 weights, or of gradients in neither fp32 nor the weight's dtype": lambda a: (
        a["op"] == "step" and a["weight"] is not None and (a["weight"], a["grad"]) not in listed.STEPPED
    ),
}


def every_call() -> Iterator[tuple[Asked, Callable[..., object]]]:
    """Yield the options, and the call without its sizes."""
    for op, options in OPTIONS.items():
        for values in itertools.product(*options.values()):
            asked = dict(zip(options, values))
            tf32 = asked.pop("tf32", False)
            mask = asked.get("mask", "words")
            sign_is_known = mask == "words" or asked.get("sign", "none") == ("scores", "none")[mask[1] == "value"]
            if op == "backward" and not (sign_is_known and (mask == "words" or mask[0] == asked["scores"])):
                continue
            if (tf32 and asked["dtype"] != FP32) or (mask == "words" and asked.get("by_row") and op != "selection"):
                continue
            run = functools.partial(OF_EXPERTS.get(op) or getattr(listed, op), **asked)
            yield {"op": op, **asked, "tf32": tf32}, listed.in_tf32(run) if tf32 else run


@functools.cache
def known(target: str) -> frozenset[str]:
    return frozenset(launches(TARGETS[target]))


def missing(call: Callable[..., object], size: tuple, target: str) -> list[str]:
    """Return what a call launches that is not in the list."""
    return unlisted(recorded(lambda: call(*size), TARGETS[target]), target)


def unlisted(some: list, target: str) -> list[str]:
    made_for = (identity(one.kernel, one.args, one.options) for one in some)
    return [each for each in made_for if each not in known(target)]


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(one, marks=pytest.mark.slow) for one in TARGETS if one != "sm_90")]
)
def test_every_op_is_listed_or_left_out_with_a_reason(target):
    wrong, left_out = [], set()
    for asked, call in every_call():
        without_tokens = asked["op"] in ("selection", "experts_selection", "flips", "masked_weight", "step")
        sizes = [size[1:] for size in SIZES[:3]] if without_tokens else SIZES
        lacks = {lack for size in sizes for lack in missing(call, size, target)}
        reasons = {why for why, is_left_out in LEFT_OUT.items() if is_left_out(asked)}
        left_out |= reasons if lacks else set()
        wrong += [(asked, lacks)] if lacks and not reasons else []
    assert not wrong, wrong[:3]
    assert left_out == LEFT_OUT.keys()


def seen_by(launched: list, op: Callable[..., object], instead: Callable[..., object]) -> Callable[..., object]:
    """Return a function that gives the reference's result, and adds what ``op`` launches for it to the list."""

    def run(*given: object, **named: object) -> object:
        with record() as launches:
            op(*given, **named)
        launched.extend(launches)
        return instead(*given, **named)

    return run


@pytest.fixture(params=TARGETS)
def launched(request, monkeypatch):
    """Return (launches that the triton backend would make for layers on a CPU, the target)."""
    found: list = []
    kernels, _ = triton_functions()
    reference = backends.registered("reference")
    served = {name: seen_by(found, kernel, reference.function(name)) for name, kernel in kernels.items()}
    table = {"triton": backends.Backend("triton", frozenset({"cpu"}), frozenset(), served, backends.OPERANDS)}
    with mock.patch.dict(backends._TABLE, table), assume(TARGETS[request.param]):
        backends._chosen.clear()
        backends.short_ways.clear()
        yield found, request.param
    backends._chosen.clear()
    backends.short_ways.clear()


def learns(layer: torch.nn.Module, x: torch.Tensor) -> None:
    """Run forward and backward: x needs a gradient, and the scores too, unless they are fixed-point codes."""
    y = layer(x)
    y.backward(torch.ones_like(y))


N, K = 64, 128


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_layers_launch_is_listed(launched, dtype):
    found, target = launched
    x = [torch.zeros(*shape, K, dtype=dtype).requires_grad_() for shape in ((1,), (2, 20))]
    for scores, mode, bias in itertools.product((FP32, BF16, torch.int16), MODES, BOTH):
        layer = MaskedLinear(K, N, bias, mode=mode, dtype=dtype, scores_dtype=scores)
        for tokens in x:
            learns(layer, tokens)
        if scores != torch.int16:
            layer.scores.data[0, 0] = 0  # a sign bit cannot represent its sign
            learns(layer, x[1])
        for moments, of_grad in itertools.product(("fp32", "8bit"), (dtype, FP32)):
            optimizer = MaskAdamW([layer.scores], lr=1e-3, mode=mode, moments=moments)
            if scores != torch.int16:
                optimizer.step()
            mask, sums = layer.current_mask(), torch.zeros(N, K, dtype=of_grad)
            layer.hold(mask.packed, sums)
            learns(layer, x[1])
            if dtype != FP16:  # see LEFT_OUT
                asked = {"keep_ratio": 0.9, "threshold": mask.threshold, "grad_scale": torch.ones(())}
                optimizer.step_one(layer.scores, sums, layer.weight, **asked)
            layer.release()
    for kind in ("nf4", "nf4-dq", "int8"):
        codes = QuantizedWeight.empty((N, K), dtype, kind)
        learns(QuantizedLinear(codes), x[1])
        layer.hold(mask.packed, sums, weight=codes)
        learns(layer, x[1])
    if dtype != FP32:  # see LEFT_OUT
        banked = BankedLinear(torch.nn.Linear(K, N, dtype=dtype), ContextVar("choice"))
        banked.masks, banked.tasks = {"a": mask.packed, "b": mask.packed}, frozenset("ab")
        with torch.no_grad():
            TaskPerRow(("a", "b", None)).product(banked, torch.zeros(3, 1, K, dtype=dtype))
    kernels = {one.kernel.__name__ for one in found}
    assert {"_masked_product_kernel", "_score_step_kernel", "_quantized_product_kernel"} <= kernels
    assert not unlisted(found, target)
