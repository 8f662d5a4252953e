"""What was asked of both backends on an H100, as findings: met, NOT MET, or not measured.

A goal in percent of cuBLAS is judged where the card allows it at all: reading the scores takes time that the unmasked
product has not, and with few tokens reading is all there is. A worst case is the median of the worst case.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from ..harness import Finding, Spread
from .cases import (
    AUTO,
    CUDA,
    CUDA_GOAL_TOKENS,
    DENSE,
    FUSED,
    KEPT,
    PAPER,
    PAPER_MOST_TOKENS,
    PASS,
    SELECTED,
    SHAPES,
)
from .journal import NOT_MEASURED

Record = dict[str, Any]

#: auto may choose the very passes that it is compared with, and two timings of one thing differ by about as much.
_NOT_SLOWER = 0.99


def goals(what: str, cases: Iterable[Record]) -> list[Record]:
    """Findings of one kind of case, each with its "state"."""
    cases = list(cases)
    if what == "correctness":
        of_cuda = [case for case in cases if case["detail"].startswith(CUDA)]
        return [_correct("Triton", [case for case in cases if case not in of_cuda]), _correct(CUDA, of_cuda)]
    if what in ("forward", "d_x", "d_scores"):
        few = [case for case in cases if case["m"] <= 2048]
        many = [c for c in cases if c["m"] >= CUDA_GOAL_TOKENS[0] and (c["n"], c["k"]) in SHAPES["llama2-7b"]]
        where = f", M >= {CUDA_GOAL_TOKENS[0]}, LLaMA2-7B"
        if what == "d_scores":
            return [_of_cublas(FUSED, what, cases, 95, ""), _of_cublas(CUDA, what, many, 97, where)]
        return [_of_cublas(FUSED, what, few, 90, ", M <= 2048"), _of_cublas(CUDA, what, many, 95, where)]
    if what == "threshold":
        return [_selection(cases)]
    if what == "step":
        at_2048 = [case for case in cases if case["m"] == 2048]
        few = [case for case in cases if case["m"] <= PAPER_MOST_TOKENS]
        return [
            _worst("mask pass + cuBLAS / auto, M = 2048", at_2048, [PASS], AUTO, 1.3),
            _worst("mask pass + cuBLAS with the masked weight kept / auto, M = 2048", at_2048, [KEPT], AUTO, 1.3),
            _worst("the faster of both / auto, everywhere (1 % is noise)", cases, [PASS, KEPT], AUTO, _NOT_SLOWER),
            _worst(f"the paper's layer / auto, M <= {PAPER_MOST_TOKENS}", few, [PAPER], AUTO, 5),
        ]
    return []


def _correct(backend: str, cases: list[Record]) -> Record:
    judged = [case for case in cases if "failed" in case]
    quantity = f"checks of {backend} that fail or were cut short"
    if len(judged) < len(cases) or not judged:
        missing = ", ".join(case["detail"] for case in cases if "failed" not in case)
        bad = sum(case["failed"] for case in judged)
        if not bad:
            return _unmeasured(f"{quantity}; without {missing}", "at most", 0)
    count = sum(case["failed"] + (not case.get("complete", True)) for case in judged)
    return _finding(Finding(quantity, Spread.of([float(count)]), "", "at most", 0))


def _of_cublas(name: str, what: str, within: list[Record], percent: float, where: str) -> Record:
    measured = [case for case in within if {DENSE, name} <= case.get("samples", {}).keys()]

    def allowed(case: Record) -> bool:
        return 100 * case["samples"][DENSE]["ms"]["median"] / case["samples"][name]["floor_ms"] >= percent

    possible = [case for case in measured if allowed(case)]
    quantity = f"{name} {what} in % of cuBLAS{where}"
    impossible = len(measured) - len(possible)
    note = f"; {impossible} of {len(measured)} cases left out, where reading the scores alone forbids it"
    found = _of_worst(
        quantity,
        within,
        possible,
        lambda case: Spread(**case["samples"][name]["percent_of_cublas"]),
        ("%", percent),
        note if impossible else "",
    )
    if broken := sum(name in case.get("failures", {}) for case in within):
        found |= {"quantity": f"{found['quantity']}; FAILED in {broken}", "met": False, "state": "NOT MET"}
    return found


def _selection(cases: list[Record]) -> Record:
    (n, k), microseconds = SELECTED[-1], 80
    quantity, name = f"{CUDA} kept_threshold of {n * k / 1e6:.1f}M bfloat16 scores, us", f"kept_threshold, {CUDA}"
    for case in cases:
        if (case["n"], case["k"], case["detail"]) == (n, k, "bfloat16") and name in case.get("samples", {}):
            rounds = [1e3 * ms for ms in case["samples"][name]["rounds_ms"]]
            return _finding(Finding(quantity, Spread.of(rounds), "us", "at most", microseconds))
    return _unmeasured(quantity, "at most", microseconds)


def _worst(quantity: str, within: list[Record], above: list[str], below: str, bound: float) -> Record:
    measured = [case for case in within if {*above, below} <= case.get("samples", {}).keys()]

    def ratio(case: Record) -> Spread:
        fastest = min(above, key=lambda name: case["samples"][name]["ms"]["median"])
        pairs = zip(case["samples"][fastest]["rounds_ms"], case["samples"][below]["rounds_ms"])
        return Spread.of([a / b for a, b in pairs])

    return _of_worst(quantity, within, measured, ratio, ("x", bound), "")


def _of_worst(
    quantity: str,
    within: list[Record],
    judged: list[Record],
    value: Callable[[Record], Spread],
    asked: tuple[str, float],
    note: str,
) -> Record:
    unit, bound = asked
    if not judged:
        return _unmeasured(quantity + note, "at least", bound)
    spread, case = min(((value(case), case) for case in judged), key=lambda pair: pair[0].median)
    missing = sum(1 for case in within if case["status"] == NOT_MEASURED)
    where = f"{case['n']} x {case['k']}, M = {case['m']}"
    text = f"{quantity}: worst of {len(judged)}, {where}{note}"
    if missing:
        text += f"; {missing} not measured"
    return _finding(Finding(text, spread, unit, "at least", bound))


def _finding(finding: Finding) -> Record:
    return {**asdict(finding), "met": finding.met, "state": "met" if finding.met else "NOT MET"}


def _unmeasured(quantity: str, rule: str, bound: float) -> Record:
    return {
        "quantity": quantity, "measured": None, "unit": "", "rule": rule, "bound": bound, "met": None,
        "state": NOT_MEASURED,
    }  # fmt: skip
