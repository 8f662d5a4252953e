"""Measure if masks are free on the experts of a mixture: transformers' modules with and without masks, bf16 and fp32.

A step is the forward pass, d_x and the gradient of what learns. That is the dense weights (E, N, K), the scores, whose
mask is remembered, or the weights of a held mask, added into a buffer. A random router assigns the tokens. The dense
modules run with each of transformers' implementations that can keep up. Weights and inputs are the same for all.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from mft.masks.masked_experts import mask_experts
from mft_kernels import MaskedGroupedLinear
from mft_kernels.timing import Samples, time_within

from .cpu_ceilings import DTYPES
from .harness import Finding, Spread, comparison_row, ratio, report, select_cases
from .layer_competitors import FROM_SCORES, HELD
from .rivals import KEEP_RATIO
from .tables import experts_case_name

GROUPED, BATCHED, EAGER = "grouped_mm", "batched_mm", "eager"  # transformers' names
BOUND = 1.15  # times the fastest of transformers' implementations, at most
PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """Experts, hidden and intermediate size, and experts per token."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def module(self, dtype: torch.dtype) -> Any:
        """Return Mixtral's module for up to 8 experts, else OLMoE's. Every expert has the same random weights."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.intermediate}
        few = self.experts <= 8
        config: Any = MixtralConfig(**sizes, num_local_experts=self.experts) if few else OlmoeConfig(**sizes)
        if not few:
            config.num_experts = self.experts
        config._experts_implementation = GROUPED
        with torch.device("meta"):
            module: Any = MixtralExperts(config) if few else OlmoeExperts(config)
        module = module.to(dtype).to_empty(device="cpu")
        for name in PROJECTIONS:
            weight = getattr(module, name)
            weight.data.copy_(torch.randn(weight.shape[1:]) * 0.02)
        return module


@dataclass(frozen=True)
class Budget:
    """The cases, and how long a case may take beyond its minimum rounds, in one process."""

    sizes: tuple[Size, ...] = (Size(8, 2048, 3584, 2), Size(64, 2048, 1024, 8))
    tokens: tuple[int, ...] = (1, 64, 512)
    seconds: float = 0.5
    least: int = 3


STORED = Budget()


@dataclass(frozen=True)
class Case:
    """An op on some tokens, in a dtype."""

    size: Size
    dtype: str
    tokens: int
    op: str

    def columns(self) -> dict[str, Any]:
        """Return what a row of the record begins with."""
        return {"op": self.op, "dtype": self.dtype, "experts": self.size.experts, "tokens": self.tokens}

    def __str__(self) -> str:
        return experts_case_name(self.columns())


class Competitors:
    """One size in a dtype: the dense module, and the same module masked, on the same weights."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.dense = size.module(dtype)
        self.masked = copy.copy(self.dense)
        self.masked.__dict__ = self.dense.__dict__ | {
            "_parameters": dict(self.dense._parameters),
            "_modules": dict(self.dense._modules),
        }

        def mask(weight: Tensor, bias: Tensor | None, *, transposed: bool) -> MaskedGroupedLinear:
            return MaskedGroupedLinear(weight, bias, transposed=transposed, keep_ratio=KEEP_RATIO, scores_dtype=dtype)

        self.layers = [mask_experts(self.masked, name, mask) for name in PROJECTIONS]
        self._held = [(layer.packed_mask(), torch.zeros_like(layer.weight)) for layer in self.layers]

    def calls(self, op: str, tokens: int) -> dict[str, Callable[[], object]]:
        """Return the timed functions of "forward" or "step", without the implementations that are far too slow."""
        generator = torch.Generator().manual_seed(tokens)
        x, grad = (torch.randn(tokens, self.size.hidden, generator=generator).to(self.dtype) for _ in range(2))
        chosen, places = torch.rand(tokens, self.size.experts, generator=generator).topk(self.size.top_k)
        inputs = x.requires_grad_(op == "step"), places, chosen.to(self.dtype).requires_grad_(op == "step")
        scores = [layer.scores for layer in self.layers]

        def run(module: Any, learned: list[Tensor]) -> object:
            if op == "forward":
                with torch.no_grad():
                    return module(*inputs)
            return torch.autograd.grad(module(*inputs), [inputs[0], inputs[2], *learned], grad)

        def dense(name: str) -> object:
            self.dense.config._experts_implementation = name
            return run(self.dense, list(self.dense.parameters()))

        def held() -> object:
            for layer, (packed, buffer) in zip(self.layers, self._held):
                layer.hold(packed, buffer)
            try:
                return run(self.masked, [])
            finally:
                for layer in self.layers:
                    layer.release()

        # A batched product copies the weights of every row's expert: 4 GB for 64 tokens of 64 experts in bf16. In the
        # eager loop each weight[e] has a gradient of the size of all experts: 27 s per step (grouped_mm: 0.5 s).
        rivals = [GROUPED, *([BATCHED] if tokens == 1 else []), *([EAGER] if op == "forward" else [])]
        return {
            **{name: lambda name=name: dense(name) for name in rivals},
            FROM_SCORES: lambda: run(self.masked, scores),
            HELD: held,
        }


def rows_of(case: Mapping[str, Any], samples: Samples) -> list[dict[str, Any]]:
    """Return one row per competitor: times, and ratios to grouped_mm."""
    return [
        {**case, **comparison_row(samples, name, GROUPED), "target": BOUND if name in (FROM_SCORES, HELD) else None}
        for name in samples
    ]


def findings_of(case: Mapping[str, Any], samples: Samples) -> list[Finding]:
    """Return the ratios of ours to each of theirs, and therefore to the fastest."""
    suffix = f": {case['op']}, {case['dtype']}, {case['experts']} experts, {case['tokens']} tokens"
    theirs = [name for name in samples if name not in (FROM_SCORES, HELD)]
    return [ratio(samples, name, rival, "at most", BOUND, suffix) for name in (FROM_SCORES, HELD) for rival in theirs]


def main(quick: bool = False, budget: Budget = STORED) -> None:
    """Print and store the answer of this process."""
    torch.manual_seed(0)
    findings, cases = [], []
    asked = select_cases(
        Case(size, dtype, tokens, op)
        for size in budget.sizes
        for dtype in DTYPES
        for tokens in budget.tokens
        for op in (("forward", "step") if tokens == 1 else ("step",))
    )
    for (size, dtype), of_module in groupby(asked, lambda case: (case.size, case.dtype)):
        made = Competitors(size, DTYPES[dtype])
        for case in of_module:
            seconds = 0 if quick else budget.seconds
            samples = time_within(made.calls(case.op, case.tokens), seconds, least=1 if quick else budget.least)
            cases += rows_of(case.columns(), samples)
            findings += findings_of(case.columns(), samples)
            shown = {name: f"{Spread.of(times).median:.1f}" for name, times in samples.items()}
            print(f"{case}, ms: {shown}", flush=True)
    threads = torch.get_num_threads()
    title = f"A mixture's experts, masked, beside transformers' dense ones, {threads} threads"
    report("experts", title, findings, printed=False, cases=cases)
