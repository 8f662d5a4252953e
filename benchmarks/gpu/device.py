"""Where the suite runs: a GPU, or for a dry run the CPU with both kinds of kernels emulated; all that differs there."""

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from . import on_host
from .cases import CUDA

#: A graph lasts about this long, so that its launch, some 5 us, does not count; at most so many calls in one.
_GRAPH_MS = 2.0
_MOST_CALLS = 100
#: A call this slow is timed alone, without a second look.
_SLOW_MS = 20.0
#: Of the spin behind which calls queue up where no graph can be had: longer than the host takes to launch them.
_SPIN_CYCLES = 10_000_000  # 5 ms at 2 GHz
_QUEUED_CALLS = 10
#: By the clock: enough that the two synchronisations, some 10 us, do not count.
_CLOCKED_CALLS = 50


class Timer:
    """Repeats a competitor: ``replay()`` gives milliseconds a call, once over ``calls`` of them."""

    def __init__(self, method: str, calls: int, estimate: float, replay: Callable[[], float], note: str = "") -> None:
        self.method = method
        self.calls = calls
        self.estimate = estimate  # milliseconds a call
        self.replay = replay
        self.note = note  # why not by a graph


class Device(Protocol):
    """What the suite asks of it."""

    dry: bool
    torch_device: torch.device
    l2_bytes: int
    without: Mapping[str, str]  # competitors that cannot run here, and why

    def environment(self) -> dict[str, Any]: ...

    def ceilings(self) -> dict[str, float]: ...

    def synchronize(self) -> None: ...

    def tidy(self) -> None: ...

    def compile(self, function: Callable) -> Callable: ...

    def timer(self, run: Callable[[int], object], copies: int, *, capture: bool) -> Timer: ...

    def clock(self, run: Callable[[int], object], copies: int) -> Timer: ...

    def graph(self, run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]: ...

    def peak(self, run: Callable[[], Sequence[Tensor]], *, warm: bool = True) -> tuple[int, int]: ...


class Gpu:
    """The current CUDA (or HIP) device; everything runs on one stream that can be captured."""

    dry = False

    def __init__(self) -> None:
        from mft_kernels.backends import cuda

        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.without = {CUDA: cuda.unavailable} if cuda.unavailable else {}
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 50 << 20
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)  # the default stream cannot be captured
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def environment(self) -> dict[str, Any]:
        """The card and what drives it."""
        from mft_kernels.backends.triton.target import target_of

        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "device": torch.cuda.get_device_name(self.torch_device),
            "driver": _driver(),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "triton": triton.__version__,
            "cuda_library": _library(self.without),
            "cuda_lacks": [] if CUDA in self.without else lacking(torch.cuda.get_device_capability(self.torch_device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": self.l2_bytes / 2**20,
            "capability": list(torch.cuda.get_device_capability(self.torch_device)),
            "target": str(target_of(self.torch_device)),
            "weight_is_first_operand": target_of(self.torch_device).swapped,
        }

    def ceilings(self) -> dict[str, float]:
        """Measured: bytes a second of a copy of 1 GiB (read and written), FLOP/s of cuBLAS at 8192^3 in bf16."""
        return {"bytes_per_second": self._copy_rate(1 << 30), "flops_per_second": self._product_rate(8192)}

    def synchronize(self) -> None:
        """Wait; raises if the context is lost."""
        torch.cuda.synchronize()

    def tidy(self) -> None:
        """Give back what earlier cases took: within a graph nothing can be, and there an allocation would fail."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def compile(self, function: Callable) -> Callable:
        """torch.compile for one shape."""
        return torch.compile(function, fullgraph=True, dynamic=False)

    def timer(self, run: Callable[[int], object], copies: int, *, capture: bool) -> Timer:
        """run(i) works on copy i. Captured in a graph; where that fails, queued behind a spin, with the reason."""
        estimate = self._estimate(run, copies)
        calls = min(_MOST_CALLS, max(1, round(_GRAPH_MS / estimate)))
        if estimate < _GRAPH_MS:
            calls = min(-(-max(calls, copies) // copies) * copies, max(_MOST_CALLS, copies))  # whole rotations
        note = "its host code cannot be captured"
        if capture:
            try:
                return Timer("graph", calls, estimate, self._captured(run, copies, calls))
            except RuntimeError as error:
                note = first_line(error)
                torch.cuda.synchronize()
        calls = min(calls, _QUEUED_CALLS)
        return Timer("queued", calls, estimate, lambda: self._queued(run, copies, calls), note)

    def clock(self, run: Callable[[int], object], copies: int) -> Timer:
        """run(i) works on copy i; by the clock, from one synchronisation to the next."""

        def replay() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(_CLOCKED_CALLS):
                run(i % copies)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3 / _CLOCKED_CALLS

        return Timer("clock", _CLOCKED_CALLS, replay(), replay)  # the first replay makes what is made once

    def graph(self, run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """run() captured once: each call replays it and gives the same tensors, with what is in them then."""
        run()  # what is made once
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                results = run()
        finally:
            torch.cuda.set_stream(self._stream)

        def replay() -> Sequence[Tensor]:
            graph.replay()
            torch.cuda.synchronize()
            return results

        return replay

    def peak(self, run: Callable[[], Sequence[Tensor]], *, warm: bool = True) -> tuple[int, int]:
        """(bytes by which the allocated memory peaks in run(), those of its results); ``warm``: after one more run."""
        if warm:
            run()  # what is made once: binaries, cuBLAS' workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, sum(t.nbytes for t in results)

    def _copy_rate(self, size: int) -> float:
        source = torch.randint(0, 100, (size,), dtype=torch.uint8, device=self.torch_device)
        target = torch.empty_like(source)
        return 2e3 * size / self._median(lambda i: target.copy_(source))

    def _product_rate(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.torch_device).to(torch.bfloat16) for _ in range(2))
        return 2e3 * size**3 / self._median(lambda i: a @ b)

    def _median(self, run: Callable[[int], object]) -> float:
        timer = self.timer(run, 1, capture=True)
        return statistics.median(timer.replay() for _ in range(9))

    def _estimate(self, run: Callable[[int], object], copies: int) -> float:
        run(0)
        torch.cuda.synchronize()
        ms = self._queued(run, copies, 1)
        if ms < _SLOW_MS:
            ms = self._queued(run, copies, 3)
        return max(ms, 1e-3)

    def _captured(self, run: Callable[[int], object], copies: int, calls: int) -> Callable[[], float]:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the threads of torch.compile may do what they like meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                for i in range(calls):
                    run(i % copies)
        finally:
            torch.cuda.set_stream(self._stream)  # a capture that fails leaves another one set
        graph.replay()
        torch.cuda.synchronize()

        def replay() -> float:
            self._start.record()
            graph.replay()
            self._end.record()
            self._end.synchronize()
            return self._start.elapsed_time(self._end) / calls

        return replay

    def _queued(self, run: Callable[[int], object], copies: int, calls: int) -> float:
        torch.cuda._sleep(_SPIN_CYCLES)
        self._start.record()
        for i in range(calls):
            run(i % copies)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / calls


class Interpreter:
    """The CPU, for a dry run: every path but the graphs, on tiny shapes; its times mean nothing."""

    dry = True
    torch_device = torch.device("cpu")
    l2_bytes = 768  # two copies of the dry shape

    def __init__(self) -> None:
        torch.set_num_threads(1)  # so small that a second one only waits
        reason = on_host.install()
        self.without = {CUDA: reason} if reason else {}

    def environment(self) -> dict[str, Any]:
        """Says that nothing here was measured on a GPU."""
        cuda = f"none: {self.without[CUDA]}" if CUDA in self.without else "csrc/cuda in the emulator of the tests"
        return {
            "device": "none: a dry run in Triton's interpreter; not measured",
            "dry_run": True,
            "triton": triton.__version__,
            "cuda_library": cuda,
        }

    def ceilings(self) -> dict[str, float]:
        """Any numbers."""
        return {"bytes_per_second": 1e9, "flops_per_second": 1e9}

    def synchronize(self) -> None:
        """Nothing runs behind our back."""

    def tidy(self) -> None:
        """Nothing to give back."""

    def compile(self, function: Callable) -> Callable:
        """Traced, not compiled."""
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")

    def timer(self, run: Callable[[int], object], copies: int, *, capture: bool) -> Timer:
        """By the wall clock, each copy once."""

        def replay() -> float:
            start = time.perf_counter()
            for i in range(copies):
                run(i)
            return (time.perf_counter() - start) * 1e3 / copies

        return Timer("wall clock", copies, 1.0, replay)

    def clock(self, run: Callable[[int], object], copies: int) -> Timer:
        """As timer does."""
        return self.timer(run, copies, capture=False)

    def graph(self, run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """Runs anew each time."""
        return run

    def peak(self, run: Callable[[], Sequence[Tensor]], *, warm: bool = True) -> tuple[int, int]:
        """As if nothing but the results were allocated."""
        size = sum(t.nbytes for t in run())
        return size, size


def _library(without: Mapping[str, str]) -> str:
    """What libmft_cuda.so holds and by which nvcc, or why there is none."""
    from mft_kernels import backend_report
    from mft_kernels.backends.built import report

    if CUDA in without:
        return f"none: {without[CUDA]}"
    return f"{backend_report()['backends']['cuda']['detail']}; {report('cuda').get('nvcc', 'nvcc unknown')}"


def lacking(capability: tuple[int, int]) -> list[str]:
    """The kernels for a card of this compute capability that libmft_cuda.so was built without, and why."""
    from mft_kernels.backends.built import report

    of_the_card = f"_sm{capability[0]}{capability[1]}"
    return [f"{name}: {why}" for name, why in report("cuda").get("left_out", {}).items() if of_the_card in name]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
        return lines[0] if lines else "unknown"
    return "unknown"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
