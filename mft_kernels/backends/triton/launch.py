"""The one place that launches a Triton kernel, and the hook that takes launches down instead."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import cubins
from .language import INSTALLED, triton
from .target import Target, compiled_here, compiles_safely, interpreting, target_of

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """A kernel with all that decides what is compiled: arguments, constexprs, warps and stages; and its grid."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


_recording: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options); an empty grid launches nothing. At least one argument is a tensor."""
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    # Said aloud because its default changes with Triton 3.10. A fused multiply-add only spares a rounding here.
    options.setdefault("enable_fp_fusion", True)
    target = target_of(tensor.device)
    if target.backend == "cuda":
        # Else ptxas spills a few registers where that lets one more block in. 255 x 256 threads still fit.
        options.setdefault("maxnreg", 255)
    else:  # no other compiler knows such a limit
        options.pop("maxnreg", None)
    if _recording is not None:
        _recording.append(Launch(kernel, grid, args, options))
    elif all(grid):
        if target.backend == "cuda" and not interpreting():
            cubin = cubins.find(str(target), kernel, args, options)
            if cubin is not None:
                cubin.launch(tensor.get_device(), grid, kernel, args)
                return
            if reason := _not_compiled_here(target, options):
                raise cubins.NoCubin(f"{cubins.missing(str(target), kernel, args, options)}, and {reason}")
        # Triton launches on the current device, which need not be that of the tensors.
        elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
        with torch.cuda.device(tensor.device) if elsewhere else contextlib.nullcontext():
            kernel[grid](*args, **options)
        cubins.note(cubins.Launched(kernel.__name__, bool(options.get("MASK_ON_A"))))


def by_cubins_or_compiled(device: torch.device, run: Callable[[Target], T]) -> T:
    """run(target of the device); where its form has no cubin, run(target) with the form that is compiled here.

    ``run`` launches nothing before the kernel that has a form, so that nothing is done twice.
    """
    try:
        return run(target_of(device))
    except cubins.NoCubin:
        if (here := compiled_here(device)) is None:
            raise
        return run(here)


def _not_compiled_here(target: Target, options: dict[str, Any]) -> str | None:
    """Why the installed Triton may not compile this for the target; None if it may."""
    if cubins.asked() == cubins.CUBINS:
        return f"MFT_TRITON={cubins.CUBINS} allows no other; unset it"
    if not INSTALLED:
        return "Triton is not installed; pip install triton"
    if options.get("MASK_ON_A") and not compiles_safely(target):
        return f"Triton {triton.__version__} does not compile this form safely; pip install 'triton>=3.9'"
    return None


def recording() -> bool:
    """Whether launches are taken down, see record."""
    return _recording is not None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the context nothing is launched; the list receives what would have been. For compiling ahead of time."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before
