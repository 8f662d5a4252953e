"""How long a launch takes on a card, by its sizes alone: an estimate that ranks tiles, and no measurement.

    seconds = max(memory, multiprocessors) + half of the other + what adds up the parts of a split sum

    memory            bytes of the operands / the card's bandwidth
    multiprocessors   cycles of the one with most jobs: jobs come in waves, so one job more may cost a whole wave.
                      A job: steps x max(multiply-adds / rate, bytes / rate, instructions that mask / rate), its
                      output, and two latencies

A step's bytes come through L2, the mask's with them, whoever asks for them next: a tile of twice the tokens reads the
weight half as often. Blocks that share a multiprocessor hide each other's latencies, and together keep more bytes under
way (Little's law); the number of stages enters in the same way. And together they mask faster: alone, a warp leaves
its scheduler idle between two instructions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cards import L2_RATE, Card

#: Cycles from a request to memory until its bytes are there, 0.5 us. An estimate.
LATENCY = 900
#: Instructions of a warp for each weight that is masked: 0.19 to 0.24 have the loops of products of up to 16 tokens on
#: sm_80 to sm_100, with all that they do.
MASKING = 0.2
#: Cycles between two instructions of one warp, of which a multiprocessor's four schedulers issue one each a cycle. An
#: estimate: results take four to six cycles, and about half of the instructions wait for the one before.
WARP_CYCLES = 2
#: Of the shorter of memory's and multiprocessors' times, what the longer does not hide. An estimate: it lets a launch
#: that memory bounds still prefer to have every multiprocessor at work.
UNHIDDEN = 0.5
#: Seconds of one launch more, that follows at once on the same stream. An estimate.
LAUNCH = 2e-6


@dataclass(frozen=True)
class Jobs:
    """Jobs alike, of one launch."""

    count: int
    steps: int
    multiply_adds: int  # of a step, with what fills up a tile
    read: float  # bytes of a step, the mask's with them
    written: int  # bytes of a job's output, and of what its epilogue reads
    masked: int = 0  # weights that a step masks
    warps: int = 4  # of a block


def seconds(card: Card, jobs: Sequence[Jobs], *, memory: float, blocks: int, stages: int, rate: float) -> float:
    """Of a launch of these kinds of jobs.

    Args:
        memory: bytes that have to come from memory or go there, once each.
        blocks: that share a multiprocessor.
        stages: steps whose bytes a block holds; all but one are under way.
        rate: multiply-adds a cycle and multiprocessor.
    """
    places = {"blocks": blocks, "stages": stages}
    busy = busy_cycles(jobs, card.multiprocessors, **places, rate=rate, l2_rate=card.l2_rate) / card.clock
    waiting = memory / card.bandwidth
    return max(waiting, busy) + UNHIDDEN * min(waiting, busy)


def busy_cycles(
    jobs: Sequence[Jobs], multiprocessors: int, *, blocks: int, stages: int, rate: float, l2_rate: float = L2_RATE
) -> float:
    """Of the multiprocessor that has most to do. csrc/cuda/tile_cost.h has the same for one kind of jobs."""
    count = sum(kind.count for kind in jobs)
    places = multiprocessors * blocks
    at_work = min(blocks, _quotient(count, multiprocessors))
    cycles = [_cycles(kind, at_work, stages, rate, l2_rate) for kind in jobs]
    if len(jobs) == 1:  # whole waves, and of the last one its share
        most = count // places * blocks + _quotient(count % places, multiprocessors)
        return most * cycles[0] + _quotient(most, blocks) * 2 * LATENCY
    # The places take jobs of unlike length in turn: Graham's bound.
    total = sum(kind.count * each for kind, each in zip(jobs, cycles, strict=True))
    return total / multiprocessors + max(cycles) + _quotient(count, places) * 2 * LATENCY


def sum_seconds(card: Card, parts: int, elements: int) -> float:
    """Of the launch that adds up the parts: they are written before and read now, in fp32 and through L2."""
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
