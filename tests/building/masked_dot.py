"""A small kernel for the tests of benchmarks/kernel_code: a dot in a loop, masked in registers.

tests/data/rs_hazard_triton36.sass.gz is its disassembly for sm_90 under Triton 3.6, which overwrites operands in
flight. With that Triton installed, `PYTHONPATH=. python tests/building/masked_dot.py FILE` writes it again.
"""

import gzip
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from building.ahead import compile_ahead
from building.machine_code.sass import disassemble


@triton.jit
def _masked_dot_kernel(
    weight, scores, thresholds, x, out, K,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out (BLOCK_N, BLOCK_M) = where(|scores| >= thresholds, weight, 0) (BLOCK_N, K) @ x.T (K, BLOCK_M)."""
    # Without this and a threshold for each row, every HGMMA of the loop waits for its operand (ptxas C7515).
    tl.assume(K > 0)
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    threshold = tl.load(thresholds + n)[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        if DESCRIPTORS:
            w = weight.load([0, start])
            s = scores.load([0, start])
            b = x.load([0, start])
        else:
            k = start + tl.arange(0, BLOCK_K)[None, :]
            w = tl.load(weight + n[:, None] * K + k)
            s = tl.load(scores + n[:, None] * K + k)
            b = tl.load(x + m[:, None] * K + k)
        if MASKED:
            w = tl.where(tl.abs(s) >= threshold, w, 0.0)
        sums = tl.dot(w, b.T, sums)
    tl.store(out + n[:, None] * BLOCK_M + m[None, :], sums)


def compile_masked_dot(target: GPUTarget, n: int, m: int, num_warps: int, *, masked: bool = True) -> Any:
    """Compile the kernel in bf16 for one tile of n x m, 64 of K at a time; with TMA descriptors if there are any."""
    k = 4096
    matrices: list[Any] = [torch.empty(rows, k, dtype=torch.bfloat16, device="meta") for rows in (n, n, m)]
    if described := target.backend == "cuda" and target.arch >= 90:
        matrices = [TensorDescriptor.from_tensor(matrix, [len(matrix), 64]) for matrix in matrices]
    weight, scores, x = matrices
    thresholds = torch.empty(n, dtype=torch.bfloat16, device="meta")
    out = torch.empty(n, m, device="meta")
    options = dict(MASKED=masked, DESCRIPTORS=described, BLOCK_N=n, BLOCK_M=m, BLOCK_K=64)
    options |= dict(num_warps=num_warps, enable_fp_fusion=True)
    return compile_ahead(_masked_dot_kernel, target, (weight, scores, thresholds, x, out, k), options)


if __name__ == "__main__":
    compiled = compile_masked_dot(GPUTarget("cuda", 90, 32), 128, 128, 8)
    Path(sys.argv[1]).write_bytes(gzip.compress(disassemble(compiled.asm["cubin"]).encode(), mtime=0))
