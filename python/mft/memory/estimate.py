"""What a training step holds on the device and on the host, way by way, from shapes alone; pure Python.

The peak is the largest phase's sum (ways.py). tests/memory/test_estimate.py holds it against a simulation of the
engines. Sizes are bytes of what is allocated; a CUDA context and the allocator's fragments come on top (see fit.py).
"""

from dataclasses import dataclass, field

from mft.checks import check_rule
from mft.memory.shapes import ModelShape
from mft.memory.sizes import RunSizes, Sizes
from mft.memory.step_time import step_seconds
from mft.memory.ways import WAYS
from mft.memory.workload import Workload
from mft.number_formats import AUTO

# On a CPU the kernels' own scratch counts: slabs of 2 MiB, histograms of 0.5 MiB a thread, pages of code. Measured
# peaks of two LLaMA2-7B layers lay between -6 and +4 MB of the sum without it (benchmarks.memory.worker, 128 to 1024
# tokens).
_CPU_WORKSPACE = 32 << 20


@dataclass(frozen=True)
class Estimate:
    """Of one process, bytes by kind when the device holds the most, in ``phase``; ``host`` at the end of the way up.

    loading: what the host holds before the first step, when the exact weights have been read and the scores made.
    On a CPU device is all there is: host is empty, and loading is one of the phases.
    seconds: of an optimiser step, roughly. quantized: how many linears of the base lie in few bits, all experts of a
    projection being one. batches_at_once: in layerwise, where these are not all of a step's.
    """

    way: str
    device: Sizes
    host: Sizes
    loading: int
    phase: str
    seconds: float
    quantized: int
    batches_at_once: int | None = None
    phases: dict[str, int] = field(default_factory=dict)  # the device's peak in each

    @property
    def device_peak(self) -> int:
        return sum(self.device.values())

    @property
    def host_peak(self) -> int:
        """In a step."""
        return sum(self.host.values())

    @property
    def host_needed(self) -> int:
        return max(self.host_peak, self.loading)


def estimate(shape: ModelShape, workload: Workload) -> Estimate:
    """One way's step on a model of this shape; workload.memory names the way ("auto" is for fit.choose).

    Raises: ValueError as RunSizes does.
    """
    if workload.memory not in WAYS:
        raise ValueError(f"memory must be one of {', '.join(WAYS)} here, got {workload.memory}: see choose")
    for name in ("scores", "moments"):
        check_rule(getattr(workload, name) != AUTO, name, "be a format here: see choose", AUTO)
    way = WAYS[workload.memory]
    run = RunSizes(shape, way.of(workload))
    phases, host, loading = way.phases(run), way.host(run), way.loading(run)
    for sizes in phases.values():
        sizes["teacher"] = workload.teacher_bytes
        sizes["activations"] = sizes.get("activations", 0) + run.attention_masks
    if workload.device == "cpu":
        for sizes in phases.values():
            if way.offloads:  # nothing is copied to be near
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
