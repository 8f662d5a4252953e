"""Interleaved timing: a shared machine drifts by more than what is measured.

So every round runs each competitor once, in a new order; ratios are taken within a round, and then their median over
the rounds. Times are milliseconds.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

SAMPLE_MS = 2.0  # the clock and the interpreter are then below 1 % of a sample

Samples = dict[str, list[float]]
Around = Callable[[str], AbstractContextManager[object]]  # of a competitor's name: what holds while it is called


def time_interleaved(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    *,
    seed: int = 0,
    around: Around = nullcontext,
) -> Samples:
    """Milliseconds a call of each competitor, one sample a round, the mean of ``calls`` calls in a row.

    One call of each, not timed, comes first.
    """
    for name, call in competitors.items():
        _milliseconds(call, around(name))
    return _interleave(competitors, rounds, dict.fromkeys(competitors, calls), seed, around)


def time_within(
    competitors: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int = 5,
    most: int = 21,
    around: Around = nullcontext,
) -> Samples:
    """time_interleaved with as many rounds as fit in ``seconds``, between ``least`` and ``most``.

    A sample lasts SAMPLE_MS or more, so that a fast competitor is called many times in a row.
    """
    for name, call in competitors.items():
        _milliseconds(call, around(name))
    once = {name: _milliseconds(call, around(name)) for name, call in competitors.items()}
    calls = {name: max(1, math.ceil(SAMPLE_MS / took)) for name, took in once.items()}
    a_round = sum(once[name] * calls[name] for name in once)
    return _interleave(competitors, max(least, min(most, int(seconds * 1e3 / a_round))), calls, 0, around)


def time_told(orders: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> Samples:
    """Interleaved too, where each order returns the milliseconds that it took."""
    order = random.Random(seed)
    samples: Samples = {name: [] for name in orders}
    for _ in range(rounds):
        for name in order.sample(list(orders), len(orders)):
            samples[name].append(orders[name]())
    return samples


def median_ratio(samples: Samples, above: str, below: str) -> float:
    """Time of ``above`` in units of ``below``, round by round; its median."""
    return statistics.median(a / b for a, b in zip(samples[above], samples[below]))


def _interleave(
    competitors: Mapping[str, Callable[[], object]], rounds: int, calls: Mapping[str, int], seed: int, around: Around
) -> Samples:
    def timed(name: str) -> Callable[[], float]:
        return lambda: _milliseconds(competitors[name], around(name), calls[name])

    return time_told({name: timed(name) for name in competitors}, rounds, seed)


def _milliseconds(call: Callable[[], object], around: AbstractContextManager[object], calls: int = 1) -> float:
    with around:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e3 / calls
