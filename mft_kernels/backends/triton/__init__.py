"""The triton backend: register it in the table of backends, or the reason why it cannot run here."""

import functools
import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from ...codes import Int8, Table
from ...operands import Experts, KeepByTask
from ..table import Backend, register

OLDEST = (3, 6)


def _unavailable() -> str | None:
    # Triton takes a second to import, so it is imported only where a kernel can run.
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
    # The values that Triton reads as true.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def functions() -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return (the functions that a request by name runs, those that "auto" runs instead)."""
    from . import bits, choice, in_place, ops, score_step, select

    by_name: dict[str, Callable] = {
        "product": ops.product,
        "score_grad": ops.score_grad,
        "gradients": ops.gradients,
        "select": select.select,
        "pack": bits.pack_mask,
        "signs": bits.pack_signs,
        "step": score_step.score_step,
        "put_aside": in_place.put_aside,
        "put_back": in_place.put_back,
        "drop": in_place.drop,
    }
    return by_name, {
        name: functools.partial(by_name[name], choose=choice.automatic) for name in ("product", "gradients")
    }


def _detail() -> str:
    if _interpreting():
        return f"Triton {_version()}, interpreter"
    from .target import target_of

    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    form = "swapped" if target.swapped else "plain"
    return f"Triton {_version()}, {target}, {form} form (docs/explanation/triton-kernels.md)"


unavailable = _unavailable()
_interprets = unavailable is None and _interpreting()
_named, _automatic = functions() if unavailable is None else ({}, {})

register(
    Backend(
        name="triton",
        device_types=frozenset({"cpu" if _interprets else "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        functions=_named,
        takes=frozenset({Table, Int8, Experts, KeepByTask}) if _named else frozenset(),
        automatic=_automatic,
        unavailable=unavailable,
        detail="" if unavailable else _detail(),
        on_request="the interpreter is for tests" if _interprets else None,
    )
)
