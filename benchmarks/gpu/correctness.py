"""Check the kernels on this device: every op on the shapes of a real layer, then their tests.

preflight   one kernel per backend, on a tiny shape
exact     products and selection of small integers: every sum is exact, so results must equal the reference in every bit
other ops   the same for codes, experts and one mask per row; and score_step
random    error against float64 at most twice PyTorch's own in the same dtype
repeats   the same call gives the same bits, 100 times
tests     tests/triton_kernels and the Triton tests of tests/ops, in their own process; in a dry run what a GPU does
          and the interpreter does not, on a driver that launches nothing

"cuda exact" and so on are the same for csrc/cuda, which has no other ops. "cuda layouts" (layouts.py) replaces its
tests, which run in an emulator. "cuda memcheck" and "cuda racecheck" (programs.py) repeat a part of it under
compute-sanitizer.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mft_kernels import backend_report
from mft_kernels.backends.table import registered
from mft_kernels.testing import Inputs, assert_within_budget, integer_inputs, random_inputs

from ..rivals import KEEP_RATIO
from . import layouts
from .cases import AUTO, CUDA, DRY_SHAPE, DRY_TOKENS, FUSED, PREFLIGHT, SANITIZERS, TESTS, Case
from .codes import code_calls
from .device import Device
from .equality import (
    REFERENCE,
    WANTED,
    Check,
    accumulating_calls,
    dense_calls,
    equal,
    flips_check,
    many_calls,
    name_of,
    results,
    selection_checks,
)
from .experts import expert_checks
from .once_a_step import step_checks
from .operands import MODE
from .programs import run_tests, sanitize
from .results import FAILED, MEASURED, NOT_MEASURED
from .timing import FAILURES, reason

REPEATS = 100
FEATURES = 4096
TOKENS = (300, 2048)  # one launch and two in the backward; a ragged last tile and a whole one
#: 64, 128 and 256 tokens per tile: product_sm90 takes the most that still give each of an H100's 66 clusters a tile.
CUDA_TOKENS = (300, 1024, 2048)
#: One in 61 elements is nonzero. Dense sums of small integers do not fit 8 bits, so a product that rounds twice, as a
#: split one in cuBLAS may, would differ. One in 61 leaves at most 68 summands of 2, which even bf16 holds.
_SPARSE = 61


def check(case: Case, device: Device, seconds: float) -> dict[str, Any]:
    """Return status, counts and complaints of a case; ``seconds`` are left for a program in its own process."""
    if case.detail == TESTS:
        return run_tests(seconds, dry=device.dry)
    if case.detail.startswith(CUDA) and CUDA in device.without:
        return {"status": NOT_MEASURED, "reason": f"without {CUDA}: {device.without[CUDA]}"}
    if case.detail in SANITIZERS:
        return sanitize(case.detail.removeprefix(f"{CUDA} "), seconds, dry=device.dry)
    passed, complaints = 0, []
    for name, run in _checks(case.detail, device):
        try:
            run()
            passed += 1
        except (AssertionError, *FAILURES) as error:
            if not isinstance(error, AssertionError):
                reason(error, device)
            complaints.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    status = FAILED if complaints else MEASURED
    counts = {"passed": passed, "failed": len(complaints), "skipped": 0}
    return {"status": status, **counts, "complaints": complaints[:40]}


def _checks(detail: str, device: Device) -> Iterator[Check]:
    if detail == f"{CUDA} layouts":
        yield from layouts.checks(device)
        return
    if detail == PREFLIGHT:
        t = _to(integer_inputs(3, *DRY_SHAPE, torch.bfloat16, torch.bfloat16), device)
        for name in (name for name in (FUSED, CUDA) if name not in device.without):
            yield from equal(device.backends[name], name, list(dense_calls(t, t.scores.new_tensor(2)))[:1])
        return
    of_cuda, kind = detail.startswith(CUDA), detail.removeprefix(f"{CUDA} ")
    check = {"exact": _exact, "other ops": _other_ops, "random": _random, "repeats": _repeats}[kind]
    if kind == "exact" and not device.dry and not of_cuda:
        yield "auto takes the triton backend", _assert_automatic
    tokens = CUDA_TOKENS if of_cuda else TOKENS
    sizes = [(m, FEATURES, FEATURES) for m in tokens] if not device.dry else [(DRY_TOKENS, *DRY_SHAPE)]
    for m, n, k in sizes:
        yield from check(m, n, k, (CUDA,) if of_cuda else (FUSED, AUTO), device)


def _exact(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    own, backend = names[0], device.backends[names[0]]  # the others end in torch's rounding
    for scores_dtype in (torch.bfloat16, torch.float32):
        t = _to(integer_inputs(m, n, k, torch.bfloat16, scores_dtype), device)
        threshold = torch.tensor(2, dtype=scores_dtype, device=device.torch_device)
        label = f"{own}, M = {m}, scores {name_of(scores_dtype)}"
        yield from equal(backend, f"dense integers, {label}", [*dense_calls(t, threshold), *accumulating_calls(t)])
        yield from selection_checks(label, t.scores, threshold, backend)
        if "drop" in registered(backend).functions:
            yield flips_check(label, t, threshold, backend)
        for v in (t.x, t.grad_output):
            v *= (torch.arange(v.numel(), device=v.device).view_as(v) % _SPARSE == 0).to(v.dtype)
        yield from equal(backend, label, [*dense_calls(t, threshold), *accumulating_calls(t)])
        if AUTO in names:
            label = f"{AUTO}, M = {m}, scores {name_of(scores_dtype)}"
            yield from equal(device.backends[AUTO], label, dense_calls(t, threshold))
            # Such rows go through a pass into scratch memory and cuBLAS on any card: Triton's other way.
            odd = Inputs(**vars(t) | {name: getattr(t, name)[:, 1:].contiguous() for name in ("x", "weight", "scores")})
            yield from equal(device.backends[AUTO], f"{label}, rows not aligned", dense_calls(odd, threshold))


def _other_ops(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    own, backend = names[0], device.backends[names[0]]
    t = _to(integer_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    threshold = torch.tensor(2, dtype=torch.bfloat16, device=device.torch_device)
    yield from equal(backend, f"{own}, M = {m}", [*code_calls(t, threshold), *many_calls(t, threshold)])
    if m == (DRY_TOKENS if device.dry else TOKENS[0]):
        yield from step_checks(own, n, k, backend, device.torch_device)
        yield from expert_checks(f"{own}, a layer's experts", n, k, torch.bfloat16, backend, device.torch_device)


def _random(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    t = _to(random_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    threshold = t.scores.abs().flatten().sort().values[int((1 - KEEP_RATIO) * t.scores.numel())]
    threshold = threshold.clone()  # a view into the sorted values can begin anywhere, a layer's at multiples of 16
    for name in names:
        for op, arguments in _of_a_step(t, threshold).items():
            run = functools.partial(_assert_budget, op, device.backends[name], arguments)
            yield f"{op}, {name}, M = {m}", run


def _repeats(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    t = _to(random_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    times = 2 if device.dry else REPEATS
    for name in names:
        calls = _of_a_step(t, t.scores.abs().median())
        if name == names[0]:  # the others do not select
            calls["kept_threshold"] = (t.scores, KEEP_RATIO, MODE)
        for op, arguments in calls.items():
            run = functools.partial(results, op, device.backends[name], arguments)
            yield f"{op}, {name}, M = {m}, {times} times", functools.partial(_assert_repeats, run, times)


def _of_a_step(t: Inputs, threshold: Tensor) -> dict[str, tuple[Any, ...]]:
    return {
        "masked_linear": (t.x, t.weight, t.scores, threshold, t.bias, MODE),
        "masked_linear_backward": (t.grad_output, t.x, t.weight, t.scores, threshold, MODE, WANTED),
    }


def _assert_automatic() -> None:
    report = backend_report()
    assert report["auto"]["cuda"] == "triton", report


def _assert_budget(op: str, backend: str, arguments: tuple[Any, ...]) -> None:
    exact = results(op, REFERENCE, (v.double() if _floating(v) else v for v in arguments))
    same_dtype = results(op, REFERENCE, arguments)
    for got, same, want in zip(results(op, backend, arguments), same_dtype, exact, strict=True):
        if got.numel():
            assert_within_budget(got, same, want)


def _assert_repeats(run: Callable[[], tuple[Tensor, ...]], times: int) -> None:
    first = run()
    for i in range(1, times):
        for got, before in zip(run(), first, strict=True):
            assert torch.equal(got, before), f"call {i + 1} differs from the first"


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to(t: Inputs, device: Device) -> Inputs:
    return Inputs(*(v.to(device.torch_device) for v in vars(t).values()))
