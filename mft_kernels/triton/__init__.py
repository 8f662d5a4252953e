"""The triton backend: enters the table of backends, or says there why it cannot run here."""

import functools
import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from ..backends import Backend, register

OLDEST = (3, 6)


def _unavailable() -> str | None:
    # Triton takes a second to import, so it is imported where a kernel can run, and nowhere else.
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux only)"
    if tuple(int(part) for part in _version().split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"it needs Triton {oldest} or newer, got {_version()}; pip install 'triton>={oldest}'"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "no GPU found by torch; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"it needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def _version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:  # some builds of torch bring it under another name
        import triton

        return triton.__version__


def _interpreting() -> bool:
    # What Triton takes for true.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _ops() -> tuple[dict[str, Callable], dict[str, Callable]]:
    """(what a request by name runs, what "auto" runs in its place)."""
    from . import bits, choice, many, ops, score_step, select

    chosen = (
        ops.masked_linear,
        ops.masked_linear_backward,
        ops.masked_linear_packed,
        ops.masked_linear_packed_backward,
    )
    others = (
        ops.accumulate_score_grad,
        ops.accumulate_product,
        many.masked_linear_many,
        many.masked_linear_many_backward,
        select.kept_threshold,
        bits.pack_mask,
        bits.pack_signs,
        score_step.score_step,
    )
    return (
        {f.__name__: f for f in (*chosen, *others)},
        {f.__name__: functools.partial(f, choose=choice.automatic) for f in chosen},
    )


def _detail() -> str:
    if _interpreting():
        return f"Triton {_version()}, interpreter"
    from .target import target_of

    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    return f"Triton {_version()}, {target}, {'swapped' if target.swapped else 'plain'} form (docs/kernels.md)"


unavailable = _unavailable()
_named, _automatic = _ops() if unavailable is None else ({}, {})

register(
    Backend(
        name="triton",
        device_types=frozenset({"cpu" if _interpreting() else "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        ops=_named,
        automatic=_automatic,
        unavailable=unavailable,
        detail="" if unavailable else _detail(),
        on_request="the interpreter is for tests" if _interpreting() else None,
    )
)
