"""The one place that launches Triton kernels, and the hook that records launches instead."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .target import target_of


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
        # Triton launches on the current device, which may differ from the tensors' device.
        elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
        with torch.cuda.device(tensor.device) if elsewhere else contextlib.nullcontext():
            kernel[grid](*args, **options)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the context, record launches in the list instead of running them; see building/ahead.py."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before
