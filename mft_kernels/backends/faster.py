"""Where CUDA's kernels were measured to be faster than what "auto" takes else: a table that `make gpu` writes, or none.

faster.json lies beside this file if the build found one (benchmarks/results/gpu-faster.json):

    {"triton": "3.6", "capability": [9, 0], "ops": [{"op": "masked_linear", "dtypes": ["bfloat16", "bfloat16"],
     "sizes": {"512": false, "2048": true, "4096": true}}]}

dtypes are those by which backends.choose is asked: of the weight, then of what tells the mask. A size is a number of
tokens, of selections and steps one of scores. What lies between two sizes is faster where both are; beyond, nothing is.
"""

import functools
import json
import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("mft_kernels")

TABLE = Path(__file__).parents[1] / "faster.json"
#: Their work grows with the scores, not with the tokens.
OF_SCORES = frozenset({"kept_threshold", "pack_mask", "pack_signs", "score_step"})


def where_faster(
    op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], run: Callable, faster: Callable
) -> Callable:
    """``run``, or a function that calls ``faster`` in its place for the sizes at which the table says so."""
    sizes = _sizes(op, device, dtypes)
    if not any(sizes.values()):
        return run
    logger.info("%s on %s: cuda where faster.json says that it is faster: %s", op, device, sizes)
    measured = sorted(sizes)

    @functools.wraps(run)
    def either(*arguments: Any) -> Any:
        return (faster if _is_faster(size_of(op, arguments), measured, sizes) else run)(*arguments)

    return either


def size_of(op: str, arguments: tuple[Any, ...]) -> int:
    """Tokens of a call, or scores."""
    if op in OF_SCORES:
        return arguments[0].numel()
    # What is accumulated into comes before the tokens.
    return arguments[1 if op.startswith("accumulate") else 0].shape[:-1].numel()


def _is_faster(size: int, measured: list[int], sizes: Mapping[int, bool]) -> bool:
    at = bisect_left(measured, size)
    if at == len(measured) or (at == 0 and measured[0] != size):
        return False
    return sizes[measured[at]] and (measured[at] == size or sizes[measured[at - 1]])


def _sizes(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[int, bool]:
    table = _table()
    if not table or table.get("triton") != installed_triton():
        return {}
    if table.get("capability") != list(torch.cuda.get_device_capability(device)):
        return {}
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    for entry in table["ops"]:
        if (entry["op"], entry["dtypes"]) == (op, names):
            return {int(size): bool(faster) for size, faster in entry["sizes"].items()}
    return {}


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def installed_triton() -> str:
    """Its major and minor version, which decide the form of its kernels; "" without it."""
    try:
        return ".".join(metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return ""
