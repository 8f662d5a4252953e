"""Compare MFT with its control at equal budgets: the best run of each within the steps, or seconds, of a chosen run.

All runs that were tried with the first seed count, on validation, because test has seen only the chosen runs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mft_study.arms.setting import Setting
from mft_study.outcome import Findings, Outcome
from mft_study.report.statistics import Difference, differences, paired

UNITS = ("steps", "seconds")


@dataclass
class EqualBudget:
    """The best settings within a budget (None: no run fits), and the difference of their validation losses."""

    arm: str
    control: str
    what: str  # steps, seconds
    budget: float
    setting: Setting | None
    control_setting: Setting | None
    difference: Difference | None = None  # arm - control


def equal_budgets(findings: Findings, domain: str, references: Mapping[str, str | None]) -> list[EqualBudget]:
    """Compare each MFT arm that has a control with it. references: each arm's control, or None."""
    found, pairs = [], []
    for arm, control in references.items():
        if control is None or not findings.study.arms[arm].is_mft:
            continue
        ours, theirs = _tried(findings, domain, arm), _tried(findings, domain, control)
        chosen = findings.chosen.get(domain, {})
        both = [o for o in (*ours, *theirs) if o.unit.setting == chosen.get(o.unit.arm)]
        for what in UNITS:
            for budget in sorted({float(getattr(o, what)) for o in both}):
                mask, weights = _best(ours, what, budget), _best(theirs, what, budget)
                mine, its = (None if o is None else o.unit.setting for o in (mask, weights))
                found.append(EqualBudget(arm, control, what, budget, mine, its))
                if mask and weights and mask.measured and weights.measured:
                    pairs.append((found[-1], paired({0: mask.measured}, {0: weights.measured})))
    known = [(one, pair) for one, pair in pairs if pair is not None]
    for (one, _), difference in zip(known, differences([pair for _, pair in known])):
        one.difference = difference
    return found


def outcome_within(findings: Findings, domain: str, arm: str, setting: Setting) -> Outcome:
    """Return the run that an EqualBudget compares for an arm."""
    return next(outcome for outcome in _tried(findings, domain, arm) if outcome.unit.setting == setting)


def budget_sentences(domain: str, found: Iterable[EqualBudget]) -> list[str]:
    """Return one sentence per arm and unit of the budget."""
    said: dict[tuple[str, str], list[str]] = {}
    for one in found:
        said.setdefault((one.arm, one.what), []).append(_words(one))
    return [
        f"{domain}, {arm} and its control, each in at most so many {what}: {'; '.join(parts)}"
        for (arm, what), parts in said.items()
    ]


def _words(one: EqualBudget) -> str:
    budget = f"{one.budget:.0f} steps" if one.what == "steps" else f"{one.budget:.1f} s"
    if one.difference is None:
        missing = one.arm if one.setting is None else one.control
        return f"{budget}: no run of {missing}"
    d = one.difference
    interval = "" if math.isnan(d.low) else f" [{d.low:+.4f}, {d.high:+.4f}]"
    return (
        f"{budget}: {one.arm} ({one.setting}) - {one.control} ({one.control_setting}) {d.estimate + 0.0:+.4f}{interval}"
    )


def _tried(findings: Findings, domain: str, arm: str) -> list[Outcome]:
    """Return an arm's runs with the first seed that stayed finite."""
    where = (domain, arm, findings.study.seeds[0], 0)
    return [
        o
        for o in findings.outcomes
        if (o.unit.domain, o.unit.arm, o.unit.seed, o.unit.part) == where and o.measured is not None
    ]


def _best(tried: list[Outcome], what: str, budget: float) -> Outcome | None:
    return min((o for o in tried if getattr(o, what) <= budget), key=lambda o: o.choice, default=None)
