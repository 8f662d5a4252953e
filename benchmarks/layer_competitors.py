"""One linear layer in each formulation, on common inputs.

dense                 nn.Linear with a learning weight: the bound
ours, from scores     mft_kernels.masked_linear from scores and a threshold, like the eager formulations
ours, module          MaskedLinear as autograd trains it: fp32 scores, whose mask is computed once per step
ours, held mask       as the engines train it: the mask as bits, gradients added to an existing buffer
in place              nn.Linear whose weight is masked and has a gradient; the dropped values are stored elsewhere
eager                 the fastest formulation with PyTorch's own ops; see rivals.eager_fast
compiled              the same under torch.compile
the paper's layer     a sort in every forward
LoRA                  peft's layer, rank 16

If another backend is measured in the same run, each of our competitors appears again under its name (side_by_side.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

import mft_kernels
from mft_kernels.mask.held import masked_linear_held
from mft_kernels.mask.masked_in_place import MaskedInPlace
from mft_kernels.testing import Inputs, random_inputs

from .rivals import KEEP_RATIO, LORA, LORA_RANK, eager_fast, paper_linear
from .side_by_side import OURS as OURS_ALONE
from .side_by_side import SideBySide

DENSE, PAPER = "dense", "the paper's layer"
FROM_SCORES, MODULE, HELD = "ours, from scores", "ours, module", "ours, held mask"
IN_PLACE = "in place"
EAGER, COMPILED = "eager", "compiled"
OURS = (FROM_SCORES, MODULE, HELD)  # run by a backend's kernels
# What each has to read and write, in roofline's terms. LoRA is missing: d_A and d_B are another product.
FORMS = {
    DENSE: "dense",
    FROM_SCORES: "scores",
    MODULE: "module",
    HELD: "held",
    IN_PLACE: "dense",
    EAGER: "scores",
    COMPILED: "scores",
    PAPER: "scores",
}

# Backward passes are timed on a graph that is kept.
torch._functorch.config.donated_buffer = False
# One compilation each for a gradient of nothing, x, what learns and both, at M = 1 and above, and if square.
torch._dynamo.config.recompile_limit = 64
# One graph for all other shapes: the compiled part is elementwise, and the GEMM is called.
compiled_eager = torch.compile(eager_fast, fullgraph=True, dynamic=True)

Call = Callable[[], object]


@dataclass(frozen=True)
class Formulation:
    """y = layer(x) and its learned tensors; ``frozen`` is the layer in which nothing learns."""

    layer: Callable[[Tensor], Tensor]
    learned: tuple[Tensor, ...]
    frozen: Callable[[Tensor], Tensor]
    into_buffer: bool = False  # the backward pass adds the learned tensors' gradient into a buffer and returns none


class LayerCompetitors:
    """The formulations of one (N, K) layer, and their ops on M tokens; weight and scores have the same dtype."""

    def __init__(self, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.n, self.k, self.dtype = n, k, dtype
        inputs = random_inputs(1, n, k, dtype, dtype)
        self.weight, self.scores = inputs.weight, inputs.scores
        self._backends = SideBySide.here()
        with self._backends.around(OURS_ALONE):
            self.threshold = mft_kernels.kept_threshold(self.scores, KEEP_RATIO)
            self._packed = mft_kernels.pack_mask(self.scores, self.threshold)
        self._made: dict[str, Formulation] = {}

    def call(self, name: str, op: str, inputs: Inputs) -> Call:
        """Return a function that runs one op of a formulation. It must be called in SideBySide.around(name).

        forward: without autograd. d_x, d_scores: the backward pass of a layer in which only x, or only what learns,
        requires a gradient. step: forward and backward with both. Gradients are new tensors, except those that are
        added to a buffer.
        """
        formulation = self._formulation(name)
        wants_x, wants_learned = op in ("d_x", "step"), op in ("d_scores", "step")
        x, grad = inputs.x.detach().requires_grad_(wants_x), inputs.grad_output
        for tensor in formulation.learned:
            tensor.requires_grad_(wants_learned)
        layer = formulation.layer if wants_learned else formulation.frozen
        if op == "forward":
            return torch.no_grad()(lambda: layer(x))
        wanted = [*([x] if wants_x else []), *(formulation.learned if wants_learned else [])]
        if op == "step":
            return lambda: torch.autograd.grad(layer(x), wanted, grad)
        with self._backends.around(name):
            y = layer(x)
        if formulation.into_buffer and wants_learned:
            return lambda: y.backward(grad, retain_graph=True)
        return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)

    def _formulation(self, name: str) -> Formulation:
        if name not in self._made:
            self._made[name] = self._make(self._backends.our_name(name))
        return self._made[name]

    def _make(self, name: str) -> Formulation:
        weight, threshold = self.weight, self.threshold
        if name == HELD:
            buffer = torch.zeros(self.n, self.k, dtype=self.dtype)
            return Formulation(
                lambda x: masked_linear_held(x, weight, self._packed, grad_buffer=buffer),
                (),
                lambda x: masked_linear_held(x, weight, self._packed),
                into_buffer=True,
            )
        if name == MODULE:
            linear = nn.Linear(self.k, self.n, bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            module = mft_kernels.MaskedLinear.from_linear(linear, keep_ratio=KEEP_RATIO, init="normal")
            return Formulation(module, (module.scores,), module)
        if name == LORA:
            lora = make_lora(weight)
            return Formulation(lora, tuple(p for p in lora.parameters() if p is not lora.weight), lora)
        if name in (DENSE, IN_PLACE):
            dense = weight.clone()  # it learns; the others' weight does not
            if name == IN_PLACE:
                MaskedInPlace(dense).change(self._packed)
            return _learned_formulation(lambda x: F.linear(x, dense), dense)
        scores = self.scores.clone()
        if name == PAPER:
            return _learned_formulation(lambda x: paper_linear(x, weight, scores), scores)
        function = {FROM_SCORES: mft_kernels.masked_linear, EAGER: eager_fast, COMPILED: compiled_eager}[name]
        return _learned_formulation(lambda x: function(x, weight, scores, threshold), scores)


def _learned_formulation(layer: Callable[[Tensor], Tensor], *learned: Tensor) -> Formulation:
    return Formulation(layer, learned, layer)


def make_lora(weight: Tensor, rank: int = LORA_RANK) -> LoraLinear:
    """Return peft's layer on a frozen weight (N, K), with adapters of its dtype."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank)
    return LoraLinear(linear, "default", config=config, r=rank, lora_alpha=2 * rank)


def inputs_of(tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Return x (M, K) and grad_output (M, N); the weight is LayerCompetitors' own."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (k, n))
    empty = torch.empty(0)
    return Inputs(x, empty, empty, empty, grad)
