"""Estimate the seconds of an optimiser step. Arithmetic overlaps with the link's traffic, but not with the update.

The estimate assumes the hardware of SPEEDS, whatever hardware is present. It is for comparing modes and settings; it is
not measured.
"""

from dataclasses import dataclass

from mft.config import OBJECTIVES
from mft.memory.shapes import ModelShape
from mft.memory.sizes import RunSizes
from mft.memory.ways import Way
from mft.memory.workload import Workload
from mft.number_formats import SCORE_FORMATS


@dataclass(frozen=True)
class Speeds:
    """Sustained speeds per second: flops, bytes of device memory, bytes of its link, scores in a selection."""

    flops: float
    memory: float
    link: float
    selection: float

    def __str__(self) -> str:
        link = "" if self.link == float("inf") else f" and {self.link / 1e9:g} GB/s to the host"
        return f"{self.flops / 1e12:g} TFLOP/s, {self.memory / 1e9:g} GB/s of memory{link}"


SPEEDS = {
    # An RTX 4090 at its best; PCIe 4 x16; a selection reads about 60 bytes per score.
    "cuda": Speeds(flops=150e12, memory=0.8e12, link=20e9, selection=13e9),
    # A selection runs in one thread, whose speed was measured (mft_kernels/mask/shared_threshold.py).
    "cpu": Speeds(flops=0.5e12, memory=50e9, link=float("inf"), selection=0.2e9),
}


def step_seconds(run: RunSizes, way: Way) -> float:
    """Return the seconds of one process's micro-batches and one update, without the sums over processes."""
    shape, workload, masked = run.shape, run.workload, sum(run.masks)
    speeds = SPEEDS[workload.device]
    tokens = workload.tokens * workload.own_accumulation
    depth, above = shape.layers, run.above
    # A multiply and an add per weight and token; causal attention sees half of the sequence, in two products.
    linear = 2 * sum(n * k for n, k in shape.linears.values())
    attention = 2 * workload.sequence * shape.heads * shape.head_dim
    forwards = way.forwards(workload, depth, above)
    forward = forwards * (linear + attention)
    named = shape.targets(None if workload.target_modules is None else list(workload.target_modules))
    trained = masked * sum(n * k for n, k in (shape.matrices[name] for name in named))
    backward = above * (linear + 2.5 * attention)
    backward += 2 * masked * sum(shape.used(name) for name in named if name in shape.linears)
    head, passes = 4 * shape.embedding, forwards + above
    if workload.of_base and not OBJECTIVES[workload.objective].remembers:  # the base runs forward in every step
        forward, head, passes = forward + above * (linear + attention), head + 2 * shape.embedding, passes + above
    compute = tokens * (forward + backward + head) / speeds.flops
    for name in shape.experts:
        compute += workload.own_accumulation * passes * _routed_seconds(shape, workload, name)
        if name in named:  # adding to the gradient reads and writes it
            compute += workload.own_accumulation * masked * _routed_seconds(shape, workload, name, touched=2)
    if workload.quantization is not None:  # a dense matrix is written and read for each of a layer's three products
        made = workload.own_accumulation * (depth + 2 * above) * shape.layer_weights
        compute += made * 2 * shape.dtype_bytes / speeds.memory
    update = trained * (2 * workload.state_bytes + 2 * shape.dtype_bytes) / speeds.memory
    travels = way.traffic(run, tokens * shape.hidden * shape.dtype_bytes)
    states = 2 * trained * workload.state_bytes if way.offloads else 0
    step = max(compute, travels / speeds.link) + max(update, states / speeds.link)
    step += way.waiting_bytes(run) / speeds.link
    return step if workload.budget is None else step + _selection_seconds(trained, workload, way)


def _selection_seconds(trained: int, workload: Workload, way: Way) -> float:
    """Return the seconds to find one threshold: a pass over the scores per 2 bytes, and one for the masks."""
    speeds, size = SPEEDS[workload.device], SCORE_FORMATS[workload.scores].bytes
    travels = trained * size * (size / 2 + 1) if way.offloads else 0
    return max(trained / speeds.selection, travels / speeds.link)


def _routed_seconds(shape: ModelShape, workload: Workload, name: str, touched: int = 1) -> float:
    """Return the seconds of a product with experts, whose weights are read ``touched`` times if a token sees them."""
    assert shape.mixture is not None
    speeds, (_, n, k) = SPEEDS[workload.device], shape.experts[name]
    arithmetic = 2 * workload.tokens * shape.used(name) / speeds.flops
    return max(arithmetic, touched * shape.mixture.busy(workload.tokens) * n * k * shape.dtype_bytes / speeds.memory)
