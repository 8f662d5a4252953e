"""The one place that launches a Triton kernel, and the hook that takes launches down instead."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class Launch:
    """A kernel with all that decides what is compiled: arguments, constexprs, warps and stages; and its grid."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


_recording: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options); an empty grid launches nothing."""
    # Said aloud because its default changes with Triton 3.10. A fused multiply-add only spares a rounding here.
    options.setdefault("enable_fp_fusion", True)
    if _recording is not None:
        _recording.append(Launch(kernel, grid, args, options))
    elif all(grid):
        kernel[grid](*args, **options)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the context nothing is launched; the list receives what would have been. For compiling ahead of time."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 before they were imported."""
    return triton.knobs.runtime.interpret
