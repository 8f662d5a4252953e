"""The goals of both backends on an H100: met, NOT MET, not measured, or not applicable.

A goal in percent of cuBLAS is judged only in cases in which the card can reach it. Reading the scores takes time that
the unmasked product does not need, and with few tokens reading is all the work. A worst case is the median of the worst
case. A goal of a kernel that cannot run on the card is not applicable: no figure of another kernel can decide it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..harness import Spread
from .cases import (
    AUTO,
    CUDA,
    CUDA_GOAL_TOKENS,
    CUDA_PACKED,
    DENSE,
    FUSED,
    KEPT,
    PAPER,
    PAPER_MOST_TOKENS,
    PASS,
    SELECTED,
    SHAPES,
    Case,
)
from .results import NOT_MEASURED, Record

MET, NOT_MET, NOT_APPLICABLE = "met", "NOT MET", "not applicable"
_ASKED_OF = "sm_90"
#: auto may choose the passes that it is compared with, and two timings of the same thing differ by about this much.
_NOT_SLOWER = 0.99
#: The share of cuBLAS, in percent, that each form of Triton's masked product (docs/explanation/triton-kernels.md) must
#: reach. The plain one masks through shared memory, where masking and multiplying take turns. triton/choice.py rests on
#: its 60 %.
_FORMS = {"register-fed": 90, "plain": 60}
#: The share of cuBLAS, in percent, that the model of csrc/cuda/tile_cost.h expects at the worst of these shapes, for
#: products by words. By scores it expects 67, limited by L2.
_EXPECTED = {"forward": 94, "d_x": 97, "d_scores": 90}
#: The time of a mask pass divided by that of auto, for a step of 2048 tokens, as triton/cost.py predicts it. Here auto
#: keeps the masked weight from forward to d_x. If it masks twice, the model says 1.12 and 1.03.
_PASS_BY_AUTO, _KEPT_BY_AUTO = 1.2, 1.1
#: The groups of csrc/cuda without which the general kernels run instead.
_CUDA_KERNELS = {"forward": "product_sm90", "d_x": "product_sm90", "d_scores": "score_grad_sm90"}


@dataclass(frozen=True)
class Goal:
    """A quantity, its goal, and its outcome."""

    quantity: str
    bound: float
    unit: str = "x"
    rule: str = "at least"
    measured: Spread | None = None
    state: str = NOT_MEASURED

    def judge(self, measured: Spread, where: str = "") -> "Goal":
        """Return the goal with its outcome; ``where`` names the worst case."""
        median = measured.median
        is_met = median >= self.bound if self.rule == "at least" else median <= self.bound
        quantity = f"{self.quantity}: {where}" if where else self.quantity
        return replace(self, quantity=quantity, measured=measured, state=MET if is_met else NOT_MET)

    def unless(self, why: str) -> "Goal":
        """Return the goal as not applicable, if there is a reason."""
        if not why:
            return self
        quantity = f"{self.quantity.split(':')[0]}; {why}"
        return replace(self, quantity=quantity, measured=None, state=NOT_APPLICABLE)


def goals(what: str, cases: Sequence[Record], environment: Mapping[str, Any]) -> list[Goal]:
    """Return the goals of one kind of case; ``environment`` is that of its document."""
    if what == "correctness":
        of_cuda = [case for case in cases if case["detail"].startswith(CUDA)]
        of_triton = [case for case in cases if case not in of_cuda]
        absent = no_cuda(environment)
        return [_correct("Triton", of_triton), _correct(CUDA, of_cuda).unless(absent and f"without {CUDA}: {absent}")]
    if environment.get("dry_run"):  # emulated kernels: their times say nothing
        cases = [case | {"samples": {}, "failures": {}} for case in cases]
    if what in _CUDA_KERNELS:
        return _of_products(what, cases, environment)
    if what == "threshold":
        return [_of_selection(cases).unless(_against(CUDA, environment))]
    return _of_steps(cases, environment) if what == "step" else []


def no_cuda(environment: Mapping[str, Any]) -> str:
    """Return why the CUDA kernels did not run, "" if they did."""
    library = environment.get("cuda_library", "")
    return library.removeprefix("none: ") if library.startswith("none: ") else ""


def _against(name: str, environment: Mapping[str, Any], kernels: str = "") -> str:
    """Return why a goal of ``name`` does not apply, "" if it does; ``kernels``: the group that it needs."""
    if name == CUDA and no_cuda(environment):
        return f"without {CUDA}: {no_cuda(environment)}"
    if _card(environment) != _ASKED_OF:
        return f"asked of {_ASKED_OF}, this is {_card(environment)}"
    lacking = [why for why in environment.get("cuda_lacks", ()) if kernels and why.startswith(kernels)]
    return f"built without the card's own {lacking[0]}" if name == CUDA and lacking else ""


def _card(environment: Mapping[str, Any]) -> str:
    if environment.get("cuda", "").startswith("hip"):
        return "a GPU of AMD's"
    major, minor = environment.get("capability", (9, 0))
    return f"sm_{major}{minor}"


def _form(environment: Mapping[str, Any]) -> str:
    """Return the form of Triton's masked product; on other cards none goes through registers."""
    is_plain = "plain form" in environment.get("triton_kernels", "") or _card(environment) != _ASKED_OF
    return "plain" if is_plain else "register-fed"


def _correct(backend: str, cases: Sequence[Record]) -> Goal:
    goal = Goal(f"checks of {backend} that fail or were cut short", 0, "", "at most")
    judged = [case for case in cases if "failed" in case]
    missing = [case["detail"] for case in cases if "failed" not in case]
    count = sum(case["failed"] + (not case.get("complete", True)) for case in judged)
    if not judged or (missing and not count):
        return replace(goal, quantity=f"{goal.quantity}; without {', '.join(missing)}")
    return goal.judge(Spread.of([float(count)]))


def _of_products(what: str, cases: Sequence[Record], environment: Mapping[str, Any]) -> list[Goal]:
    form, llama2 = _form(environment), SHAPES["llama2-7b"]
    few = [case for case in cases if case["m"] <= 2048]
    many = [case for case in cases if case["m"] >= CUDA_GOAL_TOKENS[0] and (case["n"], case["k"]) in llama2]
    ours = _of_cublas(FUSED, what, few, _FORMS[form], f", {form} form, M <= 2048")
    if what == "d_scores":  # d_scores reads no mask, so both forms are one
        ours = _of_cublas(FUSED, what, cases, 95, "")
    name, where = CUDA if what == "d_scores" else CUDA_PACKED, f", M >= {CUDA_GOAL_TOKENS[0]}, LLaMA2-7B"
    of_cuda = _of_cublas(name, what, many, _EXPECTED[what], where)
    against_cuda = _against(CUDA, environment, _CUDA_KERNELS[what])
    return [ours.unless(_against(FUSED, environment)), of_cuda.unless(against_cuda)]


def _of_cublas(name: str, what: str, within: Sequence[Record], percent: float, where: str) -> Goal:
    measured = [case for case in within if {DENSE, name} <= case.get("samples", {}).keys()]

    def allowed(case: Record) -> bool:
        return 100 * case["samples"][DENSE]["ms"]["median"] / case["samples"][name]["floor_ms"] >= percent

    possible = [case for case in measured if allowed(case)]
    impossible = len(measured) - len(possible)
    note = f"; {impossible} of {len(measured)} cases left out, where reading the scores alone forbids it"
    goal = Goal(f"{name} {what} in % of cuBLAS{where}{note if impossible else ''}", percent, "%")
    goal = _worst(goal, within, possible, lambda case: Spread(**case["samples"][name]["percent_of_cublas"]))
    broken = sum(name in case.get("failures", {}) for case in within)
    return replace(goal, quantity=f"{goal.quantity}; FAILED in {broken}", state=NOT_MET) if broken else goal


def _of_selection(cases: Sequence[Record]) -> Goal:
    (n, k), name = SELECTED[-1], f"kept_threshold, {CUDA}"
    goal = Goal(f"{CUDA} kept_threshold of {n * k / 1e6:.1f}M bfloat16 scores, us", 80, "us", "at most")
    for case in cases:
        if (case["n"], case["k"], case["detail"]) == (n, k, "bfloat16") and name in case.get("samples", {}):
            return goal.judge(Spread.of([1e3 * ms for ms in case["samples"][name]["rounds_ms"]]))
    return goal


def _of_steps(cases: Sequence[Record], environment: Mapping[str, Any]) -> list[Goal]:
    at_2048 = [case for case in cases if case["m"] == 2048]
    few = [case for case in cases if case["m"] <= PAPER_MOST_TOKENS]
    plain = "the plain form ran" if _form(environment) == "plain" else ""  # there auto takes the passes from M = 1024
    against = _against(AUTO, environment) or plain
    kept = "mask pass + cuBLAS with the masked weight kept / auto, M = 2048"
    return [
        _above("mask pass + cuBLAS / auto, M = 2048", at_2048, [PASS], _PASS_BY_AUTO).unless(against),
        _above(kept, at_2048, [KEPT], _KEPT_BY_AUTO).unless(against),
        _above("the faster of both / auto, everywhere (1 % is noise)", cases, [PASS, KEPT], _NOT_SLOWER),
        _above(f"the paper's layer / auto, M <= {PAPER_MOST_TOKENS}", few, [PAPER], 5),
    ]


def _above(quantity: str, within: Sequence[Record], rivals: Sequence[str], bound: float) -> Goal:
    """Judge the time of the fastest rival / the time of auto."""
    measured = [case for case in within if {*rivals, AUTO} <= case.get("samples", {}).keys()]

    def ratio(case: Record) -> Spread:
        samples = case["samples"]
        fastest = min(rivals, key=lambda name: samples[name]["ms"]["median"])
        return Spread.of([a / b for a, b in zip(samples[fastest]["rounds_ms"], samples[AUTO]["rounds_ms"])])

    return _worst(Goal(quantity, bound), within, measured, ratio)


def _worst(goal: Goal, within: Sequence[Record], judged: Sequence[Record], value: Callable[[Record], Spread]) -> Goal:
    if not judged:
        return goal
    spread, case = min(((value(case), case) for case in judged), key=lambda pair: pair[0].median)
    waiting = sum(each["status"] == NOT_MEASURED for each in within)
    place = Case(case["what"], case["n"], case["k"], case["m"]).place
    return goal.judge(spread, f"worst of {len(judged)}, {place}" + (f"; {waiting} not measured" if waiting else ""))
