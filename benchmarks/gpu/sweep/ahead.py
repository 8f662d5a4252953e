"""Compile what a sweep will launch, into Triton's cache, by as many processes as there are cores; none sees the GPU."""

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed

import torch
from torch import Tensor

from building.ahead import compile_ahead, gpu_target
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import record
from mft_kernels.backends.triton.plan import Tiles
from mft_kernels.backends.triton.target import Target, assume

from ..timing import FAILURES
from .configurations import Problem, instead

_BF16 = torch.bfloat16
_WANTED = {"d_x": [True, False, False, False], "d_scores": [False, False, True, False],
           "backward": [True, False, True, False]}  # fmt: skip


def run(problem: Problem, x: Tensor, grad: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor) -> list[Tensor]:
    """The product by the fused kernels, its results in a list."""
    if problem.kind == "forward":
        return [ops.masked_linear(x, weight, scores, threshold, None, "magnitude")]
    wanted = _WANTED[problem.kind]
    found = ops.masked_linear_backward(grad, x, weight, scores, threshold, "magnitude", wanted)
    return [gradient for gradient, is_wanted in zip(found, wanted) if is_wanted]


def compile_one(problem: Problem, target: Target, tiles: Tiles) -> str | None:
    """Compile the launches of these tiles; why that fails, or None."""
    m, n, k = problem.m, problem.n, problem.k
    x, grad, weight, scores = (torch.empty(s, dtype=_BF16, device="meta") for s in ((m, k), (m, n), (n, k), (n, k)))
    threshold = torch.empty((), dtype=_BF16, device="meta")
    try:
        with assume(target), instead(problem, tiles), record() as launches:
            run(problem, x, grad, weight, scores, threshold)
        for launch in launches:
            compile_ahead(launch.kernel, gpu_target(target), launch.args, launch.options)
    except (*FAILURES, AssertionError) as error:  # as Triton's passes may
        return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1][:120]}"
    return None


def compile_all(
    problem: Problem, target: Target, tiles: Sequence[Tiles], deadline: float, clock: Callable[[], float] = time.time
) -> dict[Tiles, str | None]:
    """Those that were compiled before the deadline, in the order given, and why some could not be."""
    pool = _pool()
    with _apart():
        futures: dict[Future, Tiles] = {pool.submit(compile_one, problem, target, one): one for one in tiles}
    done: dict[Tiles, str | None] = {}
    with contextlib.suppress(TimeoutError):
        for future in as_completed(futures, timeout=max(0.0, deadline - clock())):
            try:
                done[futures[future]] = future.result()
            except BrokenExecutor:  # a compiler that crashes takes all of them with it: what is done counts
                _pool.cache_clear()
                break
    for future in futures:
        future.cancel()
    return {one: done[one] for one in tiles if one in done}


@functools.cache
def _pool() -> ProcessPoolExecutor:
    processes = max(1, (os.cpu_count() or 2) - 1)
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Processes that start within it see no GPU, where a context each would take its memory, and interpret nothing."""
    before = {name: os.environ.pop(name, None) for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
