"""Bytes of a model's weights, masks, states and activations for a workload; pure Python."""

import itertools
import math
from collections.abc import Sequence

from mft.checks import check_rule
from mft.memory.activations import Layer, loss_peak
from mft.memory.shapes import ModelShape
from mft.memory.workload import Workload
from mft.number_formats import DTYPE_BYTES, SCORE_FORMATS
from mft.quantizers import QUANTIZERS

Sizes = dict[str, int]

#: The most bytes of a matrix's scores and moments that are copied to the device while another one is stepped. A step
#: takes about a twentieth of its copies' time (by a model of an H100). Larger ones would hold too much memory for that.
STATES_AHEAD = 512 << 20
_SELECTION_WORKSPACE = 80 << 20  # keys and digits of _DEVICE_CHUNK scores in mft_kernels/mask/shared_threshold.py


class RunSizes:
    """The sizes of a model for a workload.

    Raises: ValueError for unknown layers or target modules, and for a sequence beyond the sliding window.
    """

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
    def above(self) -> int:
        """Number of layers from the first masked one on."""
        return self.shape.layers - self.first

    @property
    def loss(self) -> int:
        return loss_peak(self.shape, self.workload.tokens, self.workload.objective)

    def reference(self, boundaries: int) -> int:
        """Return the bytes of the base's boundaries on the device, if the objective needs the base; else 0."""
        return boundaries * self.hidden if self.workload.of_base else 0

    @property
    def hidden(self) -> int:
        """Bytes of a boundary."""
        return self.workload.tokens * self.shape.hidden * self.shape.dtype_bytes

    @property
    def attention_masks(self) -> int:
        """Bytes of eager attention's masks: one for full layers, one for layers with a window. They always exist."""
        workload = self.workload
        squares = 2 * workload.tokens * workload.sequence if self.shape.has_sinks else 0
        return squares * self.shape.dtype_bytes

    @property
    def outside(self) -> int:
        """Bytes of embedding, final norm and head."""
        elements = self.shape.embedding * (1 if self.shape.tied else 2) + self.shape.hidden
        return elements * self.shape.dtype_bytes

    @property
    def quantized(self) -> int:
        return sum(self._is_quantized(i, name) for i in range(self.shape.layers) for name in self.shape.matrices)

    @property
    def embedding_alone(self) -> int:
        """Bytes of the embedding if the head has its own weight: it stays on the host, and only few rows are copied."""
        return 0 if self.shape.tied else self.shape.embedding * self.shape.dtype_bytes

    @property
    def grad_bytes(self) -> int:
        return self.shape.dtype_bytes if self.workload.grad_dtype is None else DTYPE_BYTES[self.workload.grad_dtype]

    @property
    def scores(self) -> int:
        """Bytes of all scores. Their gradients have the same size if autograd makes them."""
        return self.masked_weights * SCORE_FORMATS[self.workload.scores].bytes

    @property
    def masked_weights(self) -> int:
        return sum(map(self.size_of, self.named))

    @property
    def states(self) -> int:
        return int(self.masked_weights * self.workload.state_bytes)

    @property
    def aside(self) -> int:
        """Bytes of the dropped values that in_place stores outside the weights."""
        dropped = 1 - self.workload.keep_ratio if self.workload.budget is None else self.workload.budget
        return math.ceil(dropped * self.masked_weights) * self.shape.dtype_bytes

    def weights_masked_in(self, layer: int) -> int:
        return sum(map(self.size_of, self.named_in[layer]))

    def mask_of(self, name: str) -> int:
        n, k = self.shape.matrices[name]
        return 4 * n * -(-k // 32)

    def update_sizes(self, names: Sequence[str]) -> Sizes:
        """Return the largest bytes of one matrix's step; the next one's states arrive, and its gradient is summed."""
        steps: list[Sizes] = [{"staging": self._staging_bytes(names[-1]), "sums": 0}]
        for name, other in itertools.pairwise(names):
            coming = int(self.size_of(other) * self.workload.state_bytes)
            coming = coming if coming <= STATES_AHEAD else 0
            steps.append({"staging": self._staging_bytes(name) + coming, "sums": self.sum_of(other, self.grad_bytes)})
        return max(steps, key=lambda sizes: sum(sizes.values()))

    def flip_sizes(self) -> Sizes:
        """Return the most bytes of one matrix's step in place: a copy of it, a byte per weight, and its mask."""
        staging = max(self.size_of(name) * (self.shape.dtype_bytes + 1) + self.mask_of(name) for name in self.named)
        return {"staging": staging, "sums": max(self.sum_of(name, self.grad_bytes) for name in self.named)}

    def selection(self, held: Sizes) -> dict[str, Sizes]:
        """Return the phase after the last layer's step with a budget: bytes by kind; empty without a budget."""
        if self.workload.budget is None:
            return {}
        score = SCORE_FORMATS[self.workload.scores].bytes
        staging = max(int(self.size_of(name) * score) + self.mask_of(name) for name in self.named)
        return {"selection": held | {"staging": staging, "workspace": _SELECTION_WORKSPACE}}

    def sum_of(self, name: str, grad_bytes: float) -> int:
        """Return the bytes of one matrix's gradient in fp32 if several processes sum gradients in 16 bits; else 0."""
        return 4 * self.size_of(name) if self.workload.processes > 1 and grad_bytes == 2 else 0

    def _staging_bytes(self, name: str) -> int:
        """Return the bytes of one matrix's states, new mask, and dense weight if it is quantised."""
        dense = self.shape.dtype_bytes if self.workload.quantize_masked else 0
        return int(self.size_of(name) * (self.workload.state_bytes + dense)) + self.mask_of(name)

    def size_of(self, name: str) -> int:
        """Return the number of weights of one matrix, or of all experts' matrices of a projection."""
        n, k = self.shape.matrices[name]
        return n * k

    def layer(self, index: int, *, score_bytes: int = 0) -> Layer:
        masked = self.targets if self.masks[index] else set()
        dense = [
            matrix for name, matrix in self.shape.linears.items() if self.workload.quantize_masked or name not in masked
        ]
        largest = max((n * k for n, k in dense), default=0) * self.shape.dtype_bytes
        return Layer(
            self.shape,
            self.workload.tokens,
            masked,
            rows=self.workload.micro_batch,
            input_grad=index > self.first,
            dense=largest if self.workload.quantization else 0,
            coded={name for name in self.shape.experts if self._is_quantized(index, name)},
            score_bytes=score_bytes,
            flash=self.workload.device == "cuda",
        )

    def _is_quantized(self, layer: int, name: str) -> bool:
        masked = self.masks[layer] and name in self.targets
        return self.workload.quantization is not None and (self.workload.quantize_masked or not masked)

    def _weights(self, layer: int) -> int:
        shape, workload = self.shape, self.workload
        size = shape.layer_rest * shape.dtype_bytes
        for name, (n, k) in shape.matrices.items():
            if workload.quantization is not None and self._is_quantized(layer, name):
                size += QUANTIZERS[workload.quantization].bytes(n, k)
            else:
                size += n * k * shape.dtype_bytes
        return size
