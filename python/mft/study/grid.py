"""How an arm's grid grows: by one setting at a time beside its best one, until that lies inside.

The best setting lies inside if both of its neighbours in each direction (rate, epochs, keep ratio) were tried with its
other values. Those that were not are tried in this order, the smaller one first; each may become the best, and then its
own neighbours count. A direction of which one value is declared is no grid: it does not grow. Neither do beta1 and
alpha: momentum is on or off, and the ends of alpha are the ends of what it lies between.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mft.study.arms.setting import Setting

DIRECTIONS = {"lr": "rate", "epochs": "number of epochs", "keep_ratio": "keep ratio"}


@dataclass(frozen=True)
class Neighbour:
    """A setting beside the best one that was not tried: next to it in one direction."""

    name: str  # of the field of Setting
    above: bool
    setting: Setting

    @property
    def value(self) -> float:
        return getattr(self.setting, self.name)


@dataclass(frozen=True)
class OpenEnd:
    """That the best setting of an arm lies at an end of its grid, where the budget for more was spent."""

    domain: str
    arm: str
    what: str  # "rate"
    value: float
    above: bool
    remedy: str  # overrides with which the study goes on, "extensions=9"

    def __str__(self) -> str:
        return (
            f"{self.domain}, {self.arm}: its best {self.what}, {self.value:g}, lies at the end of its grid: no "
            f"{'larger' if self.above else 'smaller'} one was tried beside it; run the same command with {self.remedy} "
            "to go on"
        )


def neighbours(best: Setting, grid: Collection[Setting], tried: Collection[Setting]) -> list[Neighbour]:
    """Those that were not tried. grid: what was declared; its values, and those of tried, are the steps of a direction.

    Beyond the ends a direction goes on in the ratio of its last two values.
    """
    found = []
    for name in DIRECTIONS:
        if len({getattr(setting, name) for setting in grid}) < 2:
            continue
        here = getattr(best, name)
        values = sorted({getattr(setting, name) for setting in (*grid, *tried)})
        for above in (False, True):
            farther = [value for value in values if (value > here if above else value < here)]
            value = (min(farther) if above else max(farther)) if farther else _beyond(name, values, above)
            beside: Any = {name: value}  # Setting has a field of another type
            if replace(best, **beside) not in tried:  # beyond 0 and 1 there is no keep ratio but themselves
                found.append(Neighbour(name, above, replace(best, **beside)))
    return found


def _beyond(name: str, values: list[float], above: bool) -> float:
    """The next value beyond an end, to three digits."""
    end, inner = (values[-1], values[-2]) if above else (values[0], values[1])
    return _beyond_ratio(end, inner) if name == "keep_ratio" else _rounded(end * (end / inner))


def _beyond_ratio(end: float, inner: float) -> float:
    """In the ratio of what is dropped, while something stays; then of what is kept."""
    dropped, before = 1 - end, 1 - inner
    further = _rounded(dropped * (dropped / before)) if before else 1.0
    return round(1 - further, 12) if further < 1 else _rounded(end * (end / inner))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
