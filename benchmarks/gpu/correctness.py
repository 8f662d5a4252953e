"""Whether the kernels are right on this device: their tests, then every op on the shapes of a real layer.

exact     small integers: every sum is exact, so results must equal the reference in every bit
random    error against float64 at most twice PyTorch's own in the same dtype
repeats   the same call gives the same bits, 100 times
tests     tests/triton_kernels, in a process of its own

"cuda exact" and so on are the same for csrc/cuda; "cuda layouts" (layouts.py) is in the place of its tests, which run
in an emulator, and "cuda memcheck" and "cuda racecheck" (sanitizer.py) repeat a part of that under compute-sanitizer.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mft_kernels import backend_report, reference
from mft_kernels.testing import Inputs, assert_within_budget, integer_inputs, random_inputs

from ..rivals import KEEP_RATIO
from . import layouts, sanitizer
from .cases import AUTO, CUDA, DRY_SHAPE, DRY_TOKENS, FUSED, SANITIZERS, Case
from .codes import code_checks
from .competitors import MODE, outputs
from .device import Device
from .equality import WANTED, Check, name_of, op_checks, selection_checks
from .experts import expert_checks
from .journal import FAILED, MEASURED, NOT_MEASURED
from .kernels import SCRATCH, kernels
from .own_tests import run_tests
from .timing import FAILURES, reason

REPEATS = 100
FEATURES = 4096
TOKENS = (300, 2048)  # one launch and two in the backward, a ragged last tile and a whole one
#: 64, 128 and 256 tokens a tile: product_sm90 takes the most that give each of an H100's 66 clusters a tile.
CUDA_TOKENS = (300, 1024, 2048)
#: Dense sums of small integers do not fit 8 bits: a product that rounds twice, as a split one in cuBLAS may, would
#: differ. One in 61 leaves at most 68 summands of 2, which even bf16 holds.
_SPARSE = 61


def check(case: Case, device: Device, seconds: float) -> tuple[str, dict[str, Any]]:
    """(status, {"passed", "failed", "skipped", "complaints"}); ``seconds`` are left for the tests."""
    if case.detail == "tests":
        return run_tests(seconds, dry=device.dry)
    if case.detail.startswith(CUDA) and CUDA in device.without:
        return NOT_MEASURED, {"reason": f"without {CUDA}: {device.without[CUDA]}"}
    if case.detail in SANITIZERS:
        return sanitizer.run(case.detail.removeprefix(f"{CUDA} "), seconds, dry=device.dry)
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
    return status, {"passed": passed, "failed": len(complaints), "skipped": 0, "complaints": complaints[:40]}


def _checks(detail: str, device: Device) -> Iterator[Check]:
    if detail == f"{CUDA} layouts":
        yield from layouts.checks(device)
        return
    of_cuda, kind = detail.startswith(CUDA), detail.removeprefix(f"{CUDA} ")
    check = {"exact": _exact, "random": _random, "repeats": _repeats}[kind]
    some = {"exact": (FUSED, AUTO, SCRATCH), "random": (FUSED, AUTO), "repeats": (FUSED, AUTO)}[kind]
    names = (CUDA,) if of_cuda else some
    if kind == "exact" and not device.dry and not of_cuda:
        yield "auto takes the triton backend", _assert_automatic
    tokens = CUDA_TOKENS if of_cuda else TOKENS
    sizes = [(m, FEATURES, FEATURES) for m in tokens] if not device.dry else [(DRY_TOKENS, *DRY_SHAPE)]
    for m, n, k in sizes:
        yield from check(m, n, k, names, device)


def _exact(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    for scores_dtype in (torch.bfloat16, torch.float32):
        t = _to(integer_inputs(m, n, k, torch.bfloat16, scores_dtype), device)
        label = f"M = {m}, scores {name_of(scores_dtype)}"
        threshold = torch.tensor(2, dtype=scores_dtype, device=device.torch_device)
        own = kernels(names[0])  # the others end in a rounding of torch's
        yield from op_checks(f"{own.name}, dense integers, {label}", t, threshold, own)
        yield from selection_checks(f"{own.name}, {label}", t.scores, threshold, own)
        if scores_dtype == torch.bfloat16:
            yield from code_checks(f"{own.name}, M = {m}", t, threshold, own, MODE)
            if own.name == CUDA and m == (DRY_TOKENS if device.dry else CUDA_TOKENS[0]):
                yield from expert_checks("a layer's experts", n, k, torch.bfloat16, own, device.torch_device)
        for v in (t.x, t.grad_output):
            v *= (torch.arange(v.numel(), device=v.device).view_as(v) % _SPARSE == 0).to(v.dtype)
        for name in names:
            yield from op_checks(f"{name}, {label}", t, threshold, kernels(name))


def _random(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    t = _to(random_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    threshold = t.scores.abs().flatten().sort().values[int((1 - KEEP_RATIO) * t.scores.numel())]
    arguments = {
        "masked_linear": (t.x, t.weight, t.scores, threshold, t.bias, MODE),
        "masked_linear_backward": (t.grad_output, t.x, t.weight, t.scores, threshold, MODE, WANTED),
    }
    for name in names:
        for op, given in arguments.items():
            run = functools.partial(getattr(kernels(name), op), *given)
            yield f"{op}, {name}, M = {m}", functools.partial(_assert_budget, run, getattr(reference, op), given)


def _repeats(m: int, n: int, k: int, names: tuple[str, ...], device: Device) -> Iterator[Check]:
    t = _to(random_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    threshold = t.scores.abs().median()
    times = 2 if device.dry else REPEATS
    for name in names:
        arguments: dict[str, tuple] = {
            "masked_linear": (t.x, t.weight, t.scores, threshold, t.bias, MODE),
            "masked_linear_backward": (t.grad_output, t.x, t.weight, t.scores, threshold, MODE, WANTED),
        }
        if name == names[0]:  # the others do not select
            arguments["kept_threshold"] = (t.scores, KEEP_RATIO, MODE)
        for op, given in arguments.items():
            run = functools.partial(getattr(kernels(name), op), *given)
            yield f"{op}, {name}, M = {m}, {times} times", functools.partial(_assert_repeats, run, times)


def _assert_automatic() -> None:
    report = backend_report()
    assert report["auto"]["cuda"] == "triton", report


def _assert_budget(run: Callable[[], Any], oracle: Callable, arguments: tuple) -> None:
    exact = oracle(*(v.double() if _floating(v) else v for v in arguments))
    for got, same, want in zip(outputs(run()), outputs(oracle(*arguments)), outputs(exact), strict=True):
        if got.numel():
            assert_within_budget(got, same, want)


def _assert_repeats(run: Callable[[], Any], times: int) -> None:
    first = outputs(run())
    for i in range(1, times):
        for got, before in zip(outputs(run()), first, strict=True):
            assert torch.equal(got, before), f"call {i + 1} differs from the first"


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to(t: Inputs, device: Device) -> Inputs:
    return Inputs(*(v.to(device.torch_device) for v in (t.x, t.weight, t.scores, t.bias, t.grad_output)))
