"""Choose the way to a product by the model of the card (cost.py), or by a measurement that is made once and remembered.

The ways are the fused kernel, and a mask pass into scratch followed by torch's GEMM. The same sizes on the same device
give the same way.

A measurement (MFT_AUTOTUNE=1) rounds M up to a power of two, 16 at least, so that it does not depend on which batch
came first. It is kept on disk, and torch.use_deterministic_algorithms(True) ignores it.
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
from .plan import Operands, Problem, fused_seconds, scratch_seconds
from .target import Target

logger = logging.getLogger("mft_kernels")

FUSED, SCRATCH = "fused", "scratch"

#: The most tokens that are fused in two cases: fp32 in full precision, which runs on ordinary cores, and rows that are
#: not aligned, which are read element by element. There torch's GEMM is far faster than Triton's. The model covers
#: neither case. An estimate.
_MOST_TOKENS_SLOW = 64
_MEMORY = 2**14  # as in plan.py


@dataclass(frozen=True)
class Product:
    """A product to compute. M tokens; forward (M, K) -> (M, N), transposed (M, N) -> (M, K)."""

    m: int
    n: int
    k: int
    transposed: bool
    dtype: str
    mask: str  # "packed", or the scores' dtype
    exact: bool = False  # fp32 in full precision
    aligned: bool = True  # rows begin at multiples of 16 bytes
    with_scores: bool = False  # d_x together with d_scores


@functools.lru_cache(_MEMORY)
def by_model(product: Product, target: Target) -> str:
    """Return FUSED or SCRATCH: what the model of the card expects to be faster."""
    if product.exact or not product.aligned:
        return FUSED if product.m <= _MOST_TOKENS_SLOW else SCRATCH
    p, q = (product.k, product.n) if product.transposed else (product.n, product.k)
    operands = Operands(_bytes(product.dtype), 0 if product.mask == "packed" else _bytes(product.mask))
    problem = Problem(target, product.m, p, q, operands)
    return FUSED if fused_seconds(problem) <= scratch_seconds(problem) else SCRATCH


def _bytes(dtype: str) -> int:
    return getattr(torch, dtype.removeprefix("torch.")).itemsize


def automatic(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """Return the chosen candidate's name: the measured one if MFT_AUTOTUNE=1, otherwise that of by_model.

    Args:
        candidates: functions that run the product on M tokens, by name; called only to measure.
    """
    if not measuring():
        chosen = by_model(product, target)
        _say(product.n, product.k, product.transposed, chosen, str(target))
        return chosen
    bucket = max(16, 1 << (product.m - 1).bit_length())
    choices, key = _choices(), asdict(product) | {"m": bucket}
    measured = choices.get(key)
    if measured is None:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed inside a graph
            return by_model(product, target)
        measured = _measure(replace(product, m=bucket), target, candidates)
        choices.add(key, measured)
    return measured


@functools.cache  # once for each combination
def _say(n: int, k: int, transposed: bool, chosen: str, target: str) -> None:
    name = "d_x" if transposed else "forward"
    logger.info(
        "%s of %d x %d on %s: %s, chosen by the GPU's performance model for this number of tokens",
        name,
        n,
        k,
        target,
        chosen,
    )


def _measure(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    times = {name: _time(functools.partial(run, product.m)) for name, run in candidates.items()}
    best = fastest(times, by_model(product, target))
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
