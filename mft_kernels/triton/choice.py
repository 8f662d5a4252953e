"""Fused kernel, or one mask pass into scratch and then torch's GEMM: by a table, or measured once and remembered.

The same sizes on the same device give the same kernel. A measurement (MFT_AUTOTUNE=1) runs on sizes of its own, the
next power of two in M, so that it does not depend on which batch came first; it is kept on disk, and
torch.use_deterministic_algorithms(True) ignores it.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from ..autotune import Choices, fastest, measuring
from .target import Target

logger = logging.getLogger("mft_kernels")

FUSED, SCRATCH = "fused", "scratch"

#: The most tokens for which the fused product is taken. In 16 bits, a pass over weight, scores and masked weight costs
#: c / M of the GEMM, c = 3 (FLOP/s) / (byte/s); a fused kernel at the share e of the GEMM's speed wins up to
#: M = c e / (1 - e). All of it is an estimate from the cards' figures; not measured on any GPU.
#:   sm_90: c = 790; mask on the first operand e = 0.84 -> 4096, through shared memory e = 0.6 -> 1024
#:   sm_100: c = 620, e = 0.6; sm_80: c = 440, e = 0.7; gfx942: c = 400, e = 0.7 -> about 1024
_MOST_TOKENS = {("sm_90", True): 4096, ("sm_90", False): 1024}
_MOST_TOKENS_ELSEWHERE = 1024
#: fp32 in full precision runs on ordinary cores, and rows that are not aligned are read element by element: there
#: torch's GEMM is far ahead of Triton's.
_MOST_TOKENS_SLOW = 64


@dataclass(frozen=True)
class Product:
    """A product to be made. M tokens; forward (M, K) -> (M, N), transposed (M, N) -> (M, K)."""

    m: int
    n: int
    k: int
    transposed: bool
    dtype: str
    mask: str  # "packed", or the scores' dtype
    exact: bool = False  # fp32 in full precision
    aligned: bool = True  # rows begin at multiples of 16 bytes
    with_scores: bool = False  # d_x together with d_scores


def by_table(product: Product, target: Target) -> str:
    """FUSED or SCRATCH, from the table alone."""
    if product.exact or not product.aligned:
        return FUSED if product.m <= _MOST_TOKENS_SLOW else SCRATCH
    most = _MOST_TOKENS.get((str(target), target.swapped), _MOST_TOKENS_ELSEWHERE)
    return FUSED if product.m <= most else SCRATCH


def automatic(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """FUSED or SCRATCH: what was measured if MFT_AUTOTUNE=1, else by_table.

    Args:
        candidates: for FUSED and SCRATCH, a function that runs the product on M tokens; called to measure only.
    """
    if not measuring():
        chosen = by_table(product, target)
        _say(product.n, product.k, product.transposed, chosen, str(target))
        return chosen
    bucket = max(16, 1 << (product.m - 1).bit_length())
    choices, key = _choices(), asdict(product) | {"m": bucket}
    measured = choices.get(key)
    if measured is None:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed inside a graph
            return by_table(product, target)
        measured = _measure(replace(product, m=bucket), target, candidates)
        choices.add(key, measured)
    return measured


@functools.cache  # once for each
def _say(n: int, k: int, transposed: bool, chosen: str, target: str) -> None:
    name = "d_x" if transposed else "forward"
    logger.info("%s of %d x %d on %s: %s, by the table for its number of tokens", name, n, k, target, chosen)


def _measure(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    times = {name: _time(functools.partial(run, product.m)) for name, run in candidates.items()}
    best = fastest(times, by_table(product, target))
    logger.info("measured %s: %s -> %s", product, {n: f"{t:.3f} ms" for n, t in times.items()}, best)
    return best


def _time(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


@functools.cache
def _choices() -> Choices:
    return Choices(_made_for(), lambda product, chosen: chosen in (FUSED, SCRATCH))


def _made_for() -> dict[str, str]:
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": hashlib.sha256(sources).hexdigest(),
    }
