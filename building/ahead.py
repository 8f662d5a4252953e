"""Compile launches for a device that this machine does not have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

if TYPE_CHECKING:
    from mft_kernels.backends.triton.launch import Launch
    from mft_kernels.backends.triton.target import Target


def compile_ahead(kernel: Any, target: GPUTarget, args: tuple, options: dict[str, Any]) -> Any:
    """Return the CompiledKernel of kernel[grid](*args, **options) on the target; tensors may be meta tensors."""
    with _pretend(target):
        return kernel.warmup(*args, grid=(1,), **options)


def recorded(function: Callable[[], Any], target: Target) -> list[Launch]:
    """Return what function(), called with meta tensors, would launch on the target; nothing runs."""
    # Imported here, so that the rest of this package needs no torch: Triton 3.6 is tested without one.
    from mft_kernels.backends.triton.launch import record
    from mft_kernels.backends.triton.target import assume

    with assume(target), record() as launches:
        function()
    return launches


def gpu_target(target: Target) -> GPUTarget:
    """Return the target in Triton's terms."""
    return GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)


@contextlib.contextmanager
def _pretend(target: GPUTarget) -> Iterator[None]:
    before = driver._active  # not .active, which would look for a real device and fail if there is none
    driver.set_active(_NoDevice(target))
    try:
        yield
    finally:
        driver._active = before


class _NoDevice:
    """The part of a driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # Triton caches compiled kernels by device: one device per target

    def set_current_device(self, device: str) -> None:
        pass

    def get_current_stream(self, device: str) -> int:
        return 0
