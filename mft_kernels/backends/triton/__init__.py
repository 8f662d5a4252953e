"""The triton backend: register it in the table of backends, or the reason why it cannot run here."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from ...codes import Int8, Table
from ...operands import Experts, KeepByTask
from .. import built
from ..autotune import measuring
from ..table import Backend, register, registered
from . import cubins

logger = logging.getLogger("mft_kernels")

OLDEST = (3, 6)


def _unavailable() -> str | None:
    # Triton takes a second to import, so it is imported only where a kernel can run.
    no_compiler, by = _no_compiler(), cubins.asked()
    if no_compiler is None and _interpreting():
        return None
    if no_compiler and importlib.util.find_spec("triton") is not None:
        return no_compiler
    if not torch.cuda.is_available():
        return no_compiler or "no GPU found by torch; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"it needs compute capability 8.0 or newer, got {major}.{minor}"
    _, no_cubins = cubins.bundle(_card())
    if no_cubins and by == cubins.CUBINS:
        return f"MFT_TRITON={by} cannot be used: {no_cubins}"
    if no_compiler and by == cubins.JIT:
        return f"MFT_TRITON={by} cannot be used: {no_compiler}"
    return f"{no_compiler}; {no_cubins}" if no_compiler and no_cubins else None


def _no_compiler() -> str | None:
    """Return why Triton cannot compile here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux only)"
    if tuple(int(part) for part in _version().split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"it needs Triton {oldest} or newer, got {_version()}; pip install 'triton>={oldest}'"
    return None


def _card() -> str:
    """Return the name of the current GPU's target, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


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
    from . import bits, choice, in_place, language, ops, score_step, select

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
    automatic: dict[str, Callable] = {
        name: functools.partial(by_name[name], choose=choice.automatic) for name in ("product", "gradients")
    }
    if not language.INSTALLED:
        del by_name["step"]  # it works in place, and a later one of its launches may have no cubin
        automatic = {name: _or_reference(name, automatic.get(name, f)) for name, f in by_name.items()}
    return by_name, automatic


def _short() -> dict[str, Callable]:
    """Return ops that serve only remembered calls (planned.py) and decline all others."""
    if torch.version.hip is not None or _interpreting() or cubins.bundle(_card())[0] is None or measuring():
        return {}
    return {"masked_linear_packed": built.cuda_ops.try_masked_linear_packed.default}


def _or_reference(name: str, op: Callable) -> Callable:
    """Return what "auto" runs if nothing can be compiled: ``op``, or the reference if a launch has no cubin."""

    def run(*arguments, **named):
        try:
            return op(*arguments, **named)
        except cubins.NoCubin as reason:
            _say(name, str(reason))
            return registered("reference").function(name)(*arguments, **named)

    return run


@functools.cache  # once for each op and reason
def _say(op: str, reason: str) -> None:
    logger.warning("%s: the reference backend runs (not triton: %s)", op, reason)


def _detail() -> str:
    if _no_compiler() is None and _interpreting():
        return f"Triton {_version()}, interpreter"
    from .target import target_of

    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    form = f"{target}, {'swapped' if target.swapped else 'plain'} form (docs/explanation/triton-kernels.md)"
    ahead, reason = cubins.bundle(str(target))
    compiler = f"Triton {_version()}" if _no_compiler() is None else ""
    if ahead is None or cubins.asked() == cubins.JIT:
        return f"{compiler}, {form}; {reason or 'MFT_TRITON=jit'}"
    others = f"others compiled by {compiler}" if compiler and cubins.asked() is None else "no others"
    return f"{len(ahead.cubins)} cubins of Triton {ahead.triton}, {form}; {others}"


unavailable = _unavailable()
_interprets = _no_compiler() is None and _interpreting()
_named, _automatic = functions() if unavailable is None else ({}, {})

register(
    Backend(
        name="triton",
        device_types=frozenset({"cpu" if _interprets else "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        functions=_named,
        takes=frozenset({Table, Int8, Experts, KeepByTask}) if _named else frozenset(),
        automatic=_automatic,
        short=_short() if _named else {},
        unavailable=unavailable,
        detail="" if unavailable else _detail(),
        on_request="the interpreter is for tests" if _interprets else None,
    )
)
