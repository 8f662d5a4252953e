"""Helpers that tests of the GPU suite share: records and documents as a worker writes them, devices without a GPU."""

import torch

from benchmarks.gpu.cases import AUTO, CUDA, FUSED, SQUARE, WHATS
from benchmarks.gpu.results import MEASURED, Results

CEILINGS = {"bytes_per_second": 3e12, "flops_per_second": 8e14}
#: An environment like the suite's on an H100.
HERE = {
    "device": "a card", "date": "today", "sources": "0123", "triton": "3.6.1", "capability": [9, 0],
    "triton_kernels": "Triton 3.6, sm_90, swapped form (docs/explanation/triton-kernels.md)",
    "cuda_library": "CUDA C++, sm_80 sm_90",
}  # fmt: skip


def sample(ms, *, of_cublas=100.0, floor=0.0):
    spread = {"median": ms, "low": ms, "high": ms}
    return {
        "method": "graph", "calls": 1, "ms": spread, "rounds_ms": [ms] * 3, "floor_ms": floor,
        "percent_of_byte_floor": 50.0, "percent_of_flop_floor": 60.0,
        "percent_of_cublas": {"median": of_cublas, "low": of_cublas, "high": of_cublas},
    }  # fmt: skip


def record(what, m, samples, shape=SQUARE, detail=""):
    return {"what": what, "n": shape[0], "k": shape[1], "m": m, "detail": detail, "status": MEASURED,
            "samples": samples, "failures": {}, "left_out": {}}  # fmt: skip


def check(detail, status=MEASURED, **fields):
    return record("correctness", 0, {}, (0, 0), detail) | {"status": status} | fields


def documents_of(*records, environment=HERE):
    """Return documents as results.read returns them."""
    return [
        {"what": what, "environment": environment, "ceilings": CEILINGS, "cases": own}
        for what in WHATS
        if (own := [each for each in records if each["what"] == what])
    ]


def results_of(out, cases, environment=HERE):
    """Begin a run in a folder; all of its cases are still waiting."""
    results = Results(out, "a run")
    results.begin(cases, environment, CEILINGS)
    return results


def on_host(**changes):
    """Return the dry run's device without an emulator: the reference replaces our kernels."""
    from benchmarks.gpu import device

    class OnHost(device.Interpreter):
        backends = {FUSED: "reference", AUTO: "auto", CUDA: "cuda_on_host"}  # noqa: RUF012

        def __init__(self):
            self.without = {CUDA: "its library is not built"}

    made = OnHost()
    vars(made).update(changes)
    return made


class Card:
    """A stand-in for torch.cuda: every call on a stream takes ``ms`` of its time."""

    def __init__(self, monkeypatch, capture_fails=False):
        self.now, card = 0.0, self
        self.log: list = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = card.now

            def synchronize(self):
                card.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at or 1.0

        class Graph:
            calls: list = []  # noqa: RUF012

            def replay(self):
                card.log.append(f"replay {len(self.calls)}")
                for ms in self.calls:
                    card.now += ms

        class Capture:
            def __init__(self, graph, *, stream, capture_error_mode):
                self.graph = graph

            def __enter__(self):
                self.before, card.recorded = card.now, []

            def __exit__(self, *error):
                self.graph.calls, card.recorded = card.recorded, None
                if capture_fails:
                    raise RuntimeError("operation not permitted when stream is capturing\nand more")

        self.recorded = None
        for name, value in {
            "current_device": lambda: 0,
            "get_device_properties": lambda device: type(
                "Properties", (), {"L2_cache_size": 1 << 20, "multi_processor_count": 132, "total_memory": 80 << 30}
            ),
            "Stream": object,
            "set_stream": lambda stream: card.log.append("own stream"),
            "synchronize": lambda: None,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "_sleep": lambda cycles: None,
            "get_device_name": lambda device: "a card",
            "get_device_capability": lambda device: (9, 0),
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 1500,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, ms):
        def call(copy):
            self.log.append(copy)
            if self.recorded is None:
                self.now += ms
            else:
                self.recorded.append(ms)

        return call
