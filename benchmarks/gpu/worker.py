"""The process that runs cases, the most wanted first, while time is left; a case is measured completely or not at all.

A kernel that hangs, or destroys the CUDA context, ends this process and not the run: see __main__.py.
"""

import faulthandler
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import CUDA, PRODUCTS, SECONDS_OF, Case
from .results import FAILED, MEASURED, WAITING, Results, figures, first_line

#: A program hangs if it takes this many seconds more than it was given.
_MORE = 30.0

#: Maps a case and the seconds it may use, if it can choose, to fields of its record. RuntimeError: the device is lost.
Measure = Callable[[Case, float], dict[str, Any]]


def run_cases(
    cases: Sequence[Case],
    measure: Measure,
    results: Results,
    deadline: float,
    *,
    clock: Callable[[], float] = time.time,
    say: Callable[[str], None] = print,
) -> None:
    """Run the waiting cases. None is started after the deadline, and one that hangs ends this process."""
    start = clock()
    for place, case in enumerate(cases, 1):
        before, left = clock(), deadline - clock()
        if results.of(case).get("reason") != WAITING or left <= 0:
            continue
        blamed = results.blamed(case)
        seconds = left if case == cases[-1] else min(left, SECONDS_OF.get(case.detail, left))
        patience = seconds + _MORE if case.detail in SECONDS_OF else case.patience
        results.start(case, patience)
        faulthandler.dump_traceback_later(patience, exit=True)
        try:
            fields = measure(case, seconds)
        except RuntimeError as error:
            results.lose(case, first_line(error))
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        for kind, named in blamed.items():  # competitors left out of the case since
            fields[kind] = fields.get(kind, {}) | named
            fields["left_out"] = {name: why for name, why in fields.get("left_out", {}).items() if name not in named}
        status, took = fields.pop("status", FAILED if fields.get("failures") else MEASURED), clock() - before
        results.set(case, status, seconds=round(took, 2), **fields)
        say(f"[{place}/{len(cases)}] {case}: {_in_short(status, fields)}; {took:.1f} s, at {clock() - start:.0f} s")


def work(
    cases: Sequence[Case], out: Path, run: str, deadline: float, without_cuda: Mapping[str, str], *, dry: bool
) -> None:
    """Do everything that needs the device. without_cuda: {kind of case, or "" for all: why CUDA takes no part}."""
    import torch

    from mft_kernels.backends import faster

    from ..harness import environment
    from ..records import ROOT
    from . import codes, correctness, experts, many, once_a_step, products, train
    from .bundle import commit_of
    from .device import Device, Gpu, Interpreter
    from .timing import Bench

    faster.TABLE = Path("none")  # results of an earlier run must not decide what this run compares
    device: Device = Interpreter() if dry else Gpu()
    results, ceilings = Results(out, run), device.ceilings()
    about = environment() | commit_of() | device.environment() | {"sources": _digest(ROOT / "mft_kernels")}
    results.begin(cases, about, ceilings)
    bench, missing = Bench(device, ceilings), dict(device.without)
    timed: Mapping[str, Callable[[Case, Bench], dict[str, Any]]] = {
        **dict.fromkeys(PRODUCTS, products.time_product),
        "update": products.time_update,
        "host": products.time_host,
        "threshold": once_a_step.time_threshold,
        "score_step": once_a_step.time_score_step,
        "codes": codes.time_codes,
        "many": many.time_many,
        "experts": experts.time_experts,
        "train": train.time_train,
    }

    def measure(case: Case, seconds: float) -> dict[str, Any]:
        why = without_cuda.get("", without_cuda.get(case.what))
        device.without = missing | ({CUDA: why} if why else {})
        device.tidy()
        try:
            if case.what == "correctness":
                return correctness.check(case, device, seconds)
            return timed[case.what](case, bench)
        except torch.OutOfMemoryError as error:
            return {"status": FAILED, "reason": first_line(error)}

    run_cases(cases, measure, results, deadline, say=lambda line: print(line, flush=True))


def _in_short(status: str, fields: Mapping[str, Any]) -> str:
    if "reason" in fields:
        return f"{status}, {fields['reason']}"
    if "passed" in fields:
        return f"{status}, {fields['passed']} passed, {fields['failed']} failed, {fields['skipped']} skipped"
    samples = [f"{name} {figures(sample)}" for name, sample in fields.get("samples", {}).items()]
    wrong = [f"{name} FAILED ({why})" for name, why in fields.get("failures", {}).items()]
    return "; ".join(samples + wrong) or status


def _digest(package: Path) -> str:
    """Return 12 digits of a hash of the kernels that ran: a checkout may have no commit to name."""
    files = [*sorted(package.rglob("*.py")), *package.glob("libmft_cuda.so")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
