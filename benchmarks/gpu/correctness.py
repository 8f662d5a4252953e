"""Whether the kernels are right on this device: their tests, then every op on the shapes of a real layer.

exact     small integers: every sum is exact, so results must equal the reference in every bit
random    error against float64 at most twice PyTorch's own in the same dtype
repeats   the same call gives the same bits, 100 times
tests     tests/triton_kernels, in a process of its own
"""

import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mft_kernels import backend_report, reference
from mft_kernels.testing import Inputs, assert_within_budget, integer_inputs, random_inputs
from mft_kernels.triton import bits, choice, ops, select

from ..harness import ROOT
from ..rivals import KEEP_RATIO
from .cases import DRY_SHAPE, DRY_TOKENS, Case
from .competitors import MODE, outputs
from .device import Device
from .journal import FAILED, MEASURED, NOT_MEASURED
from .timing import FAILURES, reason

REPEATS = 100
FEATURES = 4096
TOKENS = (300, 2048)  # one launch and two in the backward, a ragged last tile and a whole one
TESTS = "tests/triton_kernels"
_WANTED = [True, False, True, True]  # d_x, d_scores, d_bias
#: Dense sums of small integers do not fit 8 bits: a product that rounds twice, as a split one in cuBLAS may, would
#: differ. One in 61 leaves at most 68 summands of 2, which even bf16 holds.
_SPARSE = 61

Check = tuple[str, Callable[[], Any]]


def check(case: Case, device: Device, seconds: float) -> tuple[str, dict[str, Any]]:
    """(status, {"passed", "failed", "skipped", "complaints"}); ``seconds`` are left for the tests."""
    if case.detail == "tests":
        return run_tests(seconds, dry=device.dry)
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
    return status, {"passed": passed, "failed": len(complaints), "skipped": 0, "complaints": complaints}


def _checks(kind: str, device: Device) -> Iterator[Check]:
    sizes = [(m, FEATURES, FEATURES) for m in TOKENS] if not device.dry else [(DRY_TOKENS, *DRY_SHAPE)]
    for m, n, k in sizes:
        yield from {"exact": _exact, "random": _random, "repeats": _repeats}[kind](m, n, k, device)


def _exact(m: int, n: int, k: int, device: Device) -> Iterator[Check]:
    if not device.dry:
        yield "auto takes the triton backend", _assert_automatic
    for scores_dtype in (torch.bfloat16, torch.float32):
        t = _to(integer_inputs(m, n, k, torch.bfloat16, scores_dtype), device)
        label = f"M = {m}, scores {_name(scores_dtype)}"
        threshold = torch.tensor(2, dtype=scores_dtype, device=device.torch_device)
        yield from _exact_ops(f"fused, dense integers, {label}", t, threshold, ops.always_fused)
        yield from _exact_selection(label, t.scores, threshold)
        for v in (t.x, t.grad_output):
            v *= (torch.arange(v.numel(), device=v.device).view_as(v) % _SPARSE == 0).to(v.dtype)
        for name, choose in (("fused", ops.always_fused), ("auto", choice.automatic), ("scratch", ops.always_scratch)):
            yield from _exact_ops(f"{name}, {label}", t, threshold, choose)


def _exact_ops(label: str, t: Inputs, threshold: Tensor, choose: ops.Choose) -> Iterator[Check]:
    packed = reference.pack_mask(t.scores, threshold, MODE)
    signs = reference.pack_signs(t.scores)[0]
    # In fp32 every sum is exact; the one rounding is that of the kernels' own last step.
    x, weight, scores, bias, grad = (v.float() for v in (t.x, t.weight, t.scores, t.bias, t.grad_output))
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "masked_linear": (
            lambda: ops.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, MODE, choose=choose),
            lambda: reference.masked_linear(x, weight, scores, threshold.float(), bias, MODE),
        ),
        "masked_linear_packed": (
            lambda: ops.masked_linear_packed(t.x, t.weight, packed, t.bias, choose=choose),
            lambda: reference.masked_linear_packed(x, weight, packed, bias),
        ),
        "masked_linear_backward": (
            lambda: ops.masked_linear_backward(
                t.grad_output, t.x, t.weight, t.scores, threshold, MODE, _WANTED, choose=choose
            ),
            lambda: reference.masked_linear_backward(grad, x, weight, scores, threshold.float(), MODE, _WANTED),
        ),
        "masked_linear_packed_backward": (
            lambda: ops.masked_linear_packed_backward(
                t.grad_output, t.x, t.weight, packed, t.scores, signs, MODE, _WANTED, choose=choose
            ),
            lambda: reference.masked_linear_packed_backward(grad, x, weight, packed, scores, signs, MODE, _WANTED),
        ),
    }
    for name, (run, expect) in calls.items():
        yield f"{name}, {label}", functools.partial(_assert_equal, run, expect)
    if choose is ops.always_fused:
        out = torch.ones(weight.shape, device=weight.device)

        def accumulated() -> Tensor:
            ops.accumulate_score_grad(out, t.grad_output, t.x, t.weight, None, signs, MODE)
            return out

        def expected() -> Tensor:
            out = torch.ones_like(weight)
            reference.accumulate_score_grad(out, grad, x, weight, None, signs, MODE)
            return out

        yield f"accumulate_score_grad, {label}", functools.partial(_assert_equal, accumulated, expected)


def _exact_selection(label: str, scores: Tensor, threshold: Tensor) -> Iterator[Check]:
    normal = torch.randn(scores.shape, device=scores.device).to(scores.dtype)
    for name, values in (("ties", scores), ("normal", normal)):
        dropped = int((1 - KEEP_RATIO) * values.numel())
        yield (
            f"kept_threshold, {name}, {label}",
            functools.partial(
                _assert_equal,
                functools.partial(select.kept_threshold, values, KEEP_RATIO, MODE),
                # Not the reference's kthvalue, which takes a second at these sizes.
                functools.partial(lambda v, d: v.abs().flatten().sort().values[d], values, dropped),
            ),
        )
    yield (
        f"pack_mask, {label}",
        functools.partial(
            _assert_equal,
            lambda: bits.pack_mask(scores, threshold, MODE),
            lambda: reference.pack_mask(scores, threshold, MODE),
        ),
    )
    yield (
        f"pack_signs, {label}",
        functools.partial(_assert_equal, lambda: bits.pack_signs(scores), lambda: reference.pack_signs(scores)),
    )


def _random(m: int, n: int, k: int, device: Device) -> Iterator[Check]:
    t = _to(random_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    threshold = t.scores.abs().flatten().sort().values[int((1 - KEEP_RATIO) * t.scores.numel())]
    linear = (t.x, t.weight, t.scores, threshold, t.bias)
    backward = (t.grad_output, t.x, t.weight, t.scores, threshold)
    for name, choose in (("fused", ops.always_fused), ("auto", choice.automatic)):
        pairs: dict[str, tuple[Callable, Callable[[], Any], tuple]] = {
            "masked_linear": (
                reference.masked_linear,
                functools.partial(ops.masked_linear, *linear, MODE, choose=choose),
                (*linear, MODE),
            ),
            "masked_linear_backward": (
                reference.masked_linear_backward,
                functools.partial(ops.masked_linear_backward, *backward, MODE, _WANTED, choose=choose),
                (*backward, MODE, _WANTED),
            ),
        }
        for op, (oracle, run, arguments) in pairs.items():
            yield f"{op}, {name}, M = {m}", functools.partial(_assert_budget, run, oracle, arguments)


def _repeats(m: int, n: int, k: int, device: Device) -> Iterator[Check]:
    t = _to(random_inputs(m, n, k, torch.bfloat16, torch.bfloat16), device)
    threshold = select.kept_threshold(t.scores, KEEP_RATIO, MODE)
    times = 2 if device.dry else REPEATS
    for name, choose in (("fused", ops.always_fused), ("auto", choice.automatic)):
        calls: dict[str, Callable[[], Any]] = {
            "masked_linear": functools.partial(
                ops.masked_linear, t.x, t.weight, t.scores, threshold, t.bias, MODE, choose=choose
            ),
            "masked_linear_backward": functools.partial(
                ops.masked_linear_backward,
                t.grad_output, t.x, t.weight, t.scores, threshold, MODE, _WANTED, choose=choose,
            ),
        }  # fmt: skip
        if choose is ops.always_fused:
            calls["kept_threshold"] = functools.partial(select.kept_threshold, t.scores, KEEP_RATIO, MODE)
        for op, run in calls.items():
            yield f"{op}, {name}, M = {m}, {times} times", functools.partial(_assert_repeats, run, times)


def _assert_automatic() -> None:
    report = backend_report()
    assert report["auto"]["cuda"] == "triton", report


def _assert_equal(run: Callable[[], Any], expect: Callable[[], Any]) -> None:
    """In every bit, once the expected value is rounded to the dtype of what came."""
    for i, (got, expected) in enumerate(zip(outputs(run()), outputs(expect()), strict=True)):
        assert got.shape == expected.shape, f"output {i}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        wrong = (got != expected.to(got.dtype)).sum().item()
        assert wrong == 0, f"output {i}: {wrong} of {got.numel()} elements differ"


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


def run_tests(seconds: float, *, dry: bool = False, path: str = TESTS) -> tuple[str, dict[str, Any]]:
    """pytest on ``path``, counted line by line, so that what was cut off still counts as far as it came."""
    if not list(Path(ROOT, path).rglob("test_*.py")):
        return NOT_MEASURED, {"reason": f"no tests in {path}"}
    if dry:
        return NOT_MEASURED, {"reason": f"a dry run leaves {path} to make test"}
    command = [sys.executable, "-m", "pytest", path, "-v", "--tb=short", "-p", "no:cacheprovider"]
    # What the project's own options need may be missing here, and what else is installed may warn.
    command += ["-o", "addopts=--strict-markers"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-p", "xdist.plugin", "-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("MFT_KERNELS", None)
    output, code = _run(command, environment, seconds)
    return summarise(output, code, seconds)


def summarise(output: str, code: int | None, seconds: float) -> tuple[str, dict[str, Any]]:
    """(status, counts and complaints) of pytest -v; ``code`` is None if it ran out of time."""
    lines = output.splitlines()
    outcomes = [(found.group(1), line) for line in lines if "::" in line and (found := _OUTCOME.search(line))]
    # The short summary at the end names failures a second time.
    outcomes = [(what, line) for what, line in outcomes if not line.startswith(("FAILED ", "ERROR ", "SKIPPED "))]
    counts = Counter(what for what, _ in outcomes)
    bad = [" ".join(line.split()) for what, line in outcomes if what in ("FAILED", "ERROR", "XPASS")]
    details = [line for line in lines if line.startswith(("FAILED ", "ERROR ", "E  "))][:40]
    fields: dict[str, Any] = {
        "passed": counts["PASSED"],
        "failed": len(bad),
        "skipped": counts["SKIPPED"] + counts["XFAIL"],
        "complaints": [*bad[:40], *details],
        "complete": code in (0, 1),
    }
    if code is None:
        fields["complaints"].insert(0, f"stopped after {seconds:.0f} s")
    elif code not in (0, 1):
        fields["complaints"].insert(0, f"pytest exited with {code}: {' '.join(lines[-3:])[:300]}")
    return (MEASURED if code == 0 and fields["passed"] and not bad else FAILED), fields


def _run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, int | None]:
    """(output, exit code or None if stopped); its children end with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    try:
        return process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], None
