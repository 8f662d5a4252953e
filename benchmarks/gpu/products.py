"""Time a layer's products and a whole step, and what a caller waits for."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mft_kernels import reference
from mft_kernels.internal import MaskedInPlace

from . import choices
from .cases import (
    AUTO_PACKED,
    CUDA,
    CUDA_PACKED,
    DENSE,
    FUSED,
    HELD,
    LAYER,
    PACKED,
    PLACE,
    Case,
    competitors,
)
from .device import CLOCK, GRAPH, QUEUED, Device
from .once_a_step import Matrix
from .operands import MODE, Operands
from .timing import Bench, Competitor, Phases
from .ways import Eager, Layer, Op, Place, Way, dense_layer, held_layer, masked_layer, way_of

IN_GRAPH = ", in a graph"
DENSE_LAYER, OP = "nn.Linear", "masked_linear"
_LAYERS: dict[str, Callable[[], Way]] = {
    DENSE_LAYER: lambda: Layer(dense_layer),
    LAYER: lambda: Layer(masked_layer),
    HELD: lambda: Layer(held_layer),
    OP: Op,
}
#: Bytes per weight of each competitor's mask.
_KEEP_BYTES = {DENSE: 0.0, PLACE: 0.0} | dict.fromkeys((PACKED, CUDA_PACKED, AUTO_PACKED), 1 / 8)
_SCORE_BYTES = 2.0


def time_product(case: Case, bench: Bench) -> dict[str, Any]:
    """Time one of cases.PRODUCTS."""
    operands = bench.inputs.get(case.n, case.k, case.m, sums=case.what.startswith("accumulate"))
    first = operands[0]
    expected = _expected(case, first)

    def competitor(name: str, way: Way) -> Competitor:
        run = getattr(way, case.what)
        return Competitor(
            lambda copy: run(operands[copy]),
            None if name == DENSE else expected,
            clear=first.sums.zero_ if first.sums is not None else None,
            phases=work(case, _KEEP_BYTES.get(name, _SCORE_BYTES)),
        )

    found = {name: competitor(name, way) for name, way in _ways(case, bench.device, operands).items()}
    return choices.judged(case, bench.compare(found, len(operands)), bench)


def time_update(case: Case, bench: Bench) -> dict[str, Any]:
    """Time a layer's whole step with one optimiser for all ways. In place, the mask in the weight changes too."""
    operands = bench.inputs.get(case.n, case.k, case.m)
    backend = bench.device.backends[FUSED]
    matrix = Matrix(case.n, case.k, "int16, 8-bit", bench.device.torch_device)
    o = operands[0]
    packed = [o.packed, reference.pack_mask(o.scores, o.threshold * 1.01, MODE)]
    in_place, turn = MaskedInPlace(o.weight.clone()), itertools.cycle(packed)

    def competitor(name: str, way: Way) -> Competitor:
        def run(copy: int) -> Any:
            made = way.step(operands[copy])
            matrix.step(backend)
            if name == PLACE:
                in_place.change(next(turn))  # the host waits for how many weights are dropped
            return made

        return Competitor(run, how=QUEUED if name == PLACE else GRAPH)

    found = {name: competitor(name, way) for name, way in _ways(case, bench.device, operands).items()}
    return choices.judged(case, bench.compare(found, len(operands), with_cuda=False), bench)


def time_host(case: Case, bench: Bench) -> dict[str, Any]:
    """Time one forward pass at few tokens, where the host may cost more than the kernel. Nothing requires a gradient.

    Eager calls follow each other between two synchronisations and are timed by the clock. Their time is the larger of
    the host's and the device's. In a graph the host needs no time, so the difference is the layer's cost on the host.
    In each replay a MaskedLinear selects again, because its scores may have been written. One with a held mask does
    not.
    """
    operands = bench.inputs.get(case.n, case.k, case.m)
    found: dict[str, Competitor] = {}
    with torch.no_grad():
        # The other masks were made from its scores, at this threshold: all compute the same.
        expected = Eager().forward(operands[0])
        for name, make in _LAYERS.items():
            # A captured layer also selects again in each eager call, because it cannot know what a replay wrote.
            for how, label in ((CLOCK, name), (GRAPH, name + IN_GRAPH)):
                run = functools.partial(lambda way, copy: way.forward(operands[copy]), make())
                found[label] = Competitor(run, None if name == DENSE_LAYER else expected, how=how)
        return bench.compare(found, len(operands))


def work(case: Case, keep_bytes: float) -> Phases:
    """Return [(bytes that must move, floating-point operations)], one pair per phase; 2-byte elements.

    ``keep_bytes`` encode one weight's mask: 2 for bf16 scores, 1/8 for a bit, 0 for a dense layer. A backward reads
    weight and mask once for both gradients. Only x and the weight stay from forward to backward.
    """
    n, k, m = case.n, case.k, case.m
    matrix, x, y, product = n * k, 2.0 * m * k, 2.0 * m * n, 2.0 * m * n * k
    read = matrix * (2 + keep_bytes)
    # The gradient of a dense weight reads neither weight nor sign.
    gradient = x + y + 2 * matrix
    added = x + y + 8 * matrix  # fp32, read and written
    phases = {
        "forward": [(read + x + y, product)],
        "d_x": [(read + x + y, product)],
        "d_scores": [(gradient + (read if keep_bytes else 0), product)],
        "accumulate": [(added + (read if keep_bytes else 0), product)],
        "accumulate_product": [(added, product)],
        # x and d_x, each M x K; grad_output; weight and mask; d_scores.
        "backward": [(read + gradient + x, 2 * product)],
    }
    return phases["forward"] + phases["backward"] if case.what == "step" else phases[case.what]


def _expected(case: Case, o: Operands) -> Any:
    """Return torch's result; for accumulating cases, what is added."""
    if case.what == "accumulate_product":
        return o.grad.T.float() @ o.x.float()
    return getattr(Eager(), "d_scores" if case.what == "accumulate" else case.what)(o)


def _ways(case: Case, device: Device, operands: Sequence[Operands]) -> dict[str, Way]:
    left_out = (CUDA, CUDA_PACKED) if CUDA in device.without else ()
    ways = {name: way_of(name, device) for name in competitors(case) if name not in left_out}
    for way in ways.values():
        if isinstance(way, Place):
            way.hold(operands)
    return ways
