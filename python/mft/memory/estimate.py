"""What a training step holds on the device and on the host, way by way, from shapes alone; pure Python.

Each way's step has phases; the peak is the largest phase's sum. This is the list of the tensors of plain.py,
layer_engine.py and layerwise.py. tests/memory/test_estimate.py holds it against a simulation of those engines.
Sizes are bytes of what is allocated; a CUDA context and the allocator's fragments come on top (see fit.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mft.checks import check_rule
from mft.config import WAYS
from mft.memory.activations import Layer, loss_peak
from mft.memory.shapes import ModelShape
from mft.memory.step_time import step_seconds
from mft.memory.workload import Workload
from mft.number_formats import DTYPE_BYTES, QUANTIZED_FORMATS, SCORE_FORMATS

# On a CPU the kernels' own scratch counts: slabs of 2 MiB, histograms of 0.5 MiB a thread, pages of code. Measured
# peaks of two LLaMA2-7B layers lay between -6 and +4 MB of the sum without it (benchmarks.memory.worker, 128 to 1024
# tokens).
_CPU_WORKSPACE = 32 << 20
# Boundaries on the device beside the layer's own input and its output's gradient: in resident the next input; in
# layerwise that, the next gradient, and the one that leaves.
_RESIDENT_BOUNDARIES, _LAYERWISE_BOUNDARIES = 1, 3

Sizes = dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Of one process, bytes by kind when the device holds the most, in ``phase``; ``host`` at the end of the way up.

    loading: what the host holds before the first step, when the exact weights have been read and the scores made.
    On a CPU device is all there is: host is empty, and loading is one of the phases.
    seconds: of an optimiser step, roughly. quantized: how many linears of the base lie in few bits,
    all experts of a projection being one.
    """

    way: str
    device: Sizes
    host: Sizes
    loading: int
    phase: str
    seconds: float
    quantized: int
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

    Raises: ValueError for layers or target modules that the model does not have, and for a sequence that its window
        cuts.
    """
    if workload.memory == "auto":
        raise ValueError(f"memory must be one of {', '.join(WAYS)} here, got auto: see choose")
    if workload.memory == "quantized" and workload.quantization is None:
        workload = replace(workload, quantization="nf4")
    run = _Run(shape, workload)
    phases = {"plain": _plain, "layerwise": _layerwise}.get(workload.memory, _resident)(run)
    for sizes in phases.values():
        sizes["teacher"] = workload.teacher_bytes
        sizes["activations"] = sizes.get("activations", 0) + run.attention_masks
    host, loading = run.host(), run.loading()
    if workload.device == "cpu":
        for sizes in phases.values():
            run.share_memory(sizes)
        phases["loading"], host, loading = loading, {}, {}
    peaks = {name: sum(sizes.values()) for name, sizes in phases.items()}
    phase = max(peaks, key=peaks.__getitem__)
    found = {kind: size for kind, size in phases[phase].items() if size}
    seconds = step_seconds(shape, workload, run.masks, run.weights_of_layer)
    there = {kind: size for kind, size in host.items() if size}
    return Estimate(workload.memory, found, there, sum(loading.values()), phase, seconds, run.quantized, peaks)


# ---------------------------------------------------------------------------------------------- the ways


def _plain(run: "_Run") -> dict[str, Sizes]:
    """Everything on the device; autograd keeps what it saves of all layers, or the boundaries alone."""
    workload, shape = run.workload, run.shape
    resident = {
        "weights": run.outside + sum(run.weights_of_layer),
        "masks": 2 * sum(run.mask_bytes),  # bits and signs
        "gradients": run.masked_weights * SCORE_FORMATS[workload.scores].bytes,
        "states": run.states,
    }
    score = SCORE_FORMATS[workload.scores].bytes
    score_bytes = score if workload.own_accumulation > 1 else 0
    above = [run.layer(i, score_bytes=score_bytes) for i in range(run.first, shape.layers)]
    kept = [layer.hidden if workload.gradient_checkpointing else layer.saved for layer in above]
    peaks = [sum(kept[:i]) + layer.peak for i, layer in enumerate(above)]
    return {
        "loss": resident | {"activations": sum(kept), "logits": run.loss, "reference": run.reference(1)},
        "backward": resident | {"activations": max(peaks), "reference": run.reference(1)},
        "optimiser": resident | {"sums": max(run.sum_of(name, score) for name in run.named)},
    }


def _resident(run: "_Run") -> dict[str, Sizes]:
    """Weights, masks and gradients of all layers on the device; boundaries and states on the host."""
    resident = {
        "weights": run.outside - run.embedding_alone + sum(run.weights_of_layer),
        "masks": sum(run.mask_bytes),
        "gradients": run.masked_weights * run.grad_bytes,
    }
    above = range(run.first, run.shape.layers)
    return {
        "loss": resident | {"logits": run.loss, "reference": run.reference(2)},
        "backward": resident
        | {"activations": max(run.layer(i).peak for i in above), "boundaries": _RESIDENT_BOUNDARIES * run.hidden},
        "optimiser": resident | run.updating(run.named),
    }


def _layerwise(run: "_Run") -> dict[str, Sizes]:
    """The layer at work, and the next one on its way: weights and masks of two, gradients of one."""
    depth = run.shape.layers
    phases: dict[str, Sizes] = {}

    def larger(name: str, sizes: Sizes) -> None:
        if name not in phases or sum(sizes.values()) > sum(phases[name].values()):
            phases[name] = sizes

    def two(one: int, other: int | None) -> Sizes:
        both = [i for i in (one, other) if i is not None]
        return {"weights": sum(run.weights_of_layer[i] for i in both), "masks": sum(run.mask_bytes[i] for i in both)}

    boundaries = _LAYERWISE_BOUNDARIES * run.hidden
    top = {"weights": run.weights_of_layer[-1] + run.outside - run.embedding_alone, "masks": run.mask_bytes[-1]}
    larger("forward", top | {"activations": run.layer(depth - 1).forward_peak, "boundaries": boundaries})
    for i in range(depth - 1):  # of experts two layers' weigh more than all that one layer's way down holds
        larger("forward", two(i, i + 1) | {"activations": run.layer(i).forward_peak, "boundaries": boundaries})
    larger("loss", top | {"logits": run.loss, "boundaries": boundaries, "reference": run.reference(3)})
    for i in range(run.first, depth):
        gradients = run.weights_masked_in(i) * run.grad_bytes
        held = two(i, i - 1 if i > run.first else None) | {"gradients": gradients}
        larger("backward", held | {"activations": run.layer(i).peak, "boundaries": boundaries})
        if run.named_in[i]:
            larger("optimiser", held | run.updating(run.named_in[i]) | {"boundaries": boundaries})
    return phases


# ---------------------------------------------------------------------------------------------- what they hold


class _Run:
    """Sizes of a model under a workload."""

    def __init__(self, shape: ModelShape, workload: Workload) -> None:
        self.shape, self.workload = shape, workload
        depth = shape.layers
        layers = tuple(range(depth)) if workload.layers is None else workload.layers
        check_rule(
            bool(layers) and all(0 <= i < depth for i in layers),
            "layers",
            f"lie in 0 to {depth - 1} ({shape.name} has {depth} layers)",
            list(layers),
        )
        window = shape.sliding_window
        check_rule(
            window is None or workload.sequence <= window,
            "sequence",
            f"be at most {window}, the window of {shape.name}: longer rows need a mask of T x T, not estimated here",
            workload.sequence,
        )
        targets = shape.targets(None if workload.target_modules is None else list(workload.target_modules))
        self.targets = set(targets)
        self.masks = [i in layers for i in range(depth)]
        self.first = min(layers)
        self.named_in = [[name for name in shape.matrices if masked and name in self.targets] for masked in self.masks]
        self.named = [name for names in self.named_in for name in names]  # layer by layer, as they are updated
        self.weights_of_layer = [self._weights(i) for i in range(depth)]
        self.mask_bytes = [sum(map(self.mask_of, names)) for names in self.named_in]

    @property
    def loss(self) -> int:
        return loss_peak(self.shape, self.workload.tokens, self.workload.objective)

    def reference(self, boundaries: int) -> int:
        """What an objective that asks for the base holds of it on the device."""
        return boundaries * self.hidden if self.workload.of_base else 0

    @property
    def hidden(self) -> int:
        """A boundary."""
        return self.workload.tokens * self.shape.hidden * self.shape.dtype_bytes

    @property
    def attention_masks(self) -> int:
        """What eager attention adds to its scores, of full layers and of those with a window: there at every time."""
        workload = self.workload
        squares = 2 * workload.tokens * workload.sequence if self.shape.has_sinks else 0
        return squares * self.shape.dtype_bytes

    @property
    def outside(self) -> int:
        """Embedding, final norm and head."""
        elements = self.shape.embedding * (1 if self.shape.tied else 2) + self.shape.hidden
        return elements * self.shape.dtype_bytes

    @property
    def quantized(self) -> int:
        return sum(self._is_quantized(i, name) for i in range(self.shape.layers) for name in self.shape.matrices)

    @property
    def embedding_alone(self) -> int:
        """The embedding where the head has a weight of its own: it rests on the host, and few of its rows travel."""
        return 0 if self.shape.tied else self.shape.embedding * self.shape.dtype_bytes

    @property
    def grad_bytes(self) -> int:
        return self.shape.dtype_bytes if self.workload.grad_dtype is None else DTYPE_BYTES[self.workload.grad_dtype]

    @property
    def masked_weights(self) -> int:
        return sum(map(self._size, self.named))

    @property
    def states(self) -> int:
        return int(self.masked_weights * self.workload.state_bytes)

    def weights_masked_in(self, layer: int) -> int:
        return sum(map(self._size, self.named_in[layer]))

    def mask_of(self, name: str) -> int:
        n, k = self.shape.matrices[name]
        return 4 * n * -(-k // 32)

    def updating(self, names: Sequence[str]) -> Sizes:
        """One matrix's step, while the next one's gradients are summed."""
        pairs = zip(names, [*names[1:], None])
        steps = [
            {"staging": self._staging(name), "sums": 0 if other is None else self.sum_of(other, self.grad_bytes)}
            for name, other in pairs
        ]
        return max(steps, key=lambda sizes: sum(sizes.values()))

    def sum_of(self, name: str, grad_bytes: float) -> int:
        """Where several processes sum gradients of 16 bits, one matrix's in fp32."""
        return 4 * self._size(name) if self.workload.processes > 1 and grad_bytes == 2 else 0

    def _staging(self, name: str) -> int:
        """States and new mask of one matrix, and its dense weight if it is quantised."""
        dense = self.shape.dtype_bytes if self.workload.quantize_masked else 0
        return int(self._size(name) * (self.workload.state_bytes + dense)) + self.mask_of(name)

    def _size(self, name: str) -> int:
        n, k = self.shape.matrices[name]
        return n * k

    def layer(self, index: int, *, score_bytes: int = 0) -> Layer:
        masked = self.targets if self.masks[index] else set()
        dense = [
            matrix for name, matrix in self.shape.linears.items() if self.workload.quantize_masked or name not in masked
        ]
        return Layer(
            self.shape,
            self.workload.tokens,
            masked,
            rows=self.workload.micro_batch,
            input_grad=index > self.first,
            dense=self._dense(dense) if self.workload.quantization else 0,
            coded={name for name in self.shape.experts if self._is_quantized(index, name)},
            score_bytes=score_bytes,
            flash=self.workload.device == "cuda",
        )

    def host(self) -> Sizes:
        """What rests in host memory where the device has its own."""
        workload, above = self.workload, self.shape.layers - self.first
        if workload.memory == "plain":
            return {}
        if workload.memory != "layerwise":
            return {"weights": self.embedding_alone, "states": self.states, "boundaries": above * self.hidden}
        return {
            "weights": self.outside + sum(self.weights_of_layer),
            "masks": sum(self.mask_bytes),
            "states": self.states,
            "boundaries": (above + 1 + workload.of_base) * workload.own_accumulation * self.hidden,
        }

    def loading(self) -> Sizes:
        """Before the first step: plain moves the weights to the device before it makes scores there."""
        sizes = {"weights": self.shape.parameters * self.shape.dtype_bytes}
        if self.workload.memory != "plain":
            sizes |= {"masks": sum(self.mask_bytes)}
            sizes |= {"states": self.masked_weights * SCORE_FORMATS[self.workload.scores].bytes}
        return sizes

    def share_memory(self, sizes: Sizes) -> None:
        """From what the device holds in a phase to what one memory holds, in which nothing is copied to be near."""
        if self.workload.memory != "plain":
            nothing_travels = {"boundaries": 0, "staging": 0}
            whole = {"weights": self.outside + sum(self.weights_of_layer), "masks": sum(self.mask_bytes)}
            sizes |= nothing_travels | self.host() | whole
        sizes["workspace"] = _CPU_WORKSPACE

    def _dense(self, matrices: Sequence[tuple[int, int]]) -> int:
        return max((n * k for n, k in matrices), default=0) * self.shape.dtype_bytes

    def _is_quantized(self, layer: int, name: str) -> bool:
        masked = self.masks[layer] and name in self.targets
        return self.workload.quantization is not None and (self.workload.quantize_masked or not masked)

    def _weights(self, layer: int) -> int:
        shape, workload = self.shape, self.workload
        size = shape.layer_rest * shape.dtype_bytes
        for name, (n, k) in shape.matrices.items():
            if workload.quantization is not None and self._is_quantized(layer, name):
                size += QUANTIZED_FORMATS[workload.quantization].bytes(n, k)
            else:
                size += n * k * shape.dtype_bytes
        return size
