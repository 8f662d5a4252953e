"""Forgetting: each arm's loss on text that no arm was trained on, compared with the full fine-tune and its start."""

from collections.abc import Mapping
from dataclasses import dataclass

from mft_study.arms.full import Base, Full
from mft_study.config import StudyConfig
from mft_study.outcome import Findings, General, Unit
from mft_study.report.statistics import Difference, Paired, deciding_metric, differences, mean, paired

Runs = Mapping[int, General]


@dataclass
class OnText:
    """An arm on the test split of a text; means over seeds, differences of losses paired."""

    loss: float
    kl: float  # nats per token, from the model at which the arm started
    minus_full: Difference | None = None
    minus_start: Difference | None = None  # for the full fine-tune: from the base model


def general_tables(findings: Findings) -> dict[str, dict[str, dict[str, OnText]]]:
    """Return each arm's results on the general texts, by domain, arm and text."""
    study, tables = findings.study, dict[str, dict[str, dict[str, OnText]]]()
    places: list[tuple[OnText, str]] = []
    pairs: list[Paired] = []
    for domain, arms in findings.general.items():
        tables[domain] = {}
        for arm in arms:
            tables[domain][arm] = {}
            for text in study.general_of(domain):
                runs = tested_runs(findings, domain, arm, text)
                if not runs:
                    continue
                found = OnText(
                    mean(run.evaluation.loss for run in runs.values()), mean(run.mean_kl for run in runs.values())
                )
                tables[domain][arm][text] = found
                for name, reference in (
                    ("minus_full", study.first_of_kind(Full)),
                    ("minus_start", start_of(study, arm)),
                ):
                    others = tested_runs(findings, domain, reference, text)
                    if reference != arm and (pair := paired(runs, others)) is not None:
                        places.append((found, name))
                        pairs.append(pair)
    for (found, name), difference in zip(places, differences(pairs), strict=True):
        setattr(found, name, difference)
    return tables


def start_of(study: StudyConfig, arm: str) -> str | None:
    """Return the arm at whose model an arm started; None for the base model, and if no arm has that model."""
    return study.start_of(arm) or (None if study.is_base(arm) else study.first_of_kind(Base))


def tested_runs(findings: Findings, domain: str, arm: str | None, text: str) -> Runs:
    """Return an arm's models on a text, by seed. A base model that is one for all seeds counts for each."""
    found = findings.general.get(domain, {}).get(arm, {}) if arm is not None else {}
    runs = {seed: texts[text] for seed, texts in found.items() if text in texts}
    if runs and arm is not None and findings.study.is_one_model(arm):
        return dict.fromkeys(findings.study.all_seeds, next(iter(runs.values())))
    return runs


def validation_runs(findings: Findings, domain: str, arm: str, text: str) -> Runs:
    """Return the same for an arm's chosen runs on the text's validation split."""
    setting = findings.chosen.get(domain, {}).get(arm)
    if setting is None:
        return {}
    units = {Unit(domain, arm, seed, setting): seed for seed in findings.study.all_seeds}
    return {
        units[outcome.unit]: outcome.general[text]
        for outcome in findings.outcomes
        if outcome.unit in units and text in outcome.general
    }


def validation_difference(findings: Findings, domain: str, arm: str, against: str | None) -> float | None:
    """Return the mean difference in the deciding metric, on validation and over the seeds of both."""
    measured = findings.validation.get(domain, {})
    if against is None or arm not in measured or against not in measured:
        return None
    pair = paired(measured[arm], measured[against], deciding_metric(findings.study))
    return None if pair is None else pair.estimate
