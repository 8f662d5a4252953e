"""Collect the sums per document that a study stores, and compute intervals from them again."""

from collections.abc import Iterable, Mapping
from typing import Any

from mft_study.evidence.sums import Run, Sums
from mft_study.outcome import Findings
from mft_study.report.equal_budgets import EqualBudget, outcome_within
from mft_study.report.general import tested_runs, validation_runs
from mft_study.report.statistics import DRAWS, Difference, differences, paired
from mft_study.report.table import DomainTable


def sums_of(findings: Findings, tables: Mapping[str, DomainTable]) -> Sums:
    """Return the sums of every tested run on validation and test, per domain and general text, and of equal budgets."""
    sums, study = Sums(), findings.study

    def add(domain: str, split: str, text: str, arm: str, runs: Mapping[int, Run]) -> None:
        if study.is_one_model(arm) and len(runs) == 1:
            runs = dict.fromkeys(study.all_seeds, next(iter(runs.values())))
        if runs:
            sums.add(f"{domain}/{split}/{text}", arm, runs, findings.documents.get((domain, split, text), {}))

    for domain, table in tables.items():
        for row in table.rows:
            add(domain, "test", domain, row.arm, findings.test[domain][row.arm])
            add(domain, "validation", domain, row.arm, findings.validation.get(domain, {}).get(row.arm, {}))
            for text in table.general:
                add(domain, "test", text, row.arm, tested_runs(findings, domain, row.arm, text))
                add(domain, "validation", text, row.arm, validation_runs(findings, domain, row.arm, text))
            if row.bytes is not None:
                sums.add_bytes(domain, row.arm, row.bytes)
        for name, runs in _compared_at_budgets(findings, domain, table.equal_budgets).items():
            add(domain, "validation", domain, name, runs)
    return sums


def recomputed(
    sums: Sums,
    domain: str,
    arm: str,
    other: str,
    metric: str = "loss",
    *,
    text: str | None = None,
    split: str = "test",
    draws: int = DRAWS,
) -> Difference:
    """Return arm - other with its interval and p, before Holm's correction. metric: see statistics.paired.

    text: a general text in place of the domain's own. draws: for "comparisons" what dominance.draws_of gives.
    Raises: ValueError if the sums are missing, or the arms have no seed in common that has the metric.
    """
    of_arm, of_other = (sums.runs(domain, name, text=text, split=split) for name in (arm, other))
    pair = paired(of_arm, of_other, metric)
    if pair is None:
        raise ValueError(f"{arm!r} and {other!r} must have a seed in common that has {metric!r}, got none")
    return differences([pair], draws=draws)[0]


# ---------------------------------------------------------------------------------------------- private


def _compared_at_budgets(findings: Findings, domain: str, budgets: Iterable[EqualBudget]) -> dict[str, dict[int, Run]]:
    """Return the runs that were compared, with the first seed, by the name of arm and setting."""
    found: dict[str, dict[int, Run]] = {}
    for one in budgets:
        for arm, setting in ((one.arm, one.setting), (one.control, one.control_setting)):
            if setting is not None and one.difference is not None:
                outcome = outcome_within(findings, domain, arm, setting)
                assert outcome.measured is not None, "it was compared"
                found[_name(arm, setting)] = {outcome.unit.seed: outcome.measured}
    return found


def _name(arm: str, setting: Any) -> str:
    return f"{arm}, {setting}"  # no arm's own name has a comma
