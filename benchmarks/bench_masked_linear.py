"""What does a step through a masked layer cost: forward, d_x and d_scores, against a dense layer and against others?

bf16, N = K = 4096. The op starts from bf16 scores and a threshold, as the eager formulations and the paper's layer do.
The module has fp32 scores and, between two optimiser steps, reads its packed bits. In a "step" each gradient is new;
"accumulating", it is added to the .grad of earlier micro-batches, for the dense layer too. A step of either pays for
new memory, ours in huge pages; "products alone" leave that and autograd out.
"""

import torch

import mft_kernels
from mft_kernels.testing import random_inputs

from .harness import Finding, Samples, ratio, report, time_interleaved, times
from .rivals import KEEP_RATIO, eager_fast, eager_lean, paper_linear

FEATURES = 4096
ROUNDS = {64: 21, 512: 9, 2048: 7}  # M: rounds
CALLS = {64: 3, 512: 1, 2048: 1}  # M: calls in a row


class Layers:
    """The competitors on common inputs of M tokens; each method runs one step."""

    def __init__(self, tokens: int) -> None:
        t = random_inputs(tokens, FEATURES, FEATURES, torch.bfloat16, torch.bfloat16)
        self.x, self.grad_output = t.x.requires_grad_(), t.grad_output
        self.linear = torch.nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.bfloat16)
        self.linear.weight.data.copy_(t.weight)
        self.weight, self.scores = t.weight, t.scores.requires_grad_()
        self.threshold = mft_kernels.kept_threshold(t.scores, KEEP_RATIO)
        self.module = mft_kernels.MaskedLinear.from_linear(self.linear, keep_ratio=KEEP_RATIO)
        self.sum = torch.zeros(FEATURES, FEATURES)
        self.y, self.d_x, self.d_weight = (torch.empty_like(v) for v in (t.grad_output, t.x, t.weight))
        self.compiled = torch.compile(eager_fast, fullgraph=True, dynamic=False)

    def _step(self, y: torch.Tensor, parameter: torch.Tensor, accumulate: bool) -> None:
        self.x.grad = None
        if not accumulate:
            parameter.grad = None
        y.backward(self.grad_output)

    def dense(self, accumulate: bool = False) -> None:
        """nn.Linear."""
        self._step(self.linear(self.x), self.linear.weight, accumulate)

    def op(self) -> None:
        """mft_kernels.masked_linear from bf16 scores."""
        y = mft_kernels.masked_linear(self.x, self.weight, self.scores, self.threshold)
        self._step(y, self.scores, False)

    def masked_module(self, accumulate: bool) -> None:
        """mft_kernels.MaskedLinear with fp32 scores."""
        self._step(self.module(self.x), self.module.scores, accumulate)

    def in_kernel(self) -> None:
        """The module's three products, d_scores added to the buffer inside the kernel."""
        mask, weight, scores = self.module.current_mask(), self.module.weight, self.module.scores.detach()
        self._step(mft_kernels.masked_linear_packed(self.x, weight, mask.packed), self.scores, False)
        # No bit tells the sign of a score that is exactly 0: signs is None then, and the scores are read.
        mft_kernels.accumulate_score_grad(
            self.sum, self.grad_output, self.x.detach(), weight, scores=scores, signs=mask.signs
        )

    def rival(self, function) -> None:
        """A formulation of rivals.py from bf16 scores and the threshold."""
        self._step(function(self.x, self.weight, self.scores, self.threshold), self.scores, False)

    def paper(self) -> None:
        """The paper's layer, bf16 scores."""
        self._step(paper_linear(self.x, self.weight, self.scores), self.scores, False)

    def dense_products(self) -> None:
        """The dense layer's three products into memory that exists: no page fault, no autograd."""
        with torch.no_grad():
            torch.mm(self.x, self.weight.T, out=self.y)
            torch.mm(self.grad_output, self.weight, out=self.d_x)
            torch.mm(self.grad_output.T, self.x, out=self.d_weight)

    def op_products(self) -> None:
        """The op's three kernels, d_scores into memory that exists."""
        with torch.no_grad():
            mask = (self.scores, self.threshold, None)
            torch.ops.mft_cpu.masked_linear(self.x, self.weight, *mask, None, True)
            torch.ops.mft_cpu.grad_x(self.grad_output, self.weight, *mask, True)
            torch.ops.mft_cpu.grad_scores_(
                self.d_weight, self.grad_output, self.x, self.weight, self.scores, None, False
            )

    def competitors(self) -> dict:
        """Name -> one step, of those that every M has."""
        return {
            "dense step": self.dense,
            "dense accumulating": lambda: self.dense(accumulate=True),
            "op": self.op,
            "dense products alone": self.dense_products,
            "op's kernels alone": self.op_products,
            "module accumulating": lambda: self.masked_module(accumulate=True),
            "module, first micro-batch": lambda: self.masked_module(accumulate=False),
            "packed op + accumulate_score_grad": self.in_kernel,
        }

    def rivals(self) -> dict:
        """Name -> one step of the eager formulations."""
        return {
            "eager, masked weight kept": lambda: self.rival(eager_fast),
            "eager, masked twice": lambda: self.rival(eager_lean),
            "eager, compiled": lambda: self.rival(self.compiled),
        }


def measure(
    tokens: int, most_step: float, most_accumulating: float | None = None
) -> tuple[list[Finding], Samples, Layers]:
    """The layer against the dense one."""
    layers = Layers(tokens)
    competitors = layers.competitors() | (layers.rivals() if tokens == 512 else {})
    samples = time_interleaved(competitors, ROUNDS[tokens], CALLS[tokens])
    suffix = f", M = {tokens}"
    accumulating = (None, None) if most_accumulating is None else ("at most", most_accumulating)
    findings = [
        *times(samples, suffix),
        ratio(samples, "op", "dense step", "at most", most_step, suffix),
        ratio(samples, "module, first micro-batch", "dense step", "at most", most_step, suffix),
        ratio(samples, "op's kernels alone", "dense products alone", None, None, suffix),
        ratio(samples, "module accumulating", "dense accumulating", *accumulating, suffix),
        ratio(samples, "module accumulating", "dense step", *accumulating, suffix),
        ratio(samples, "packed op + accumulate_score_grad", "dense step", None, None, suffix),
        ratio(samples, "packed op + accumulate_score_grad", "dense accumulating", None, None, suffix),
    ]
    return findings, samples, layers


def main() -> None:
    """Print and store the answer."""
    torch.manual_seed(0)
    findings = measure(64, most_step=1.6, most_accumulating=1.3)[0]
    at_512, samples, layers = measure(512, most_step=1.15)
    findings += at_512
    for rival in layers.rivals():
        findings.append(ratio(samples, rival, "op", "at least", 2, ", M = 512"))
    samples = time_interleaved({"op": layers.op, "paper's layer": layers.paper}, rounds=3)
    findings.append(ratio(samples, "paper's layer", "op", "at least", 10, ", M = 512"))
    findings += measure(2048, most_step=1.10)[0]
    report(
        "masked_linear",
        f"One step through a layer, bf16, N = K = {FEATURES}, {torch.get_num_threads()} threads",
        findings,
    )
