"""Tensors that end, or begin, at a forbidden page: an access out of bounds kills the process at once.

Run as a script, it calls every op of the cpu backend with such tensors, on every instruction set of this machine.
"""

import ctypes
import mmap
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from by_name import ByName
from torch import Tensor

from mft_kernels.backends import cpu
from mft_kernels.testing import random_inputs

flat = ByName(cpu)

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, *, at_end: bool = True) -> Tensor:
    """Return a copy of ``tensor`` that ends right before a forbidden page, or else begins right behind one."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + page + size):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = page + (size - tensor.nbytes if at_end else 0)
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


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
        ctypes.string_at(t.data_ptr() + t.nbytes, 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    # Under a sanitizer that handles the signal, the child ends with an exit code.
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
    assert died or ("LD_PRELOAD" in os.environ and os.WEXITSTATUS(status) != 0), status


def run_every_op(shape: tuple[int, int, int], dtype: torch.dtype, scores_dtype: torch.dtype, at_end: bool) -> None:
    """Run every op with all inputs, and the accumulation buffer, guarded."""
    t = random_inputs(*shape, dtype, scores_dtype)
    x, weight, scores, bias, grad = (
        guarded(v, at_end=at_end) for v in (t.x, t.weight, t.scores, t.bias, t.grad_output)
    )
    threshold = flat.kept_threshold(scores, 0.9, "magnitude")
    packed = guarded(flat.pack_mask(scores, threshold, "magnitude"), at_end=at_end)
    signs = guarded(flat.pack_signs(scores)[0], at_end=at_end)
    flat.masked_linear(x, weight, scores, threshold, bias, "magnitude")
    flat.masked_linear_packed(x, weight, packed, bias)
    if x.shape[0] > 1:  # one row has one mask, so there is no separate pass for it
        tasks = guarded(torch.arange(x.shape[0]) % 3 - 1, at_end=at_end)
        flat.masked_linear_many(x, weight, [packed, signs], tasks, bias)
    run_every_op_over_experts(t, dtype, scores_dtype, at_end)
    every = [True, True, True, True]
    flat.masked_linear_backward(grad, x, weight, scores, threshold, "magnitude", every)
    flat.masked_linear_packed_backward(grad, x, weight, packed, None, signs, "magnitude", every)
    for out_dtype in (torch.float32, dtype):
        out = guarded(torch.zeros(weight.shape, dtype=out_dtype), at_end=at_end)
        flat.accumulate_score_grad(out, grad, x, weight, scores, None, "magnitude")
        flat.accumulate_score_grad(out, grad, x, weight, None, signs, "magnitude")
        flat.accumulate_score_grad(out, grad, x, weight, None, None, "value")
        flat.accumulate_product(out, grad, x)


def run_every_op_over_experts(t, dtype: torch.dtype, scores_dtype: torch.dtype, at_end: bool) -> None:
    """Run the ops over three experts in both layouts; the first and the last expert have all rows."""
    rows = t.x.shape[0]
    x, grad, offsets = (
        guarded(v, at_end=at_end)
        for v in (t.x, t.grad_output, torch.tensor((rows // 2, rows // 2, rows), dtype=torch.int32))
    )
    weight, scores = (guarded(v.expand(3, -1, -1).contiguous(), at_end=at_end) for v in (t.weight, t.scores))
    thresholds = flat.kept_thresholds(scores, 0.9, "magnitude")
    each_row = thresholds.repeat_interleave(scores.shape[1])
    packed = flat.pack_mask(scores.flatten(0, 1), each_row, "magnitude")
    packed = guarded(packed.unflatten(0, scores.shape[:2]), at_end=at_end)
    for rows_of, transposed in ((x, False), (grad, True)):
        flat.grouped_product(rows_of, weight, scores, thresholds, None, offsets, None, "magnitude", transposed)
        bias = torch.zeros(3, weight.shape[2 if transposed else 1], dtype=dtype)
        bias = guarded(bias, at_end=at_end)
        flat.grouped_product(rows_of, weight, None, None, packed, offsets, bias, "value", transposed)
    out = guarded(torch.zeros(weight.shape, dtype=scores_dtype), at_end=at_end)
    flat.grouped_score_grad(out, grad, x, offsets, weight, scores, None, "magnitude", False)
    flat.grouped_score_grad(out, grad, x, offsets, None, None, None, "value", True)


def check_that_experts_without_rows_are_not_read() -> None:
    """Each of the three experts is one page, and the middle one is forbidden.

    If the weight is transposed, the experts with rows are copied first.
    """
    size = mmap.PAGESIZE // 128
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    weight = torch.frombuffer(memory, dtype=torch.float32).view(3, size, 32)
    middle = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
    assert _libc.mprotect(ctypes.c_void_p(middle), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    packed = torch.zeros(3, max(size, 32), 1, dtype=torch.int32)
    offsets = torch.tensor((2, 2, 5), dtype=torch.int32)
    flat.grouped_product(
        torch.ones(5, 32), weight, None, None, packed[:, :size], offsets, None, "value", transposed=False
    )
    flat.grouped_product(
        torch.ones(5, 32), weight.mT, None, None, packed[:, :32], offsets, None, "value", transposed=True
    )


def main() -> None:
    """Run every capability on odd shapes around the steps of 16, 32, 96, 256 and 512, at both ends of the memory."""
    torch.set_num_threads(1)
    check_that_the_guard_bites()
    check_that_experts_without_rows_are_not_read()
    for capability in cpu.capabilities():
        os.environ["MFT_CPU_CAPABILITY"] = capability
        for shape in ((0, 3, 5), (1, 1, 1), (13, 97, 31), (33, 47, 33), (5, 257, 545), (515, 17, 49), (32, 96, 64)):
            for dtype, scores_dtype in (
                (torch.bfloat16, torch.float32),
                (torch.bfloat16, torch.bfloat16),
                (torch.float32, torch.float16),
                (torch.float16, torch.float32),
            ):
                for at_end in (True, False):
                    run_every_op(shape, dtype, scores_dtype, at_end)
    print("within bounds")


if __name__ == "__main__":
    main()
