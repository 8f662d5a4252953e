"""Page-locked ("pinned") host memory that is not rounded up to a power of two.

torch's own allocator rounds pinned blocks up to powers of two: a matrix of 86 MiB takes 128 MiB. Here each large tensor
has its own pages, which CUDA locks.
"""

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes; torch's allocator serves less: rounding costs little there, and many tensors share a page
_PORTABLE = 1  # cudaHostRegisterPortable: for all devices


def empty_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised contiguous tensor in page-locked host memory.

    A tensor of 1 MiB or more takes whole pages. A smaller one is rounded up to a power of two.

    Raises: torch.AcceleratorError or RuntimeError if CUDA cannot lock the memory.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _SMALL:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    return torch.frombuffer(_Pages(count * dtype.itemsize), dtype=dtype, count=count).view(tuple(shape))


def zeros_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return empty_locked(shape, dtype).zero_()


def page_locked(tensor: Tensor) -> Tensor:
    """Return the tensor if it is page-locked, else a page-locked contiguous copy."""
    return tensor if tensor.is_pinned() else empty_locked(tensor.shape, tensor.dtype).copy_(tensor)


class _Pages(mmap.mmap):
    """Anonymous pages that stay locked as long as something refers to them, such as a tensor on them."""

    address = 0

    def __new__(cls, size: int) -> "_Pages":
        pages = super().__new__(cls, -1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        _register(address, size)
        pages.address = address
        return pages

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():
            _unregister(self.address)


def _register(address: int, size: int) -> None:
    torch.cuda.init()
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE)))


def _unregister(address: int) -> None:
    with contextlib.suppress(RuntimeError):  # raised if the device has failed; nothing is left to do then
        torch.cuda.synchronize()  # wait for copies that still run
        torch.cuda.cudart().cudaHostUnregister(address)
