"""What tests of the GPU suite share: records of cases as a worker writes them, and a clock that stands still."""

from benchmarks.gpu.cases import AUTO, DENSE, KEPT, PAPER, PASS, SQUARE
from benchmarks.gpu.journal import MEASURED

CEILINGS = {"bytes_per_second": 3e12, "flops_per_second": 8e14}


class Clock:
    """Stands still unless it is told otherwise."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def sample(ms, *, of_cublas=100.0, floor=0.0):
    spread = {"median": ms, "low": ms, "high": ms}
    return {
        "method": "graph", "calls": 1, "ms": spread, "rounds_ms": [ms] * 3, "floor_ms": floor,
        "percent_of_byte_floor": 50.0, "percent_of_flop_floor": 60.0,
        "percent_of_cublas": {"median": of_cublas, "low": of_cublas, "high": of_cublas},
    }  # fmt: skip


def record(what, m, samples, shape=SQUARE):
    return {"what": what, "n": shape[0], "k": shape[1], "m": m, "detail": "", "status": MEASURED, "samples": samples,
            "failures": {}, "left_out": {}}  # fmt: skip


def step(m, auto, passes, kept, paper=100.0, shape=SQUARE):
    times = {DENSE: 1.0, AUTO: auto, PASS: passes, KEPT: kept, PAPER: paper}
    return record("step", m, {name: sample(ms) for name, ms in times.items()}, shape)
