"""The one place that launches Triton kernels, and the hook that records launches instead."""

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
    """A kernel, its grid, and all that decides what is compiled: arguments, constexprs, warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


_recording: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run kernel[grid](*args, **options). An empty grid launches nothing. At least one argument must be a tensor.

    If a launch is recorded (see record), it does not run.

    Raises:
        NoCubin: no cubin serves the launch, and the installed Triton may not compile it.
    """
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    # Set explicitly, because its default changes with Triton 3.10. A fused multiply-add only saves a rounding here.
    options.setdefault("enable_fp_fusion", True)
    target = target_of(tensor.device)
    if target.backend == "cuda":
        # Otherwise ptxas spills a few registers if that lets one more block in. 255 x 256 threads still fit.
        options.setdefault("maxnreg", 255)
    else:  # no other compiler has such a limit
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
        # Triton launches on the current device, which may differ from the tensors' device.
        elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
        with torch.cuda.device(tensor.device) if elsewhere else contextlib.nullcontext():
            kernel[grid](*args, **options)
        cubins.note(cubins.Launched(kernel.__name__, bool(options.get("MASK_ON_A"))))


def by_cubins_or_compiled(device: torch.device, run: Callable[[Target], T]) -> T:
    """Return run(target of the device); if its form has no cubin, run(target) with the form that is compiled here.

    ``run`` must launch nothing before the kernel that has a form, so that nothing is done twice.
    """
    try:
        return run(target_of(device))
    except cubins.NoCubin:
        if (here := compiled_here(device)) is None:
            raise
        return run(here)


def _not_compiled_here(target: Target, options: dict[str, Any]) -> str | None:
    """Return why the installed Triton may not compile this for the target; None if it may."""
    if cubins.asked() == cubins.CUBINS:
        return f"MFT_TRITON={cubins.CUBINS} does not let Triton compile it; unset MFT_TRITON"
    if not INSTALLED:
        return "Triton is not installed; pip install triton"
    if options.get("MASK_ON_A") and not compiles_safely(target):
        return f"Triton {triton.__version__} does not compile this form safely; pip install 'triton>=3.9'"
    return None


def recording() -> bool:
    """Return whether launches are recorded; see record."""
    return _recording is not None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the context, record launches in the list instead of running them. For compiling ahead of time."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before
