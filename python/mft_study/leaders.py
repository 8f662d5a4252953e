"""Which arms of a study lead on validation, and therefore run with further seeds."""

import math
from collections.abc import Mapping, Sequence

from mft_study.config import LeadersConfig, StudyConfig
from mft_study.outcome import Outcome


def leading_arms(study: StudyConfig, leaders: LeadersConfig, runs: Mapping[str, Sequence[Outcome]]) -> set[str]:
    """Return the arms that lead in one domain (see LeadersConfig). runs: by arm, those of its chosen setting."""
    found: set[str] = set()
    limits: list[float] = [*leaders.max_bytes] or [math.inf]
    for most in limits:
        ranked = _ranked(study, runs, most)
        found.update(ranked[: leaders.arms], [arm for arm in ranked if study.arms[arm].is_mft][:1])
    return found.union(*map(study.all_needs, found))


def _ranked(study: StudyConfig, runs: Mapping[str, Sequence[Outcome]], most: float) -> list[str]:
    """Return the arms that may lead and store at most ``most`` bytes, the best on validation first."""
    means = {}
    for arm, own in runs.items():
        config, sizes = study.arms[arm], [run.bytes for run in own if run.bytes is not None]
        fits = math.isinf(most) or (bool(sizes) and sum(sizes) <= most * len(sizes))
        if config.tuned and config.follows and not config.whole_model and fits:
            means[arm] = sum(run.choice for run in own) / len(own)
    return sorted(means, key=means.__getitem__)
