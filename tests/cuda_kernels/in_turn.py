"""Test cases: every combination of some arguments, each with one value of another argument, taken in turn."""

import itertools
from collections.abc import Sequence
from typing import Any


def in_turn(beside: Sequence[Any], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return [(one of beside, one of each axis)]: every instance of a kernel once, with its shapes in turn.

    Each value of ``beside`` meets each value of each axis, so that a failure of any such pair is found. The full
    product would be len(beside) times as long. Raises: ValueError if two of the values would not meet.
    """
    cases, met = [], set()
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        turn = sum(places) % len(beside)
        cases.append((beside[turn], *(axis[place] for axis, place in zip(axes, places, strict=True))))
        met |= {(turn, number, place) for number, place in enumerate(places)}
    if len(met) < len(beside) * sum(map(len, axes)):
        raise ValueError(f"too few cases for {len(beside)} values in turn: not every two of them meet")
    return cases
