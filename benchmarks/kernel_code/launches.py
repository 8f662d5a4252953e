"""The launches that are compiled and read: every kernel, form, tile, mode, mask and dtype, not all combinations."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from building.ahead import recorded
from mft_kernels.backends.triton import bits, in_place, ops, score_step, select
from mft_kernels.backends.triton.launch import Launch
from mft_kernels.backends.triton.target import (
    A100,
    B200,
    H100,
    H100_OLD_TRITON,
    MI300X,
    RTX_4090,
    RTX_5090,
    Target,
    installed_assembler,
    installed_triton,
    make_target,
)
from mft_kernels.codes import FORMATS
from mft_kernels.operands import Backward, Experts, Keep, KeepByTask, Sums, Update
from mft_kernels.reference.step import BLOCK

from .specialise import identity

FEATURES = 4096  # N and K
#: One for each height of a tile, with cases in which one launch makes both gradients and in which two do.
TOKENS = (1, 64, 128, 512, 2048, 4096)
FEW_TOKENS = (64, 2048)
#: As many as models have; a program holds their offsets in registers, up to two per thread.
EXPERTS = 256
#: Rows per expert: one for each height of a tile.
ROWS = (1, 32, 128, 1024, 4096)

_MAGNITUDE = "magnitude"
_D_X = [True, False, False, False]
_BOTH = [True, False, True, False]
_ALL = [True, True, True, False]


Calls = Iterator[tuple[str, Callable[[], object]]]


@dataclass(frozen=True)
class Entry:
    """A launch on a target, and the first call that makes it."""

    target: Target
    call: str
    launch: Launch


def targets() -> list[Target]:
    """Return one target of each architecture, in the form that the installed Triton and ptxas compile safely."""
    hopper = H100 if _installed_form(H100).swapped else H100_OLD_TRITON
    return [replace(t, compiler=installed_triton()) for t in (A100, RTX_4090, hopper, B200, RTX_5090, MI300X)]


def entries(target: Target, *, few: bool = False) -> list[Entry]:
    """Return one of each launch that compiles differently; ``few``: bf16, and only what tests have time for."""
    found: dict[str, Entry] = {}
    for name, call in _calls(few):
        for one_launch in (True, False):  # both ways: whichever this layer would take, another layer takes the other
            with _both_gradients(one_launch):
                launched = recorded(call, target)
            for launch in launched:
                key = identity(launch.kernel, launch.args, launch.options)
                found.setdefault(key, Entry(target, name, launch))
    return list(found.values())


@contextlib.contextmanager
def _both_gradients(one_launch: bool) -> Iterator[None]:
    """Make both gradients by one launch if possible, or always by two."""
    chosen = ops.one_launch
    ops.one_launch = lambda problem: one_launch and problem.operands.element < 4
    try:
        yield
    finally:
        ops.one_launch = chosen


def _installed_form(like: Target) -> Target:
    assert isinstance(like.arch, int)
    return make_target(
        like.backend,
        like.arch,
        like.multiprocessors,
        like.shared_memory,
        installed_triton(),
        installed_assembler(like.arch),
    )


def _calls(few: bool) -> Calls:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for m in FEW_TOKENS if few else TOKENS:
        yield from _usual(m, bf16, bf16)
    yield from _selection_calls(bf16)
    yield from _step_calls(torch.int16, bf16, eight_bit=True)
    if few:
        return
    yield from _selection_calls(fp32)
    yield from (*_flip_calls(bf16), *_flip_calls(fp32))
    for scores_dtype in (fp32, bf16, torch.int16):
        for eight_bit in (True, False):
            for weight_dtype in (bf16, fp16, fp32, None):
                yield from _step_calls(scores_dtype, weight_dtype, eight_bit=eight_bit)
            yield from _step_calls(scores_dtype, bf16, eight_bit=eight_bit, mode="value", odd=True)
    for m in TOKENS:
        yield from _usual(m, bf16, fp32)
        yield from _usual(m, fp32, fp32)
        yield from ((name, _run_in_tf32(call)) for name, call in _usual(m, fp32, fp32))
    yield from ((name, _run_in_tf32(call)) for name, call in _usual(1, fp32, bf16))
    for m in FEW_TOKENS:
        yield from _rare(m, bf16, bf16)
        yield from _usual(m, fp16, fp16)
    for m, masks, dtype in ((8, 3, bf16), (8, 16, bf16), (32, 16, bf16), (64, 16, bf16), (8, 3, fp32)):
        yield from _many_masks_calls(m, masks, dtype)
    for m, kind in itertools.product((1, 32, 64, 2048), ("nf4-dq", "int8")):
        yield from _codes_calls(m, kind)
    yield from _all_expert_calls()
    yield from _usual(2048, bf16, bf16, features=1024)  # fewer tiles than multiprocessors
    yield from _usual(64, bf16, bf16, odd=True)
    yield from _rare(64, bf16, bf16, odd=True)


class _Layer:
    """Arguments of a layer, without memory. ``odd``: K is one less, which no descriptor or wide load can read."""

    def __init__(self, m: int, dtype: torch.dtype, scores_dtype: torch.dtype, odd: bool, features: int) -> None:
        n, k = features, features - odd
        self.name = f"M = {m}, {_name(dtype)}, scores {_name(scores_dtype)}{', odd' if odd else ''}"
        self.x, self.grad, self.weight = (_empty(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n, k)))
        self.bias = _empty(n, dtype=dtype)
        self.scores, self.threshold, self.rows = (_empty(*shape, dtype=scores_dtype) for shape in ((n, k), (), (n,)))
        self.packed = _empty(n, -(-k // 32), dtype=torch.int32)
        self.sums = _empty(n, k, dtype=torch.float32)

    def forward(self, threshold: Tensor, mode: str = _MAGNITUDE, choose: ops.Choose = ops.always_fused) -> None:
        ops.product(self.x, self.weight, Keep(self.scores, threshold, mode), self.bias, choose=choose)

    def backward(self, threshold: Tensor, wanted: list[bool], mode: str = _MAGNITUDE) -> None:
        keep, sign = Keep(self.scores, threshold, mode), None if mode == "value" else self.scores
        self._gradients(keep, sign, wanted)

    def packed_backward(self, wanted: list[bool]) -> None:
        self._gradients(Keep(self.packed), self.packed, wanted)

    def _gradients(self, keep: Keep, sign: Tensor | None, wanted: list[bool]) -> None:
        asked = Backward(self.grad, self.x, self.weight, keep, sign, self.scores.dtype, wanted)
        ops.gradients(asked, choose=ops.always_fused)

    def accumulate(self, weight: Tensor | None, sign: Tensor | None) -> None:
        ops.score_grad(Sums(self.grad, self.x, weight, sign, self.sums, accumulate=True))


def _usual(
    m: int, dtype: torch.dtype, scores_dtype: torch.dtype, *, odd: bool = False, features: int = FEATURES
) -> Calls:
    """Yield the calls of MaskedLinear and the op in training."""
    o = _Layer(m, dtype, scores_dtype, odd, features)
    yield f"forward, {o.name}", lambda: o.forward(o.threshold)
    yield f"forward, packed, {o.name}", lambda: ops.product(o.x, o.weight, Keep(o.packed), o.bias)
    for name, wanted in (("d_x", _D_X), ("d_x, d_scores", _BOTH), ("all gradients", _ALL)):
        yield f"{name}, {o.name}", functools.partial(o.backward, o.threshold, wanted)
    yield f"d_x, d_scores, packed, {o.name}", lambda: o.packed_backward(_BOTH)
    yield f"accumulate by bits, {o.name}", lambda: o.accumulate(o.weight, o.packed)
    yield f"accumulate without weight, {o.name}", lambda: o.accumulate(None, None)


def _rare(m: int, dtype: torch.dtype, scores_dtype: torch.dtype, *, odd: bool = False) -> Calls:
    """Yield calls with thresholds by row, value mode, and the other sources of sign and mask."""
    o = _Layer(m, dtype, scores_dtype, odd, FEATURES)
    yield f"forward, by row, {o.name}", lambda: o.forward(o.rows)
    yield f"d_x, by row, {o.name}", lambda: o.backward(o.rows, _D_X)
    yield f"d_x, d_scores, by row, {o.name}", lambda: o.backward(o.rows, _BOTH)
    yield f"forward, by value, {o.name}", lambda: o.forward(o.threshold, "value")
    yield f"d_x, d_scores, by value, {o.name}", lambda: o.backward(o.threshold, _BOTH, "value")
    yield f"all gradients, packed, {o.name}", lambda: o.packed_backward(_ALL)
    yield f"accumulate by scores, {o.name}", lambda: o.accumulate(o.weight, o.scores)
    yield f"forward through scratch, {o.name}", lambda: o.forward(o.threshold, choose=ops.always_scratch)


def _selection_calls(dtype: torch.dtype) -> Calls:
    scores, threshold = _empty(FEATURES, FEATURES, dtype=dtype), _empty(dtype=dtype)
    for mode in (_MAGNITUDE, "value"):
        yield f"kept_threshold, {mode}, {_name(dtype)}", lambda mode=mode: select.select(scores, 0.9, mode)
        yield f"pack_mask, {mode}, {_name(dtype)}", lambda mode=mode: bits.pack_mask(scores, threshold, mode)
    yield f"pack_signs, {_name(dtype)}", lambda: bits.pack_signs(scores)


def _flip_calls(dtype: torch.dtype) -> Calls:
    weight, aside = _empty(FEATURES, FEATURES, dtype=dtype), _empty(FEATURES, dtype=dtype)
    words, ends = _empty(FEATURES, FEATURES // 32, dtype=torch.int32), _empty(FEATURES, dtype=torch.int64)
    held, name = (aside, words, ends), f"mask in place, {_name(dtype)}"
    yield f"{name}: count", lambda: in_place.count_dropped(weight, words)
    yield f"{name}: put aside", lambda: in_place.launch_put_aside(aside, weight, words, ends)
    yield f"{name}: put aside, after another", lambda: in_place.launch_put_aside(aside, weight, words, ends, held)
    yield f"{name}: put back", lambda: in_place.launch_put_back(weight, aside, words, ends, words)
    yield f"{name}: drop", lambda: in_place.drop(weight, words, words)


def _many_masks_calls(m: int, masks: int, dtype: torch.dtype) -> Calls:
    x, weight, bias = (_empty(*shape, dtype=dtype) for shape in ((m, FEATURES), (FEATURES, FEATURES), (FEATURES,)))
    packed, tasks = [_empty(FEATURES, FEATURES // 32, dtype=torch.int32)] * masks, _empty(m, dtype=torch.int32)
    name = f"{masks} masks, M = {m}, {_name(dtype)}"
    yield name, lambda: ops.product(x, weight, KeepByTask(packed, tasks), bias)


def _codes_calls(m: int, kind: str) -> Calls:
    """Yield products of bf16 over codes."""
    shape = FEATURES, FEATURES
    codes, *scales = (_empty(*size, dtype=dtype) for size, dtype in FORMATS[kind].layout(shape).values())
    weight = FORMATS[kind](codes, scales, shape)
    a, words = _empty(m, FEATURES, dtype=torch.bfloat16), _empty(FEATURES, FEATURES // 32, dtype=torch.int32)
    for name, transposed in (("forward", False), ("d_x", True)):
        call = functools.partial(ops.product, a, weight, Keep(words), None, transposed=transposed)
        yield f"{name}, {kind}, M = {m}", call


def _all_expert_calls() -> Calls:
    """Return all calls over experts."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rows in ROWS:
        yield from expert_calls(rows, bf16, bf16)
        yield from expert_calls(rows, bf16, fp32)
        yield from ((name, _run_in_tf32(call)) for name, call in expert_calls(rows, fp32, fp32))
    yield from expert_calls(32, fp32, fp32)
    yield from expert_calls(32, fp16, fp16)
    yield from expert_calls(32, bf16, bf16, odd=True)


def expert_calls(each: int, dtype: torch.dtype, scores_dtype: torch.dtype, *, odd: bool = False) -> Calls:
    """Yield the calls of a layer of experts in training, and of the op; each expert has ``each`` rows."""
    n, k, rows = FEATURES, FEATURES - odd, EXPERTS * each
    name = f"experts of {each} rows, {_name(dtype)}, scores {_name(scores_dtype)}{', odd' if odd else ''}"
    x, grad, weight = (_empty(*shape, dtype=dtype) for shape in ((rows, k), (rows, n), (EXPERTS, n, k)))
    scores, thresholds = (_empty(*shape, dtype=scores_dtype) for shape in ((EXPERTS, n, k), (EXPERTS,)))
    words, bias = _empty(EXPERTS, n, -(-k // 32), dtype=torch.int32), _empty(EXPERTS, n, dtype=dtype)
    offsets = _empty(EXPERTS, dtype=torch.int32)
    experts = Experts(weight, offsets)
    for kind, keep in (("packed", Keep(words)), ("by scores", Keep(scores, thresholds, _MAGNITUDE))):
        yield f"forward, {kind}, {name}", functools.partial(ops.product, x, experts, keep, bias)
        yield f"d_x, {kind}, {name}", functools.partial(ops.product, grad, experts, keep, None, transposed=True)
    for out in {dtype: None, torch.float32: None}:
        sums = Sums(grad, x, None, None, _empty(EXPERTS, n, k, dtype=out), True, offsets)
        yield f"sums in {_name(out)}, {name}", functools.partial(ops.score_grad, sums)
    for told_by, sign in (("scores", scores), ("bits", words)):
        sums = Sums(grad, x, weight, sign, _empty(EXPERTS, n, k, dtype=scores_dtype), offsets=offsets)
        yield f"d_scores by {told_by}, {name}", functools.partial(ops.score_grad, sums)


def _step_calls(
    scores_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    *,
    eight_bit: bool,
    mode: str = _MAGNITUDE,
    odd: bool = False,
) -> Calls:
    """Yield optimiser steps that know their old threshold and return the new one; without a weight, scaled."""
    shape = FEATURES, FEATURES - odd
    moments = torch.uint8 if eight_bit else torch.float32
    first, second = (_empty(*shape, dtype=moments) for _ in range(2))
    scales = _empty(2, -(-shape[0] * shape[1] // BLOCK), dtype=torch.float32) if eight_bit else None
    scores, threshold = _empty(*shape, dtype=scores_dtype), _empty(dtype=scores_dtype)
    grad = _empty(*shape, dtype=torch.float32)
    weight = None if weight_dtype is None else _empty(*shape, dtype=weight_dtype)
    grad_scale = _empty(dtype=torch.float32) if weight is None else None
    adam = {"step": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    options = {"grad_scale": grad_scale, "seed": 0, "mode": mode, "keep_ratio": 0.9, "threshold": threshold}
    name = f"score_step, {_name(scores_dtype)}, {'8-bit' if eight_bit else 'exact'}"
    name += f", weight {_name(weight_dtype) if weight_dtype else None}{', by value, odd' if odd else ''}"
    yield name, lambda: score_step.score_step(Update(scores, grad, weight, first, second, scales, **adam, **options))


def _run_in_tf32(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
