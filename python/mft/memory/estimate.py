"""Estimate the bytes that a training step holds on the device and the host in a memory mode, from shapes alone.

The peak is the largest phase's sum (ways.py). tests/memory/test_estimate.py compares it with a simulation of the
engines. Sizes are allocated bytes; a CUDA context and the allocator's fragmentation come on top (see fit.py).
Pure Python.
"""

from dataclasses import dataclass, field

from mft.checks import check_rule
from mft.memory.shapes import ModelShape
from mft.memory.sizes import RunSizes, Sizes
from mft.memory.step_time import step_seconds
from mft.memory.ways import WAYS
from mft.memory.workload import Workload
from mft.number_formats import AUTO

# On a CPU the kernels' own scratch memory counts: slabs of 2 MiB, histograms of 0.5 MiB per thread, pages of code.
# The measured peaks of two LLaMA2-7B layers differed by -6 to +4 MB from the sum without it (benchmarks.memory blocks,
# 128 to 1024 tokens).
_CPU_WORKSPACE = 32 << 20


@dataclass(frozen=True)
class Estimate:
    """The bytes and the time of one process.

    device: bytes by kind at the device's peak, in ``phase``. host: bytes by kind at the end of the way up; empty on a
    CPU. loading: bytes of the host before the first step. seconds: roughly, for an optimiser step. quantized: number of
    quantised linears; all experts of a projection count as one. batches_at_once: set for layerwise if it is less than
    all.
    """

    way: str
    device: Sizes
    host: Sizes
    loading: int
    phase: str
    seconds: float
    quantized: int
    batches_at_once: int | None = None
    phases: dict[str, int] = field(default_factory=dict)  # the device's peak in each phase

    @property
    def device_peak(self) -> int:
        return sum(self.device.values())

    @property
    def host_peak(self) -> int:
        """Bytes of the host in a step."""
        return sum(self.host.values())

    @property
    def host_needed(self) -> int:
        return max(self.host_peak, self.loading)


def estimate(shape: ModelShape, workload: Workload) -> Estimate:
    """Estimate a step in the mode workload.memory; for "auto" see fit.choose. Raises: ValueError as RunSizes does."""
    if workload.memory not in WAYS:
        raise ValueError(f"memory must be one of {', '.join(WAYS)} here, got {workload.memory}: see choose")
    for name in ("scores", "moments"):
        check_rule(getattr(workload, name) != AUTO, name, "be a format here: see choose", AUTO)
    way = WAYS[workload.memory]
    run = RunSizes(shape, way.adapt(workload))
    phases, host, loading = way.phases(run), way.host(run), way.loading(run)
    for sizes in phases.values():
        sizes["teacher"] = workload.teacher_bytes
        sizes["activations"] = sizes.get("activations", 0) + run.attention_masks
    if workload.device == "cpu":
        for sizes in phases.values():
            if way.offloads:  # the CPU shares host memory, so nothing is copied
                whole = {"weights": run.outside + sum(run.weights_of_layer), "masks": sum(run.mask_bytes)}
                sizes |= {"boundaries": 0, "staging": 0} | host | whole
            sizes["workspace"] = _CPU_WORKSPACE
        phases["loading"], host, loading = loading, {}, {}
    peaks = {name: sum(sizes.values()) for name, sizes in phases.items()}
    phase = max(peaks, key=peaks.__getitem__)
    found = {kind: size for kind, size in phases[phase].items() if size}
    there = {kind: size for kind, size in host.items() if size}
    seconds = step_seconds(run, way)
    at_once = run.workload.together if way.holds_all_rows and run.workload.portions > 1 else None
    return Estimate(way.name, found, there, sum(loading.values()), phase, seconds, run.quantized, at_once, peaks)
