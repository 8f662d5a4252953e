"""Competitors on the same operands: each is checked, then all are timed in interleaved rounds.

The clock of a GPU follows its temperature and power, so every round replays each competitor once, in a new order, and
ratios are taken within a round.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from triton.runtime.errors import TritonError

from mft_kernels.timing import Samples, time_told

from ..harness import Spread
from .cases import CUDA, DENSE
from .device import GRAPH, Device, Timer
from .operands import Inputs
from .results import first_line

#: Exceptions of a competitor after which the others are still measured: torch's, Triton's, and changed interfaces.
FAILURES = (RuntimeError, TritonError, TypeError, AttributeError, ValueError, NotImplementedError)
#: Largest ||difference|| / ||expected||: bf16 rounds by 0.2 %.
MOST_APART = 0.02

_ROUNDS = 11
#: If a call takes longer than this, three rounds suffice.
_LONG_MS = 50.0
_FEW_ROUNDS = 3

#: (bytes that must move, floating-point operations) of each phase of a competitor.
Phases = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Competitor:
    """One way to compute something. ``run`` takes the index of a copy of the operands.

    expected: the correct result on copy 0; None if there is nothing to compare. apart: used instead; returns the
    distance from the correct result. clear: called before the check.
    """

    run: Callable[[int], Any]
    expected: Any = None
    apart: Callable[[], float] | None = None
    clear: Callable[[], object] | None = None
    most_apart: float = MOST_APART
    phases: Phases = ()
    how: str = GRAPH


class Bench:
    """Measures cases: a device, its ceilings, and the operands of the last case."""

    def __init__(self, device: Device, ceilings: Mapping[str, float]) -> None:
        self.device = device
        self.inputs = Inputs(device)
        self.ceilings = ceilings

    def compare(self, competitors: Mapping[str, Competitor], copies: int, *, with_cuda: bool = True) -> dict[str, Any]:
        """Return samples: times and shares of the floors by name; failures: why others have none; left_out.

        ``with_cuda``: whether the CUDA kernels serve this op, so that a run without them leaves something out.
        """
        timers: dict[str, Timer] = {}
        failures: dict[str, str] = {}
        for name, one in competitors.items():
            if why := self._wrong(one):
                failures[name] = why
        right = {name: one for name, one in competitors.items() if name not in failures}
        # A capture empties the allocator's cache, so competitors that allocate while timed come after all captures.
        for name, one in sorted(right.items(), key=lambda item: item[1].how != GRAPH):
            try:
                timers[name] = self.device.timer(one.run, copies, one.how)
            except FAILURES as error:
                failures[name] = reason(error, self.device)
        rounds = _in_rounds(timers, 2 if self.device.dry else _ROUNDS)
        samples = {
            name: self._sample(timers[name], rounds[name], one.phases) for name, one in right.items() if name in timers
        }
        for name, sample in samples.items() if DENSE in samples else ():
            shares = [100 * dense / own for dense, own in zip(rounds[DENSE], rounds[name])]
            sample["percent_of_cublas"] = asdict(Spread.of(shares))
        left_out = {name: why for name, why in self.device.without.items() if with_cuda and name == CUDA}
        return {"copies": copies, "samples": samples, "failures": failures, "left_out": left_out}

    def _wrong(self, competitor: Competitor) -> str:
        """Return why it is not timed: it fails, or computes something else; "" if it is right."""
        if competitor.expected is None and competitor.apart is None:
            return ""
        try:
            if competitor.clear is not None:
                competitor.clear()
            apart = competitor.apart() if competitor.apart else difference(competitor.run(0), competitor.expected)
        except FAILURES as error:
            return reason(error, self.device)
        if apart <= competitor.most_apart:
            return ""
        return f"wrong: {apart:.3g} from the eager form, at most {competitor.most_apart:g}"

    def _sample(self, timer: Timer, rounds: list[float], phases: Phases) -> dict[str, Any]:
        sample: dict[str, Any] = {"method": timer.method} | ({"note": timer.note} if timer.note else {})
        sample |= {"calls": timer.calls, "ms": asdict(Spread.of(rounds))}
        sample["rounds_ms"] = [float(f"{ms:.5g}") for ms in rounds]
        if phases:
            rates = self.ceilings["bytes_per_second"], self.ceilings["flops_per_second"]
            by_bytes, by_flops, floor = floor_ms(phases, *rates)
            median = sample["ms"]["median"]
            sample["floor_ms"] = floor
            sample["percent_of_byte_floor"] = 100 * by_bytes / median
            sample["percent_of_flop_floor"] = 100 * by_flops / median
        return sample


def floor_ms(phases: Phases, byte_rate: float, flop_rate: float) -> tuple[float, float, float]:
    """Return ms (by bytes alone, by operations alone, the larger of both phase by phase); rates are per second."""
    by_bytes, by_flops = [1e3 * b / byte_rate for b, _ in phases], [1e3 * f / flop_rate for _, f in phases]
    return sum(by_bytes), sum(by_flops), sum(map(max, by_bytes, by_flops))


def difference(got: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Return the largest ||got - expected|| / ||expected|| over all outputs; NaN counts as infinity."""
    shares = [
        ((g.float() - e.float()).norm() / e.float().norm()).item() for g, e in zip(outputs(got), outputs(expected))
    ]
    return max(math.inf if math.isnan(share) else share for share in shares)


def outputs(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs of one product or several as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def reason(error: BaseException, device: Device) -> str:
    """Return the reason in one line; raise if the device is lost, because nothing else would run either."""
    device.synchronize()
    return f"{type(error).__name__}: {first_line(error)}"


def _in_rounds(timers: Mapping[str, Timer], rounds: int) -> Samples:
    """Return milliseconds per call, one sample per round; the slowest take part only in the first rounds."""
    samples = time_told({name: timer.replay for name, timer in timers.items()}, min(rounds, _FEW_ROUNDS))
    fast = {name: timer.replay for name, timer in timers.items() if timer.estimate <= _LONG_MS}
    for name, later in time_told(fast, max(0, rounds - _FEW_ROUNDS), seed=1).items():
        samples[name] += later
    return samples
