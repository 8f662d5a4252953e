"""How an arm's grid grows: by one setting at a time next to the best one, until the best one lies inside.

The best setting lies inside if both of its neighbours in each direction (rate, epochs, keep ratio) were tried, with all
other values as in the best. Untried neighbours are tried in this order of directions, the smaller value first. Each may
become the new best, and then its own neighbours count.

A direction with a single declared value does not grow. Neither do beta1 and alpha: momentum is on or off, and the ends
of alpha are the two models that it lies between.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mft_study.arms.setting import Setting

DIRECTIONS = {"lr": "rate", "epochs": "number of epochs", "keep_ratio": "keep ratio"}


@dataclass(frozen=True)
class Neighbour:
    """An untried setting next to the best one in one direction."""

    name: str  # the field of Setting that differs
    above: bool
    setting: Setting

    @property
    def value(self) -> float:
        return getattr(self.setting, self.name)


@dataclass(frozen=True)
class OpenEnd:
    """An arm whose best setting lies at an end of its grid, because the budget for more settings is spent."""

    domain: str
    arm: str
    what: str  # "rate"
    value: float
    above: bool
    remedy: str  # overrides that let the study go on, "extensions=9"


def neighbours(best: Setting, grid: Collection[Setting], tried: Collection[Setting]) -> list[Neighbour]:
    """Return the untried neighbours of best.

    A direction's steps are the values of grid and tried; beyond the ends, the ratio of the last two goes on.
    """
    found = []
    for name in DIRECTIONS:
        if len({getattr(setting, name) for setting in grid}) < 2:
            continue
        here = getattr(best, name)
        values = sorted({getattr(setting, name) for setting in (*grid, *tried)})
        for above in (False, True):
            farther = [value for value in values if (value > here if above else value < here)]
            value = (min(farther) if above else max(farther)) if farther else _next_value(name, values, above)
            beside: Any = {name: value}  # Setting has a field of another type
            if replace(best, **beside) not in tried:  # beyond keep ratio 0 or 1 the value is best's own
                found.append(Neighbour(name, above, replace(best, **beside)))
    return found


def _next_value(name: str, values: list[float], above: bool) -> float:
    """Return the next value beyond an end, to three digits."""
    end, inner = (values[-1], values[-2]) if above else (values[0], values[1])
    if name == "keep_ratio":  # scale the dropped share, or the kept one if that would drop everything
        dropped, before = 1 - end, 1 - inner
        further = _rounded(dropped * (dropped / before)) if before else 1.0
        if further < 1:
            return round(1 - further, 12)
    return _rounded(end * (end / inner))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
