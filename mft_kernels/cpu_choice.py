"""Which way the cpu library makes a product: by its model of bytes and flops, or measured once and remembered.

MFT_CPU_CHOICE=measure: the first call of a size times every path that can serve on its own operands, and the fastest is
taken from then on, by other processes too: it is kept in a file of the user's cache folder that belongs to processor,
instruction set, torch and library. torch.use_deterministic_algorithms(True) pins the model.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .built import library_path
from .processor import this_processor

logger = logging.getLogger("mft_kernels")

VARIABLE = "MFT_CPU_CHOICE"
MODEL, MEASURE = "model", "measure"

#: A measured winner has to be this much faster to overrule the model: less is noise.
_MARGIN = 1.03
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 2, 5, 0.2  # of a measurement; no further round after so long


class Product(NamedTuple):
    """A product to be made: M tokens, weight (N, K)."""

    product: str  # "forward", "d_x" or "d_scores"
    dtype: str
    m: int
    n: int
    k: int
    weight_bytes: float  # of memory for each element of the weight; see weight_bytes() and grad_bytes()
    mask_bytes: float  # of these, of the mask or sign
    source: str = ""  # of the mask or sign: the dtype of scores or words; "" for none

    def paths(self, capability: str) -> list[str]:
        """Those that can serve, the fastest by the model first."""
        sizes = (self.m, self.n, self.k, self.weight_bytes, self.mask_bytes)
        return torch.ops.mft_cpu.paths(capability, self.product, self.dtype, *sizes).split(",")


def product_of(product: str, tokens: Tensor, weight: Tensor, mask: Tensor | None) -> Product:
    """The forward pass or d_x of ``tokens``, with the mask from scores or int32 words."""
    n, k = weight.shape
    size = weight_bytes(weight, mask)
    return Product(product, _name(weight.dtype), tokens.shape[:-1].numel(), n, k, size, mask_bytes(mask), _source(mask))


def grad_product_of(out: Tensor, x: Tensor, weight: Tensor | None, sign: Tensor | None, *, accumulate: bool) -> Product:
    """d_scores of the tokens x, written to ``out`` or added to it."""
    n, k = out.shape
    size = grad_bytes(out, weight, sign, accumulate=accumulate)
    return Product("d_scores", _name(x.dtype), len(x), n, k, size, mask_bytes(sign), _source(sign))


def weight_bytes(weight: Tensor, mask: Tensor | None) -> float:
    """Bytes of memory that the forward pass or d_x reads for each element of the weight, as the library counts them."""
    return weight.element_size() + mask_bytes(mask)


def grad_bytes(out: Tensor, weight: Tensor | None, sign: Tensor | None, *, accumulate: bool) -> float:
    """The same for d_scores, which reads and writes ``out``, or writes it alone."""
    factors = (0 if weight is None else weight.element_size()) + mask_bytes(sign)
    return factors + (2 if accumulate else 1) * out.element_size()


def mask_bytes(scores_or_words: Tensor | None) -> float:
    """Bytes of these that the mask or sign comes from."""
    if scores_or_words is None:
        return 0.0
    return scores_or_words.element_size() if scores_or_words.is_floating_point() else 1 / 8


def measuring() -> bool:
    """Whether MFT_CPU_CHOICE asks for measurements. Raises: ValueError for what is no choice."""
    asked = os.environ.get(VARIABLE)
    if not asked or asked == MODEL:
        return False
    if asked != MEASURE:
        raise ValueError(f"{VARIABLE} must be {MODEL!r} or {MEASURE!r}, got {asked!r}; unset it for the model")
    return not torch.are_deterministic_algorithms_enabled()


def measured_path(product: Product, prepare: Callable[[], Callable[[str], object]]) -> str:
    """The fastest path, measured now unless it has been.

    Args:
        prepare: gives the function that makes the product by a path, into memory that nobody reads.
    """
    if 0 in (product.m, product.n, product.k):
        return "auto"
    capability, threads = torch.ops.mft_cpu.capability(), torch.get_num_threads()
    known = _remembered(capability)
    bucket = product._replace(m=1 << (product.m - 1).bit_length())
    key = (*bucket, threads)
    if key not in known:
        paths = product.paths(capability)
        known[key] = paths[0] if len(paths) == 1 else _fastest(product, paths, prepare())
        _store(capability, known)
    return known[key]


# ---------------------------------------------------------------------------------------------- below: private


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source(scores_or_words: Tensor | None) -> str:
    return "" if scores_or_words is None else _name(scores_or_words.dtype)


def _fastest(product: Product, paths: list[str], run: Callable[[str], object]) -> str:
    """The model's path, paths[0], unless another one is clearly faster."""
    took = dict.fromkeys(paths, float("inf"))
    begin = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - begin > _SECONDS:
            break
        for path in paths:
            took[path] = min(took[path], _time(run, path))
    best = min(paths, key=lambda path: took[path] * (1 if path == paths[0] else _MARGIN))
    logger.info("measured %s: %s -> %s", product, {path: f"{t * 1e3:.3f} ms" for path, t in took.items()}, best)
    return best


def _time(run: Callable[[str], object], path: str) -> float:
    start = time.perf_counter()
    run(path)
    return time.perf_counter() - start


@functools.cache  # the dictionary grows as more is measured
def _remembered(capability: str) -> dict[tuple, str]:
    """What earlier processes measured. A file that cannot be used is said, and measured anew."""
    file = _cache_file(capability)
    try:
        return _read(file, capability)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored and its measurements are made anew: %s", file, error)
        return {}


def _read(file: Path, capability: str) -> dict[tuple, str]:
    """Raises: OSError; ValueError if it is damaged or another's."""
    stored = json.loads(file.read_bytes())
    if not isinstance(stored, dict) or stored.get("made_for") != _made_for(capability):
        raise ValueError(f"it must be made for {_made_for(capability)}")
    found = {}
    try:
        for *fields, threads, path in stored["paths"]:
            if path not in Product(*fields).paths(capability):
                raise ValueError(f"it has no path {path!r}")
            found[(*fields, threads)] = path
    except (KeyError, TypeError, RuntimeError) as error:  # RuntimeError: no such product or dtype
        raise ValueError("its paths must be lists of a product's fields, threads and path") from error
    return found


def _store(capability: str, known: dict[tuple, str]) -> None:
    """Add to the file what is known: whole or not at all. One that cannot be written only costs time."""
    file = _cache_file(capability)
    try:
        others = _read(file, capability)
    except (OSError, ValueError):
        others = {}
    paths = sorted([*key, path] for key, path in (others | known).items())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as aside:
            try:
                json.dump({"made_for": _made_for(capability), "paths": paths}, aside, indent=1)
                aside.flush()
                os.fsync(aside.fileno())
                os.replace(aside.name, file)
            except BaseException:
                os.unlink(aside.name)
                raise
    except OSError as error:
        _cannot_keep(file.parent, str(error))


@functools.cache  # once
def _cannot_keep(folder: Path, reason: str) -> None:
    logger.warning("cannot keep measurements in %s, so that each process makes its own: %s", folder, reason)


def _cache_file(capability: str) -> Path:
    """One a processor, instruction set, torch and build of the library."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    parts = json.dumps(_made_for(capability), sort_keys=True)
    return Path(base, "mft_kernels", f"cpu-paths-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.json")


@functools.cache
def _made_for(capability: str) -> dict[str, str]:
    return {
        "processor": str(this_processor()),
        "instruction_set": capability,
        "torch": torch.__version__,
        "library": hashlib.sha256(library_path("cpu").read_bytes()).hexdigest(),
    }
