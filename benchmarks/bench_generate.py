"""Measure if a masked model generates as fast as the dense one: SmolLM2-135M, batch 1, bf16 and fp32, tokens/s.

Every linear layer of the decoder is masked. MaskedLinear checks if its scores have changed. Held masks are kept as
bits, also over weights in NF4 and int8, which the kernels decode. Weights are random, which does not change the times.
Cache, greedy sampling and the rest are those of transformers, so much of the time per token is spent on the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.quantize import quantize_model
from mft.memory.shapes import known_config
from mft_kernels.timing import Samples, time_within

from .cpu_ceilings import DTYPES
from .harness import Finding, Spread, ratio, report
from .training_steps import build

DENSE, MODULE, HELD = "dense", "ours, module", "ours, held mask"
QUANTIZED = {f"{HELD}, {kind} weights": kind for kind in ("nf4", "int8")}


@dataclass(frozen=True)
class Budget:
    """Prompt tokens and new tokens, and how long a dtype may take beyond its minimum rounds, in one process."""

    prompt: int = 32
    new: int = 32
    seconds: float = 12.0
    config: Mapping[str, Any] = field(default_factory=lambda: known_config("smollm2-135m"))


STORED = Budget()


def models(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the five models of one dtype. The masks are random and keep 90 %."""
    found = {name: build(config, dtype).eval().requires_grad_(False) for name in (DENSE, MODULE, HELD, *QUANTIZED)}
    for name in (MODULE, HELD, *QUANTIZED):
        mask_model(found[name], MaskConfig.paper())
    for name, kind in QUANTIZED.items():
        quantize_model(found[name], kind, masked=True)
    for name in (HELD, *QUANTIZED):
        for module in masked_modules(found[name]).values():
            module.hold(module.packed_mask(), weight=getattr(module, "quantized", None))
    return found


def generate(model: Any, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Generate this number of new tokens, greedily, with a cache."""
    options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def rates(dtype: str, samples: Samples, tokens: int, findings: list[Finding], rows: list[dict]) -> None:
    """Add tokens/s of each competitor to findings and rows."""
    for name, times in samples.items():
        rate = Spread.of([tokens * 1e3 / ms for ms in times])
        rows.append({"dtype": dtype, "competitor": name, "tokens_per_s": vars(rate), "rounds": len(times)})
        findings.append(Finding(f"{name}: {dtype}", rate, "tokens/s"))


def main(quick: bool = False, budget: Budget = STORED) -> None:
    """Print and store the answer of this process."""
    prompt = torch.randint(3, 200, (1, budget.prompt), generator=torch.Generator().manual_seed(0))
    findings: list[Finding] = []
    rows: list[dict] = []
    for dtype in DTYPES:
        found = models(budget.config, DTYPES[dtype])
        calls = {name: lambda m=model: generate(m, prompt, budget.new) for name, model in found.items()}
        samples = time_within(calls, 0 if quick else budget.seconds, least=3)
        rates(dtype, samples, budget.new, findings, rows)
        findings += [ratio(samples, name, DENSE, "at most", 1.0, f": {dtype}") for name in (MODULE, HELD)]
    tokens = f"{budget.prompt} + {budget.new} tokens"
    title = f"SmolLM2-135M's generate, batch 1, {tokens}, {torch.get_num_threads()} threads"
    report("generate", title, findings, competitors=rows)
