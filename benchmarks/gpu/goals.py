"""What was asked of both backends on an H100, as findings: met, NOT MET, not measured, or not applicable.

A goal in percent of cuBLAS is judged where the card allows it at all: reading the scores takes time that the unmasked
product has not, and with few tokens reading is all there is. A worst case is the median of the worst case. A goal of a
kernel that cannot run there is not applicable: no figure of another kernel meets or misses it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
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

NOT_APPLICABLE = "not applicable"
#: The two forms of Triton's masked product (docs/kernels.md), and what share of cuBLAS each is held to, in percent: the
#: plain one masks through shared memory, where masking and multiplying take turns. triton/choice.py rests on its 60 %.
REGISTER_FED, PLAIN = "register-fed", "plain"
_FORWARD_PERCENT = {REGISTER_FED: 90, PLAIN: 60}
_ASKED_OF = "sm_90"


@dataclass(frozen=True)
class Where:
    """What decides which goals apply: the card's architecture, the form that ran, and what is missing of CUDA's.

    cuda: why its library does not run there, "" if it does. lacks: the card's own kernels that it was built without.
    """

    architecture: str = _ASKED_OF
    form: str = REGISTER_FED
    cuda: str = ""
    lacks: tuple[str, ...] = field(default=())
    dry: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, Any]) -> "Where":
        """From what Device.environment told."""
        library = str(environment.get("cuda_library", ""))
        architecture = str(environment.get("target", _ASKED_OF))
        # Elsewhere "first operand" means no registers: sm_100 takes it from tensor memory.
        fed = architecture == _ASKED_OF and environment.get("weight_is_first_operand", True)
        return cls(
            architecture,
            REGISTER_FED if fed else PLAIN,
            library.removeprefix("none: ") if library.startswith("none: ") else "",
            tuple(environment.get("cuda_lacks", ())),
            bool(environment.get("dry_run")),
        )

    def against(self, name: str, kernels: str = "") -> str:
        """Why a goal of ``name`` does not apply, "" if it does; ``kernels``: the group that it needs."""
        if name == CUDA and self.cuda:
            return f"without {CUDA}: {self.cuda}"
        if self.architecture != _ASKED_OF:
            return f"asked of {_ASKED_OF}, this is {self.architecture}"
        lacking = [why for why in self.lacks if kernels and why.startswith(kernels)]
        return f"built without the card's own {lacking[0]}" if name == CUDA and lacking else ""


def goals(what: str, cases: Iterable[Record], where: Where = Where()) -> list[Record]:
    """Findings of one kind of case, each with its "state"."""
    found = _goals(what, list(cases), where)
    if where.dry and what != "correctness":  # emulated kernels: their times say nothing
        found = [_unmeasured(goal["quantity"].split(":")[0], goal["rule"], goal["bound"]) for goal in found]
    return found


def _goals(what: str, cases: list[Record], where: Where) -> list[Record]:
    if what == "correctness":
        of_cuda = [case for case in cases if case["detail"].startswith(CUDA)]
        of_triton = [case for case in cases if case not in of_cuda]
        cuda = _correct(CUDA, of_cuda)
        return [_correct("Triton", of_triton), _without(cuda, f"without {CUDA}: {where.cuda}" if where.cuda else "")]
    if what in ("forward", "d_x", "d_scores"):
        few = [case for case in cases if case["m"] <= 2048]
        many = [c for c in cases if c["m"] >= CUDA_GOAL_TOKENS[0] and (c["n"], c["k"]) in SHAPES["llama2-7b"]]
        there = f", M >= {CUDA_GOAL_TOKENS[0]}, LLaMA2-7B"
        fused, cuda = where.against(FUSED), where.against(CUDA, _CUDA_KERNELS[what])
        if what == "d_scores":  # which reads no mask, so both forms are one
            ours, of_cuda = _of_cublas(FUSED, what, cases, 95, ""), _of_cublas(CUDA, what, many, 97, there)
        else:
            percent, form = _FORWARD_PERCENT[where.form], f", {where.form} form, M <= 2048"
            ours, of_cuda = _of_cublas(FUSED, what, few, percent, form), _of_cublas(CUDA, what, many, 95, there)
        return [_without(ours, fused), _without(of_cuda, cuda)]
    if what == "threshold":
        return [_without(_selection(cases), where.against(CUDA))]
    if what == "step":
        at_2048 = [case for case in cases if case["m"] == 2048]
        few = [case for case in cases if case["m"] <= PAPER_MOST_TOKENS]
        # In the plain form auto takes the passes themselves from 1024 tokens on.
        ahead = where.against(AUTO) or ("" if where.form == REGISTER_FED else f"the {where.form} form ran")
        kept = "mask pass + cuBLAS with the masked weight kept / auto, M = 2048"
        return [
            _without(_worst("mask pass + cuBLAS / auto, M = 2048", at_2048, [PASS], AUTO, 1.3), ahead),
            _without(_worst(kept, at_2048, [KEPT], AUTO, 1.3), ahead),
            _worst("the faster of both / auto, everywhere (1 % is noise)", cases, [PASS, KEPT], AUTO, _NOT_SLOWER),
            _worst(f"the paper's layer / auto, M <= {PAPER_MOST_TOKENS}", few, [PAPER], AUTO, 5),
        ]
    return []


#: Without which groups of csrc/cuda the general kernels run in the place of those that were asked.
_CUDA_KERNELS = {"forward": "product_sm90", "d_x": "product_sm90", "d_scores": "score_grad_sm90"}


def _without(goal: Record, why: str) -> Record:
    """The goal, or that it is not applicable, and why."""
    if not why:
        return goal
    quantity = f"{goal['quantity'].split(':')[0]}; {why}"
    return _unmeasured(quantity, goal["rule"], goal["bound"]) | {"state": NOT_APPLICABLE}


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
