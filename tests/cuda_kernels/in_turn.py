"""Cases of a test: every combination of some arguments, each with one value of another, which goes round."""

import itertools
from collections.abc import Sequence
from typing import Any


def in_turn(beside: Sequence[Any], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """[(one of beside, one of each axis)]: a kernel's every instance once, and its shapes in turn.

    Each value of ``beside`` meets each value of each axis: what fails for the two of them is seen, and a product of all
    takes as many times longer as there are values beside. Raises: ValueError if two would not meet.
    """
    cases, met = [], set()
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        turn = sum(places) % len(beside)
        cases.append((beside[turn], *(axis[place] for axis, place in zip(axes, places, strict=True))))
        met |= {(turn, number, place) for number, place in enumerate(places)}
    if len(met) < len(beside) * sum(map(len, axes)):
        raise ValueError(f"too few cases for {len(beside)} values in turn: not every two of them meet")
    return cases
