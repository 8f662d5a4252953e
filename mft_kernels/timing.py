"""Interleaved timing, because a shared machine drifts by more than the differences that are measured.

Every round runs each competitor once, in a new order. Ratios are taken within each round, and then their median over
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
Around = Callable[[str], AbstractContextManager[object]]  # from a competitor's name, the context to call it in


def time_interleaved(
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    *,
    seed: int = 0,
    around: Around = nullcontext,
) -> Samples:
    """Return the milliseconds per call of each competitor: one sample per round, the mean of ``calls`` calls in a row.

    Each competitor is called once before, without timing.
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
    """Run time_interleaved with as many rounds as fit in ``seconds``, between ``least`` and ``most``.

    A sample lasts SAMPLE_MS or more, so that a fast competitor is called many times in a row.
    """
    for name, call in competitors.items():
        _milliseconds(call, around(name))
    once = {name: _milliseconds(call, around(name)) for name, call in competitors.items()}
    calls = {name: max(1, math.ceil(SAMPLE_MS / took)) for name, took in once.items()}
    a_round = sum(once[name] * calls[name] for name in once)
    return _interleave(competitors, max(least, min(most, int(seconds * 1e3 / a_round))), calls, 0, around)


def time_told(orders: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> Samples:
    """Interleave ``orders``, functions that return the milliseconds that they took."""
    order = random.Random(seed)
    samples: Samples = {name: [] for name in orders}
    for _ in range(rounds):
        for name in order.sample(list(orders), len(orders)):
            samples[name].append(orders[name]())
    return samples


def median_ratio(samples: Samples, above: str, below: str) -> float:
    """Return the median over the rounds of the time of ``above`` divided by that of ``below``."""
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
