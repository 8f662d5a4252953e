"""Which runs a regime needs, that finished runs are not repeated, and which differences it could show."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest

from benchmarks.regimes.findings import Documents, compare_arms
from benchmarks.regimes.runs import CHOICE, Regime, Run, best_rate, complete, open_ends
from mft.engines.step import NonFiniteLoss

BEST = {"low": 1e-3, "high": 8e-3}


@dataclass(frozen=True)
class Bowls(Regime):
    """A regime without a model, whose loss is least at BEST."""

    asked: ClassVar[list[Run]] = []
    stops_at: ClassVar[list[Run | None]] = [None]

    def run(self, base, run):
        if run == self.stops_at[0]:
            raise KeyboardInterrupt
        self.asked.append(run)
        if run.lr > 1:
            raise NonFiniteLoss("the loss must stay finite")
        return {CHOICE: abs(math.log(run.lr / BEST[run.arm])) + run.seed}


@pytest.fixture
def bowls(tmp_path):
    Bowls.asked.clear()
    Bowls.stops_at[0] = None
    return lambda **changes: Bowls(**{"rates": {"low": [1e-3, 2e-3], "high": [1e-3, 2e-3]}, "seeds": [0, 1]} | changes)


def test_an_arm_tries_rates_beyond_its_grid_until_the_best_lies_inside(bowls, tmp_path):
    regime = bowls(workers=1, extensions=4)
    found = complete(regime, tmp_path)
    assert best_rate(regime, found, "low") == 1e-3
    assert best_rate(regime, found, "high") == 8e-3
    tried = sorted(run.lr for run in found if run.arm == "high" and run.seed == 0)
    assert tried == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert [run for run in found if run.seed == 1] == [Run("low", 1e-3, 1), Run("high", 8e-3, 1)]
    assert open_ends(regime, found) == []


def test_a_best_rate_at_the_end_of_what_was_tried_is_said(bowls, tmp_path):
    regime = bowls(workers=1, extensions=1)
    found = complete(regime, tmp_path)
    assert open_ends(regime, found) == ["high: its best rate, 0.004, lies at the end of those that were tried"]


def test_what_was_finished_before_an_interruption_is_not_run_again(bowls, tmp_path):
    regime = bowls(workers=1, extensions=0)
    Bowls.stops_at[0] = Run("high", 2e-3, 0)
    with pytest.raises(KeyboardInterrupt):
        complete(regime, tmp_path)
    before = list(Bowls.asked)
    assert len(before) == 3
    Bowls.stops_at[0] = None
    found = complete(regime, tmp_path)
    assert len(Bowls.asked) == len(set(Bowls.asked)) == len(found) == 6


def test_an_arm_that_diverges_at_every_rate_is_named(bowls, tmp_path):
    regime = bowls(rates={"low": [2.0, 4.0]}, workers=1, extensions=0)
    with pytest.raises(RuntimeError, match="low must stay finite at one of its rates"):
        complete(regime, tmp_path)


def test_every_text_counts_as_much_as_any_other_in_a_difference():
    documents = Documents({"long": ["a", "b"], "short": ["c", "d"]}, {"long": [900, 100], "short": [6, 4]})
    nats = {"control": {0: {"long": [1000, 100], "short": [6, 4]}}, "mask": {0: {"long": [1900, 200], "short": [6, 4]}}}
    found = compare_arms(nats, "control", documents)
    assert found["mask"]["estimate"] == pytest.approx(0.5)
    assert list(found) == ["mask"]
    assert documents.mean_loss(nats["mask"][0]) == pytest.approx((2.1 + 1) / 2)
