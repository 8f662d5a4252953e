"""Run every Triton kernel on tensors that end, or begin, at a forbidden page: access out of bounds kills.

This is a script for the interpreter, whose loads and stores are the CPU's. Inputs and everything that the ops allocate
are guarded. Wrong kernels show first that the guard works.
"""

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))

import quick_interpreter  # noqa: F401
from by_name import ByName
from guarded import guarded, guarded_allocation

from mft_kernels.backends.triton import bits, ops, score_step, select, target
from mft_kernels.backends.triton.launch import launch
from mft_kernels.operands import Update
from mft_kernels.reference import step as reference_step
from mft_kernels.reference.fixed_point import fixed_from_float
from mft_kernels.testing import Inputs, random_inputs

flat = ByName(ops)

TARGETS = (target.INTERPRETER, target.A100, target.H100, target.H100_OLD_TRITON, target.B200, target.MI300X)
#: The targets whose forms experts are tried in: pointers and descriptors.
EXPERTS_ON = (target.INTERPRETER, target.H100)
#: The rows of the last but one are multiples of 16 bytes, which descriptors read. The last one sums in parts.
SHAPES = ((1, 1, 1), (13, 37, 31), (17, 24, 72), (3, 300, 9))


@triton.jit
def _beyond_the_end(source, out, LOAD: tl.constexpr, STORE: tl.constexpr):
    tl.store(out + STORE, tl.load(source + LOAD))


def check_that_the_guard_bites() -> None:
    """A kernel that reads or writes one element too far, or too early, must kill its child process."""
    for at_end, beyond in ((True, 8), (False, -1)):
        source, out = guarded(torch.ones(8), at_end=at_end), guarded(torch.zeros(8), at_end=at_end)
        assert not _dies(source, out, LOAD=7, STORE=0)
        assert _dies(source, out, LOAD=beyond, STORE=0)
        assert _dies(source, out, LOAD=7, STORE=beyond)


def _dies(*args: torch.Tensor, **constexprs: int) -> bool:
    child = os.fork()
    if child == 0:
        launch(_beyond_the_end, (1,), *args, **constexprs)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
    return os.WIFSIGNALED(status)


def run_every_op(t: Inputs, out_dtype: torch.dtype, by_row: bool, at_end: bool) -> None:
    """Run every op on guarded copies of the inputs; the caller guards what the ops allocate."""
    guard = partial(guarded, at_end=at_end)
    grad, x, weight, scores, bias = map(guard, (t.grad_output, t.x, t.weight, t.scores, t.bias))
    threshold = select.select(scores, 0.7, "magnitude")
    threshold = guard(threshold.expand(scores.shape[0]) if by_row else threshold)
    packed, signs = bits.pack_mask(scores, threshold, "magnitude"), bits.pack_signs(scores)[0]
    for choose in (ops.always_fused, ops.always_scratch):
        flat.masked_linear(x, weight, scores, threshold, bias, "magnitude", choose=choose)
        flat.masked_linear_packed(x, weight, packed, bias, choose=choose)
    for wanted in ([True, False, False, False], [False, True, True, False], [True, True, True, True]):
        flat.masked_linear_backward(grad, x, weight, scores, threshold, "magnitude", wanted)
    flat.masked_linear_packed_backward(grad, x, weight, packed, None, signs, "magnitude", wanted)
    flat.accumulate_score_grad(guard(torch.zeros(weight.shape, dtype=out_dtype)), grad, x, weight, None, signs, "value")
    flat.accumulate_product(guard(torch.zeros(weight.shape, dtype=out_dtype)), grad, x)


def run_experts(t: Inputs, at_end: bool) -> None:
    """Run two experts, with offsets that decrease or lie outside; guarded as above."""
    guard = partial(guarded, at_end=at_end)
    grad, x = guard(t.grad_output), guard(t.x)
    weight, scores, bias = (guard(torch.stack([v, v])) for v in (t.weight, t.scores, t.bias))
    thresholds = guard(select.select(scores, 0.7, "magnitude", each=True))
    words = guard(torch.stack([bits.pack_mask(s, c, "magnitude") for s, c in zip(scores, thresholds)]))
    masks = (scores, thresholds, None), (None, None, words)
    for mask, ends in zip(masks, ((len(x) + 9, 1), (-5, 1 << 30))):
        offsets = guard(torch.tensor(ends, dtype=torch.int32))
        flat.grouped_product(x, weight, *mask, offsets, bias, "magnitude", False)
        flat.grouped_product(grad, weight, *mask, offsets, None, "magnitude", True)
        out = guard(torch.zeros(weight.shape))
        flat.grouped_score_grad(out, grad, x, offsets, weight, scores, None, "magnitude", True)


def run_score_steps(t: Inputs, at_end: bool) -> None:
    """Run both moment formats, in two formats of scores; guarded as above."""
    guard = partial(guarded, at_end=at_end)
    like, weight = t.scores, guard(t.weight)
    shape, blocks = like.shape, -(-like.numel() // reference_step.BLOCK)
    for dtype, moments in ((torch.int16, torch.uint8), (torch.float32, torch.float32)):
        scores = guard(fixed_from_float(like) if dtype == torch.int16 else like.float())
        means, squares = (guard(torch.zeros(shape, dtype=moments)) for _ in range(2))
        scales = guard(torch.zeros(2, blocks)) if moments == torch.uint8 else None
        threshold = guard(torch.zeros((), dtype=dtype))
        adam = (1, 1e-3, 0.9, 0.999, 1e-8, 0.0, guard(torch.ones(())), 0, "magnitude", 0.7, threshold)
        score_step.score_step(Update(scores, guard(like.float()), weight, means, squares, scales, *adam))


def main() -> None:
    """Run each target's tiles on shapes that no tile divides, at both ends of memory, with few and many programs."""
    torch.set_num_threads(1)
    check_that_the_guard_bites()
    for card in TARGETS:
        for i, shape in enumerate(SHAPES):
            dtypes = (torch.float32, torch.float32) if i == 1 else (torch.float16, torch.bfloat16)
            t = random_inputs(*shape, *dtypes)
            multiprocessors = 1000 if shape[0] == 3 else 1
            for at_end in (True, False):
                with target.assume(replace(card, multiprocessors=multiprocessors)), guarded_allocation(at_end):
                    run_every_op(t, dtypes[i % 2], by_row=i % 2 == 0, at_end=at_end)
                    if card in EXPERTS_ON and i == 2:
                        run_experts(t, at_end)
                    if card is target.INTERPRETER:  # its tiles are the same on every target
                        run_score_steps(t, at_end)
    print("within bounds")


if __name__ == "__main__":
    main()
