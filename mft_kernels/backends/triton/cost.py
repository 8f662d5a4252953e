"""Estimate how long a launch takes on a card, by its sizes alone. The estimate ranks tiles; it is not a measurement.

    seconds = max(memory, multiprocessors) + half of the other + the time to add up the parts of a split sum

    memory            bytes of the operands / the card's bandwidth
    multiprocessors   cycles of the multiprocessor with most jobs. Jobs come in waves, so one more job may cost a whole
                      wave. A job: steps x max(multiply-adds / rate, bytes / rate, masking instructions / rate), plus
                      its output and two latencies

Each step reads its bytes, with those of the mask, through L2, even if another block reads them too. So a tile of twice
the tokens reads the weight half as often. Blocks that share a multiprocessor hide each other's latencies, and together
keep more bytes in flight (Little's law). More stages have the same effect. Such blocks also mask faster, because a warp
alone leaves its scheduler idle between two instructions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cards import L2_RATE, Card

#: Cycles from a request to memory until its bytes arrive, 0.5 us. An estimate.
LATENCY = 900
#: Instructions of a warp per masked weight. The loops of products of up to 16 tokens have 0.19 to 0.24 on sm_80 to
#: sm_100, with all instructions counted.
MASKING = 0.2
#: Cycles between two instructions of one warp. A multiprocessor's four schedulers issue one instruction each per cycle.
#: An estimate: results take four to six cycles, and about half of the instructions wait for the one before.
WARP_CYCLES = 2
#: The share of the shorter time, memory's or the multiprocessors', that the longer one does not hide. An estimate: with
#: it, a launch that memory bounds still prefers tiles that keep every multiprocessor at work.
UNHIDDEN = 0.5
#: Seconds of one more launch that follows at once on the same stream. An estimate.
LAUNCH = 2e-6


@dataclass(frozen=True)
class Jobs:
    """Equal jobs of one launch."""

    count: int
    steps: int
    multiply_adds: int  # per step, including the padding of a tile
    read: float  # bytes per step, including the mask's
    written: int  # bytes per job: its output, and what its epilogue reads
    masked: int = 0  # weights masked per step
    warps: int = 4  # per block


def seconds(card: Card, jobs: Sequence[Jobs], *, memory: float, blocks: int, stages: int, rate: float) -> float:
    """Return the estimated seconds of a launch with these kinds of jobs.

    Args:
        memory: bytes that have to be read from memory or written to it, once each.
        blocks: how many share a multiprocessor.
        stages: steps whose bytes a block holds; all but one are in flight.
        rate: multiply-adds per cycle and multiprocessor.
    """
    places = {"blocks": blocks, "stages": stages}
    busy = busy_cycles(jobs, card.multiprocessors, **places, rate=rate, l2_rate=card.l2_rate) / card.clock
    waiting = memory / card.bandwidth
    return max(waiting, busy) + UNHIDDEN * min(waiting, busy)


def busy_cycles(
    jobs: Sequence[Jobs], multiprocessors: int, *, blocks: int, stages: int, rate: float, l2_rate: float = L2_RATE
) -> float:
    """Return the cycles of the busiest multiprocessor. csrc/cuda/tile_cost.h has the same for one kind of jobs."""
    count = sum(kind.count for kind in jobs)
    places = multiprocessors * blocks
    at_work = min(blocks, _quotient(count, multiprocessors))
    cycles = [_cycles(kind, at_work, stages, rate, l2_rate) for kind in jobs]
    if len(jobs) == 1:  # whole waves, and the share of the last one
        most = count // places * blocks + _quotient(count % places, multiprocessors)
        return most * cycles[0] + _quotient(most, blocks) * 2 * LATENCY
    # The places take jobs of different lengths in turn: Graham's bound.
    total = sum(kind.count * each for kind, each in zip(jobs, cycles, strict=True))
    return total / multiprocessors + max(cycles) + _quotient(count, places) * 2 * LATENCY


def sum_seconds(card: Card, parts: int, elements: int) -> float:
    """Return the seconds that parts cost: they are written, then a launch reads and adds them, in fp32 through L2."""
    if parts == 1:
        return 0.0
    return LAUNCH + (2 * parts * 4 * elements) / (card.l2_rate * card.multiprocessors * card.clock)


def _cycles(jobs: Jobs, at_work: int, stages: int, rate: float, l2_rate: float) -> float:
    under_way = min(l2_rate, at_work * (stages - 1) * jobs.read / LATENCY)
    issued = min(4, at_work * jobs.warps / WARP_CYCLES)
    step = max(jobs.multiply_adds / rate, jobs.read / under_way, MASKING * jobs.masked / issued)
    return jobs.steps * step + jobs.written / l2_rate


def _quotient(a: int, b: int) -> int:
    return -(-a // b)
