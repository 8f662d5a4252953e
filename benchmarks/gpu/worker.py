"""Runs the cases, most wanted first, as long as the budget lasts; a case is measured whole or not at all."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..harness import ROOT
from .cases import CHECKS, CUDA_CHECKS, PRODUCTS, SANITIZERS, UPDATES, Case
from .journal import FAILED, MEASURED, NOT_MEASURED, Journal

#: Seconds of a case of which nothing is known yet; compiling its kernels is most of it.
_FIRST_GUESS = {
    "exact": 45.0, "random": 10.0, "repeats": 10.0, "threshold": 6.0, "memory": 3.0,
    "score_step": 12.0, "held": 6.0, "experts": 8.0, "host": 2.0, "train": 6.0, "sweep": 18.0,
    "cuda exact": 10.0, "cuda random": 5.0, "cuda repeats": 5.0, "cuda layouts": 20.0,
    "cuda memcheck": 45.0, "cuda racecheck": 45.0,
}  # fmt: skip
_FIRST_GUESS_OF_A_PRODUCT = 4.0
_COMPILATION = 12.0
#: Of the budget, what the tests leave to what comes behind them, if that needs as much; and what they need at least.
_KEPT_FROM_TESTS = 0.65
_LEAST_FOR_TESTS = 20.0
#: A case that takes this many times its estimate, and at least so many seconds, hangs.
_PATIENCE, _LEAST_PATIENCE = 5.0, 60.0

#: Results are written at most this often, in seconds: writing all of them takes a noticeable part of one.
_WRITE_EVERY = 15.0

Measure = Callable[[Case, float], tuple[str, dict[str, Any]]]


class Estimates:
    """Seconds that a case will take: half again the mean of its like, or a guess before there is one."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}

    def add(self, case: Case, seconds: float) -> None:
        """What a case took."""
        self._seen.setdefault(self._kind(case), []).append(seconds)

    def of(self, case: Case) -> float:
        """Seconds; the tests count as the least they need, they take what there is."""
        if case.detail == "tests":
            return _LEAST_FOR_TESTS
        seen = self._seen.get(self._kind(case), [])[-10:]
        if seen:
            return 1.5 * sum(seen) / len(seen)
        guess = _FIRST_GUESS.get(case.detail, _FIRST_GUESS.get(case.what, _FIRST_GUESS_OF_A_PRODUCT))
        return guess + (_COMPILATION if case.compiles else 0.0)

    @staticmethod
    def _kind(case: Case) -> str:
        if case.detail in (*CHECKS, *CUDA_CHECKS, *SANITIZERS, *UPDATES):
            return case.detail
        return case.what + (" compiled" if case.compiles else "")


def run_cases(
    cases: Sequence[Case],
    measure: Measure,
    journal: Journal,
    *,
    budget: float,
    deadline: float,
    clock: Callable[[], float] = time.time,
    say: Callable[[str], None] = print,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Measure the cases that have no record yet; ``written()`` is called now and then, and last.

    Args:
        measure: (case, seconds that it may take if it can choose) -> (status, fields of the record).
        deadline: on ``clock``; a case that is not expected to end before it is not started.
    """
    estimates = Estimates()
    done = journal.records()
    start = deadline - budget
    last_written = clock()
    for case in cases:
        if "seconds" in done.get(case.key, {}):
            estimates.add(case, done[case.key]["seconds"])
    todo = [case for case in cases if case.key not in done]
    for i, case in enumerate(todo):
        left = deadline - clock()
        expected = estimates.of(case)
        place = f"[{len(cases) - len(todo) + i + 1}/{len(cases)}]"
        if expected > left:
            reason = f"needs about {expected:.0f} s, {max(left, 0):.0f} s were left"
            journal.record(case, NOT_MEASURED, reason=reason)
            say(f"{place} {case}: not measured, {reason}")
            continue
        later = sum(map(estimates.of, todo[i + 1 :]))
        allowed = left - min(later, _KEPT_FROM_TESTS * budget) if case.detail == "tests" else left
        allowed = max(allowed, _LEAST_FOR_TESTS)
        patience = allowed + 30 if case.detail == "tests" else max(_LEAST_PATIENCE, _PATIENCE * expected)
        journal.started(case, patience)
        before = clock()
        status, fields = measure(case, allowed)
        seconds = clock() - before
        estimates.add(case, seconds)
        journal.record(case, status, seconds=round(seconds, 2), **fields)
        if clock() - last_written > _WRITE_EVERY:
            written()
            last_written = clock()
        eta = min(deadline, clock() + sum(map(estimates.of, todo[i + 1 :]))) - start
        say(f"{place} {case}: {_in_short(status, fields)}; {seconds:.1f} s, at {clock() - start:.0f} of {eta:.0f} s")
    written()


def _in_short(status: str, fields: dict[str, Any]) -> str:
    if "seconds_of_a_step" in fields:
        return f"{fields['seconds_of_a_step']['median']:.4g} s, peak {fields['peak_bytes'] / 1e9:.2f} GB"
    if "configurations" in fields:
        regret = fields["judged"]["regret"]
        known = "not known" if regret is None else f"{100 * regret:.1f} %"
        return f"{len(fields['configurations'])} of {fields['legal']} configurations, regret of the plan {known}"
    if "passed" in fields:
        return f"{status}, {fields['passed']} passed, {fields['failed']} failed, {fields['skipped']} skipped"
    if status == NOT_MEASURED:
        return f"{status}, {fields.get('reason', '')}"
    samples = [
        f"{name} {sample['ms']['median']:.4g} ms" if "ms" in sample else f"{name} {sample['peak_bytes'] / 1e6:.1f} MB"
        for name, sample in fields.get("samples", {}).items()
    ]
    wrong = [f"{name} FAILED ({why})" for name, why in fields.get("failures", {}).items()]
    return ", ".join(samples + wrong) or status


def work_on(cases: Sequence[Case], journal: Journal, out: Path, *, budget: float, deadline: float, dry: bool) -> None:
    """Everything that needs the device, in this process."""
    import torch

    from ..harness import environment
    from . import codes, correctness, device, experts, host, results, threshold, timing, train, updates
    from .bundle import commit_of
    from .competitors import Inputs
    from .sweep import measure as sweep

    on: device.Device = device.Interpreter() if dry else device.Gpu()
    if not journal.about():
        journal.add(
            "about",
            environment=environment() | commit_of() | on.environment() | {"sources": _sources()},
            ceilings=on.ceilings(),
        )
    ceilings = journal.about()["ceilings"]
    inputs, missing = Inputs(on), dict(on.without)

    def measure(case: Case, seconds: float) -> tuple[str, dict[str, Any]]:
        suspected, culprits = without_suspects(case, journal)
        on.without = missing | suspected
        try:
            if case.what == "correctness":
                return correctness.check(case, on, seconds)
            if case.what == "train":
                return train.time_train(case, on)
            if case.what == "sweep":
                return sweep.time_sweep(case, inputs, on, seconds)
            if case.what in PRODUCTS:
                fields = timing.time_product(case, inputs, on, ceilings)
            elif case.what == "memory":
                fields = timing.measure_memory(case, inputs, on)
            elif case.what == "updates":
                fields = updates.time_update(case, inputs, on, ceilings)
            elif case.what == "codes":
                fields = codes.time_codes(case, inputs, on, ceilings)
            elif case.what == "experts":
                fields = experts.time_experts(case, on, ceilings)
            elif case.what == "host":
                fields = host.time_host(case, inputs, on)
            else:
                fields = threshold.time_threshold(case, on, ceilings)
        except torch.OutOfMemoryError as error:
            return FAILED, {"reason": device.first_line(error)}
        except RuntimeError as error:  # the device is lost: a new process goes on
            journal.add("lost", key=case.key, message=device.first_line(error))
            raise
        blame(fields, culprits)
        return (FAILED if fields["failures"] else MEASURED), fields

    run_cases(
        cases,
        measure,
        journal,
        budget=budget,
        deadline=deadline,
        say=lambda line: print(line, flush=True),
        written=lambda: results.write(out, journal, cases),
    )


def without_suspects(case: Case, journal: Journal) -> tuple[dict[str, str], dict[str, str]]:
    """(who does not take part in a case, and why; who of them took a worker down in this very case, and how)."""
    suspects = journal.suspects(case)
    left_out = {s["name"]: f"not tried again after {s['case']}: {s['reason']}" for s in suspects}
    return left_out, {s["name"]: s["reason"] for s in suspects if s["key"] == case.key}


def blame(fields: dict[str, Any], culprits: dict[str, str]) -> None:
    """Turn who was left out because this case failed with it into a failure of the case."""
    fields["failures"] = fields["failures"] | culprits
    fields["left_out"] = {name: why for name, why in fields["left_out"].items() if name not in culprits}


def _sources() -> str:
    """Of the kernels that ran, 12 digits of a hash: a checkout may have no commit to name."""
    package = Path(ROOT, "mft_kernels")
    files = [*sorted(package.rglob("*.py")), *package.glob("libmft_cuda.so")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
