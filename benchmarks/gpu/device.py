"""The devices that the suite runs on: a GPU, or for a dry run the CPU with both kinds of kernels emulated."""

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mft_kernels import backend_report
from mft_kernels.backends.built import report

from . import on_host
from .cases import AUTO, CUDA, FUSED
from .results import first_line

#: How a competitor is timed: captured in a CUDA graph; queued behind a spin, if its host code cannot be captured; or by
#: the clock, including the host's time.
GRAPH, QUEUED, CLOCK = "graph", "queued", "clock"

#: Milliseconds of a graph, so long that its launch of about 5 us does not count; and the most calls in one graph.
_GRAPH_MS = 2.0
_MOST_CALLS = 100
#: A call this slow is timed alone, and its estimate is not refined.
_SLOW_MS = 20.0
#: Cycles of the spin behind which calls queue up if there is no graph: longer than the host takes to launch them.
_SPIN_CYCLES = 10_000_000  # 5 ms at 2 GHz
_QUEUED_CALLS = 10
#: Calls by the clock: so many that the two synchronisations, about 10 us, do not count.
_CLOCKED_CALLS = 50

Run = Callable[[int], object]
_L2_TILE = 4096  # fp32 numbers that a block of read_l2 reads at a time


@triton.jit
def read_l2(sums, source, tiles, steps, TILE: tl.constexpr):
    """Read ``steps`` tiles past L1, each block from another place on."""
    block = tl.program_id(0)
    total = tl.zeros((TILE,), tl.float32)
    for step in range(steps):
        tile = (block * 61 + step) % tiles
        total += tl.load(source + tile * TILE + tl.arange(0, TILE), cache_modifier=".cg")
    tl.store(sums + block, tl.sum(total, 0))


@dataclass(frozen=True)
class Timer:
    """Repeats a competitor: ``replay()`` returns milliseconds per call, the mean over ``calls`` of them."""

    method: str
    calls: int
    estimate: float  # milliseconds per call
    replay: Callable[[], float]
    note: str = ""  # why no graph is used


class Gpu:
    """The current CUDA (or HIP) device; everything runs on one stream that can be captured."""

    dry = False
    backends = {FUSED: "triton", AUTO: "auto", CUDA: "cuda"}  # noqa: RUF012

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        no_cuda = backend_report()["backends"]["cuda"]["reason"]
        self.without = {CUDA: no_cuda} if no_cuda else {}
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 50 << 20
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)  # the default stream cannot be captured
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def environment(self) -> dict[str, Any]:
        """Return the card, its driver and versions."""
        backends = backend_report()["backends"]
        properties = torch.cuda.get_device_properties(self.torch_device)
        capability = torch.cuda.get_device_capability(self.torch_device)
        cuda = f"none: {self.without[CUDA]}" if CUDA in self.without else backends["cuda"]["detail"]
        return {
            "device": torch.cuda.get_device_name(self.torch_device),
            "driver": _driver(),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "triton": triton.__version__,
            "triton_kernels": backends["triton"]["detail"],
            "cuda_library": cuda if CUDA in self.without else f"{cuda}; {report('cuda').get('nvcc', 'nvcc unknown')}",
            "cuda_lacks": [] if CUDA in self.without else lacking(capability),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": self.l2_bytes / 2**20,
            "capability": list(capability),
        }

    def ceilings(self) -> dict[str, float]:
        """Measure bytes/s of a copy of 1 GiB (read and written), FLOP/s of cuBLAS at 8192^3 in bf16, and L2's rate."""
        rates = {"l2_rate": self._l2_rate()}
        return rates | {"bytes_per_second": self._copy_rate(1 << 30), "flops_per_second": self._product_rate(8192)}

    def synchronize(self) -> None:
        """Wait for the device; raises if the context is lost."""
        torch.cuda.synchronize()

    def tidy(self) -> None:
        """Free the memory of earlier cases: a capture cannot free any, so an allocation in it would fail."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def timer(self, run: Run, copies: int, how: str = GRAPH) -> Timer:
        """Return a timer of run(i), which works on copy i. What cannot be captured is queued, and the note says why."""
        if how == CLOCK:
            return Timer(CLOCK, _CLOCKED_CALLS, self._clocked(run, copies), lambda: self._clocked(run, copies))
        estimate = self._estimate(run, copies)
        calls = min(_MOST_CALLS, max(1, round(_GRAPH_MS / estimate)))
        if estimate < _GRAPH_MS:
            calls = min(-(-max(calls, copies) // copies) * copies, max(_MOST_CALLS, copies))  # whole rotations
        note = "its host code cannot be captured"
        if how == GRAPH:
            try:
                return Timer(GRAPH, calls, estimate, self._replayed(run, copies, calls))
            except RuntimeError as error:
                note = first_line(error)
                torch.cuda.synchronize()
        calls = min(calls, _QUEUED_CALLS)
        return Timer(QUEUED, calls, estimate, lambda: self._queued(run, copies, calls), note)

    def graph(self, run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """Capture run() once. Each call replays it and returns the same tensors with their new contents."""
        run()  # creates what is created only once
        torch.cuda.synchronize()
        results: list[Tensor] = []
        graph = self._captured(lambda: results.extend(run()))

        def replay() -> Sequence[Tensor]:
            graph.replay()
            torch.cuda.synchronize()
            return results

        return replay

    def peak(self, run: Callable[[], object]) -> int:
        """Return the peak of allocated bytes in run()."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _copy_rate(self, size: int) -> float:
        source = torch.randint(0, 100, (size,), dtype=torch.uint8, device=self.torch_device)
        target = torch.empty_like(source)
        return 2e3 * size / self._median(lambda i: target.copy_(source))

    def _product_rate(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.torch_device).to(torch.bfloat16) for _ in range(2))
        return 2e3 * size**3 / self._median(lambda i: a @ b)

    def _l2_rate(self) -> float:
        """Return bytes per cycle and multiprocessor that are read from L2, as in cards.py; 16 MiB fit on any card."""
        source = torch.zeros(1 << 22, device=self.torch_device)
        blocks = 8 * torch.cuda.get_device_properties(self.torch_device).multi_processor_count
        sums = torch.empty(blocks, device=self.torch_device)
        tiles, steps = source.numel() // _L2_TILE, 64
        ms = self._median(lambda i: read_l2[(blocks,)](sums, source, tiles, steps, _L2_TILE, num_warps=8))
        cycles = _SPIN_CYCLES * ms / self._between_events(lambda: torch.cuda._sleep(_SPIN_CYCLES))
        return 8 * steps * _L2_TILE * source.element_size() / cycles

    def _median(self, run: Run) -> float:
        timer = self.timer(run, 1)
        return statistics.median(timer.replay() for _ in range(9))

    def _estimate(self, run: Run, copies: int) -> float:
        run(0)
        torch.cuda.synchronize()
        ms = self._queued(run, copies, 1)
        if ms < _SLOW_MS:
            ms = self._queued(run, copies, 3)
        return max(ms, 1e-3)

    def _captured(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(self._stream)  # a failed capture leaves another stream set
        return graph

    def _replayed(self, run: Run, copies: int, calls: int) -> Callable[[], float]:
        graph = self._captured(lambda: _call(run, copies, calls))
        graph.replay()
        torch.cuda.synchronize()
        return lambda: self._between_events(graph.replay) / calls

    def _queued(self, run: Run, copies: int, calls: int) -> float:
        torch.cuda._sleep(_SPIN_CYCLES)
        return self._between_events(lambda: _call(run, copies, calls)) / calls

    def _between_events(self, run: Callable[[], object]) -> float:
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    @staticmethod
    def _clocked(run: Run, copies: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        _call(run, copies, _CLOCKED_CALLS)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / _CLOCKED_CALLS


class Interpreter:
    """The CPU, for a dry run: every code path except graphs, on tiny shapes. Its times mean nothing."""

    dry = True
    backends = {FUSED: "triton", AUTO: "auto", CUDA: on_host.BACKEND}  # noqa: RUF012
    torch_device = torch.device("cpu")
    l2_bytes = 768  # two copies of the dry shape

    def __init__(self) -> None:
        torch.set_num_threads(1)  # the work is so small that a second thread would only wait
        reason = on_host.install()
        self.without = {CUDA: reason} if reason else {}

    def environment(self) -> dict[str, Any]:
        """Return an environment that says that nothing was measured on a GPU."""
        cuda = f"none: {self.without[CUDA]}" if CUDA in self.without else "csrc/cuda in the emulator of the tests"
        return {
            "device": "none: a dry run in Triton's interpreter; not measured",
            "dry_run": True,
            "triton": triton.__version__,
            "cuda_library": cuda,
        }

    def ceilings(self) -> dict[str, float]:
        """Return arbitrary numbers."""
        return {"bytes_per_second": 1e9, "flops_per_second": 1e9}

    def synchronize(self) -> None:
        """Do nothing: the CPU runs nothing asynchronously."""

    def tidy(self) -> None:
        """Do nothing: there is nothing to free."""

    def timer(self, run: Run, copies: int, how: str = GRAPH) -> Timer:
        """Return a timer by the clock, which runs each copy once, after one first run as for a GPU's estimate."""
        run(0)

        def replay() -> float:
            start = time.perf_counter()
            _call(run, copies, copies)
            return (time.perf_counter() - start) * 1e3 / copies

        return Timer(CLOCK, copies, 1.0, replay)

    def graph(self, run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """Return a function that runs again each time."""
        return run

    def peak(self, run: Callable[[], object]) -> int:
        """Run and return 0."""
        run()
        return 0


Device = Gpu | Interpreter


def lacking(capability: tuple[int, int]) -> list[str]:
    """Return the kernels for this compute capability that libmft_cuda.so was built without, and why."""
    of_the_card = f"_sm{capability[0]}{capability[1]}"
    return [f"{name}: {why}" for name, why in report("cuda").get("left_out", {}).items() if of_the_card in name]


def _call(run: Run, copies: int, calls: int) -> None:
    for i in range(calls):
        run(i % copies)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
        return lines[0] if lines else "unknown"
    return "unknown"
