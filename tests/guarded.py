"""Tensors that end, or begin, at a forbidden page: an access out of bounds kills the process at once."""

import ctypes
import faulthandler
import mmap
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, *, at_end: bool = True) -> Tensor:
    """Return a copy of ``tensor`` that ends right before a forbidden page, or else begins right behind one."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    for begin in (0, page + size):
        forbid(memory, begin)
    offset = page + (size - tensor.nbytes if at_end else 0)
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def forbid(memory: mmap.mmap, begin: int) -> None:
    """Let an access to the page that begins there end the process."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + begin
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


def guarded_allocation(at_end: bool) -> ExitStack:
    """Within the context, guard every tensor that Python allocates with these functions."""
    stack = ExitStack()
    for owner, name in ((torch.Tensor, "new_empty"), (torch.Tensor, "new_zeros"), (torch, "empty"), (torch, "zeros")):
        stack.enter_context(patch.object(owner, name, _guarding(getattr(owner, name), at_end)))
    return stack


def _guarding(allocate: Callable[..., Tensor], at_end: bool) -> Callable[..., Tensor]:
    def allocate_guarded(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return guarded(tensor, at_end=at_end) if tensor.numel() else tensor

    return allocate_guarded


def check_that_the_guard_bites() -> None:
    """Read one element beyond the end in a child process, which must die."""
    t = guarded(torch.ones(8, 8))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(t.data_ptr() + t.nbytes, 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    # Under a sanitizer that handles the signal, the child ends with an exit code.
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
    assert died or ("LD_PRELOAD" in os.environ and os.WEXITSTATUS(status) != 0), status
