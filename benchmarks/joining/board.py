"""The stored study board-small in the planner's terms: every run's validation loss, bytes and seconds."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks.records import RESULTS
from mft.evaluation.evaluate import Evaluation
from mft_study.arms.setting import Setting
from mft_study.config import StudyConfig
from mft_study.load import load_study
from mft_study.outcome import Measured, Outcome, Unit

NAME = "board-small"
_FIELDS = Setting.__dataclass_fields__


@cache
def tables() -> dict[str, dict[str, Any]]:
    """Return the tables by domain."""
    return json.loads((RESULTS / f"compare-{NAME}.json").read_text())["domains"]


@cache
def study() -> StudyConfig:
    return load_study(NAME)


def run_of(unit: Unit) -> tuple[Outcome, float]:
    """Return a run's outcome and seconds.

    The study may not have run this unit, because it chose by bytes that its table does not keep for each run. Then
    another run of the arm is used.
    """
    if unit in runs():
        return runs()[unit]
    other = next(run for known, run in runs().items() if (known.domain, known.arm) == (unit.domain, unit.arm))
    return replace(other[0], unit=unit), other[1]


@cache
def runs() -> dict[Unit, tuple[Outcome, float]]:
    """Return each run's outcome and its seconds of training, which are 0 for arms that train nothing."""
    found = {}
    for domain, table in tables().items():
        found |= _runs(domain, table)
    return found


def _runs(domain: str, table: dict[str, Any]) -> dict[Unit, tuple[Outcome, float]]:
    sizes = {row["arm"]: row["bytes"] for row in table["rows"]}
    found = {}
    for trial in table["trials"]:
        values = {name: trial[name] for name in _FIELDS if name in trial}
        unit = Unit(domain, trial["arm"], trial["seed"], Setting(**values), trial["part"])
        loss = trial["validation_loss"]
        one = torch.ones(1, dtype=torch.float64)
        measured = None if loss is None else Measured(Evaluation(torch.zeros(1), one, one * loss, one))
        size = None if sizes[trial["arm"]] is None else int(sizes[trial["arm"]])
        outcome = Outcome(unit, measured, bytes=size, diverged=trial["diverged"])
        found[unit] = outcome, trial["seconds"] or 0.0
    return found
