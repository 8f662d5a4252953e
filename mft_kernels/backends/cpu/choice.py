"""Choose the path by which the cpu library computes a product: by a model of bytes and flops, or by measuring.

With MFT_AUTOTUNE=1 the first call of a size times every path that can serve it, on its own operands. The fastest is
taken from then on, also by other processes; see autotune.py.
"""

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import built
from ..autotune import Choices, fastest
from ..built import library_path
from ..processor import this_processor

logger = logging.getLogger("mft_kernels")

_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 2, 5, 0.2  # of a measurement; no round begins after _SECONDS


class Product(NamedTuple):
    """A product to be computed: M tokens, weight (N, K)."""

    product: str  # "forward", "d_x" or "d_scores"
    dtype: str
    m: int
    n: int
    k: int
    weight_bytes: float  # memory traffic per element of the weight; see weight_bytes() and grad_bytes()
    mask_bytes: float  # the part of weight_bytes for the mask or sign
    source: str = ""  # dtype of the scores or words that give the mask or sign; "" for none

    def paths(self, capability: str) -> list[str]:
        """Return the paths that can serve, the fastest by the model first."""
        sizes = (self.m, self.n, self.k, self.weight_bytes, self.mask_bytes)
        return built.cpu_ops.paths(capability, self.product, self.dtype, *sizes).split(",")


def product_of(product: str, tokens: Tensor, weight: Tensor, mask: Tensor | None) -> Product:
    """Describe the forward pass or d_x of ``tokens``, with the mask from scores or int32 words."""
    n, k = weight.shape
    size = weight_bytes(weight, mask)
    return Product(product, _name(weight.dtype), tokens.shape[:-1].numel(), n, k, size, mask_bytes(mask), _source(mask))


def grad_product_of(out: Tensor, x: Tensor, weight: Tensor | None, sign: Tensor | None, *, accumulate: bool) -> Product:
    """Describe d_scores of the tokens x, written to ``out`` or added to it."""
    n, k = out.shape
    size = grad_bytes(out, weight, sign, accumulate=accumulate)
    return Product("d_scores", _name(x.dtype), len(x), n, k, size, mask_bytes(sign), _source(sign))


def weight_bytes(weight: Tensor, mask: Tensor | None) -> float:
    """Return the bytes that the forward pass or d_x reads per element of the weight, as the library counts them."""
    return built.cpu_ops.weight_bytes("forward", weight.element_size(), mask_bytes(mask), 0, False)


def grad_bytes(out: Tensor, weight: Tensor | None, sign: Tensor | None, *, accumulate: bool) -> float:
    """Return the same for d_scores, which reads and writes ``out``, or only writes it."""
    factor = 0 if weight is None else weight.element_size()
    return built.cpu_ops.weight_bytes("d_scores", factor, mask_bytes(sign), out.element_size(), accumulate)


def mask_bytes(scores_or_words: Tensor | None) -> float:
    """Return the bytes per element of what the mask or sign comes from."""
    if scores_or_words is None:
        return 0.0
    return scores_or_words.element_size() if scores_or_words.is_floating_point() else 1 / 8


def measured_path(product: Product, prepare: Callable[[], Callable[[str], object]]) -> str:
    """Return the fastest path. It is measured now unless it was measured before.

    Args:
        prepare: returns a function that computes the product by a path, into memory that nobody reads.
    """
    if 0 in (product.m, product.n, product.k):
        return "auto"
    capability = built.cpu_ops.capability()
    choices = _choices(capability)
    bucket = 1 << (product.m - 1).bit_length()
    key = product._asdict() | {"m": bucket, "threads": torch.get_num_threads()}
    path = choices.get(key)
    if path is None:
        paths = product.paths(capability)
        path = paths[0] if len(paths) == 1 else _measure(product, paths, prepare())
        choices.add(key, path)
    return path


# ---------------------------------------------------------------------------------------------- below: private


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source(scores_or_words: Tensor | None) -> str:
    return "" if scores_or_words is None else _name(scores_or_words.dtype)


def _measure(product: Product, paths: list[str], run: Callable[[str], object]) -> str:
    """Return the model's path, paths[0], unless another one is clearly faster."""
    took = dict.fromkeys(paths, float("inf"))
    begin = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - begin > _SECONDS:
            break
        for path in paths:
            took[path] = min(took[path], _time(run, path))
    best = fastest(took, paths[0])
    logger.info("measured %s: %s -> %s", product, {path: f"{t * 1e3:.3f} ms" for path, t in took.items()}, best)
    return best


def _time(run: Callable[[str], object], path: str) -> float:
    start = time.perf_counter()
    run(path)
    return time.perf_counter() - start


@functools.cache
def _choices(capability: str) -> Choices:
    def is_path(facts: dict[str, Any], path: str) -> bool:
        sizes = {name: value for name, value in facts.items() if name != "threads"}
        try:
            return path in Product(**sizes).paths(capability)
        except (TypeError, ValueError, RuntimeError):  # not the fields of a product, or no such product or dtype
            return False

    return Choices(_made_for(capability), is_path)


def _made_for(capability: str) -> dict[str, str]:
    return {
        "processor": str(this_processor()),
        "instruction_set": capability,
        "torch": torch.__version__,
        "library": hashlib.sha256(library_path("cpu").read_bytes()).hexdigest(),
    }
