"""Use the cuda backend where it was measured to be faster than the kernel that "auto" takes otherwise.

`make gpu` writes the table of measurements. If the build found one (benchmarks/results/gpu-faster.json), it is
mft_kernels/faster.json:

    {"triton": "3.6", "capability": [9, 0], "ops": [{"op": "masked_linear", "dtypes": ["bfloat16", "bfloat16"],
     "sizes": {"512": false, "2048": true, "4096": true}}]}

dtypes are those that backends.choose is called with: of the weight, then of what the mask comes from. A size is a
number of tokens, or of scores for selections. A size between two measured ones counts as faster if both are.
A size outside of the measured range never does.
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
#: Functions whose work grows with the tokens of their first argument. That of the others grows with the scores.
OF_TOKENS = frozenset({"product", "score_grad", "gradients"})


def where_faster(call: Any, run: Callable, faster: Callable) -> Callable:
    """Return ``run``, or a function that calls ``faster`` instead for the sizes at which the table says so.

    call: a Request of table.py.
    """
    sizes = _sizes(call).get(tuple(map(_name, call.dtypes)))
    if sizes is None:
        return run
    logger.info("%s on %s: cuda for the sizes that faster.json lists as faster: %s", call.op, call.device, sizes)

    @functools.wraps(run)
    def either(first: Any, *arguments: Any, **named: Any) -> Any:
        chosen = faster if _is_faster(size_of(call.function, first), sizes) else run
        return chosen(first, *arguments, **named)

    return either


def unless_faster(call: Any, short: Callable) -> Callable:
    """Return ``short``, a short way, or a function that declines where cuda is faster for scores of some dtype."""
    some = [sizes for dtypes, sizes in _sizes(call).items() if dtypes[0] == _name(call.dtypes[0])]
    if not some:
        return short
    place = 1 if call.function == "score_grad" else 0  # of the tokens; before them the output

    def either(*given: Any) -> Any:
        tokens = given[place].shape[:-1].numel()
        return None if any(_is_faster(tokens, sizes) for sizes in some) else short(*given)

    return either


def size_of(function: str, first: Any) -> int:
    """Return the number of tokens of a call, or of scores, from its first argument."""
    if function not in OF_TOKENS:
        return first.numel()
    tokens = first if function == "product" else first.grad_output
    return tokens.shape[:-1].numel()


def _is_faster(size: int, sizes: Mapping[int, bool]) -> bool:
    measured = list(sizes)
    at = bisect_left(measured, size)
    if at == len(measured) or (at == 0 and measured[0] != size):
        return False
    return sizes[measured[at]] and (measured[at] == size or sizes[measured[at - 1]])


def _sizes(call: Any) -> dict[tuple[str, ...], dict[int, bool]]:
    """Return what the table says of an op on a device, by dtypes; sizes in their order, at least one of them faster."""
    table = _table()
    if not table or table.get("triton") != installed_triton():
        return {}
    if table.get("capability") != list(torch.cuda.get_device_capability(call.device)):
        return {}
    return {
        tuple(entry["dtypes"]): {int(size): entry["sizes"][size] for size in sorted(entry["sizes"], key=int)}
        for entry in table["ops"]
        if entry["op"] == call.op and any(entry["sizes"].values())
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def installed_triton() -> str:
    """Return Triton's major and minor version, which decide the form of its kernels; "" if it is not installed."""
    try:
        return ".".join(metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return ""
