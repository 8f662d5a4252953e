"""Measure how much memory a step needs beyond parameters and gradients, at M = 64 in bf16, N = K = 4096.

Each competitor runs in its own process. The peak of its resident memory over one forward and backward is read from
the kernel's high-water mark, which is reset just before. A first step on a small layer has already loaded all code.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

import mft_kernels

from .harness import ROOT, THREADS, Finding, Spread, report
from .rivals import KEEP_RATIO, eager_fast, eager_lean, paper_linear

FEATURES, TOKENS = 4096, 64
REPEATS = 2  # processes per competitor
WEIGHT_BYTES = FEATURES * FEATURES * 2
# name: how much it may take beyond the gradients, in % of the weight's bytes, or None if there is no goal
COMPETITORS = {
    "dense": None,
    "op": 8,
    "module": 20,
    "eager, masked weight kept": None,
    "eager, masked twice": None,
    "paper's layer": None,
    "dense accumulating": None,
    "module accumulating": None,
    "packed op + accumulate_score_grad": 20,
}
# These add to the gradients of earlier micro-batches, so a temporary gradient counts as extra memory.
INTO_BUFFERS = {"dense accumulating", "module accumulating", "packed op + accumulate_score_grad"}


def prepare(name: str, tokens: int, features: int):
    """Return (step, function that returns the bytes of its gradients). What lives before the step is created here."""
    linear = torch.nn.Linear(features, features, bias=False, dtype=torch.bfloat16)
    x = torch.randn(tokens, features, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(tokens, features, dtype=torch.bfloat16)
    weight = linear.weight.detach()
    scores = torch.randn(features, features, dtype=torch.bfloat16).requires_grad_()
    threshold = mft_kernels.kept_threshold(scores, KEEP_RATIO)
    module = mft_kernels.MaskedLinear.from_linear(linear, keep_ratio=KEEP_RATIO, init="normal")
    linear.weight.grad, module.scores.grad = torch.ones_like(linear.weight), torch.ones_like(module.scores)
    into_buffers = name in INTO_BUFFERS
    if not into_buffers:
        linear.weight.grad = module.scores.grad = None

    def in_kernel():
        mask = module.current_mask()
        mft_kernels.masked_linear_packed(x, weight, mask.packed).backward(grad_output)
        mft_kernels.accumulate_score_grad(
            module.scores.grad, grad_output, x.detach(), weight, scores=module.scores.detach(), signs=mask.signs
        )

    forwards = {
        "dense": lambda: linear(x),
        "dense accumulating": lambda: linear(x),
        "op": lambda: mft_kernels.masked_linear(x, weight, scores, threshold),
        "module": lambda: module(x),
        "module accumulating": lambda: module(x),
        "eager, masked weight kept": lambda: eager_fast(x, weight, scores, threshold),
        "eager, masked twice": lambda: eager_lean(x, weight, scores, threshold),
        "paper's layer": lambda: paper_linear(x, weight, scores),
    }
    step = in_kernel if name not in forwards else lambda: forwards[name]().backward(grad_output)

    def gradients() -> int:
        new = [x, scores]
        if not name.endswith("accumulating") and name != "packed op + accumulate_score_grad":
            new += [linear.weight, module.scores]
        return sum(p.grad.nbytes for p in new if p.grad is not None)

    return step, gradients


def peak_beyond_gradients(name: str) -> int:
    """Return the bytes by which resident memory peaks over one step, minus the gradients that the step leaves."""
    torch.set_num_threads(THREADS)
    small_step, _ = prepare(name, TOKENS, 512)
    small_step()
    step, gradients = prepare(name, TOKENS, FEATURES)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    step()
    return process_bytes("VmHWM") - before - gradients()


def process_bytes(field: str, process: int | str = "self") -> int:
    """Return the bytes of a field of a process's status: VmRSS, or VmHWM, the peak since clear_refs."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no {field}; this benchmark needs Linux")


def measure(name: str, bound: float | None) -> Finding:
    """Measure the competitor, each time in a new process."""
    command = [sys.executable, "-m", "benchmarks.bench_memory", name]
    shares = [
        100 * int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout) / WEIGHT_BYTES
        for _ in range(REPEATS)
    ]
    return Finding(name, Spread.of(shares), "% of the weight", None if bound is None else "at most", bound)


def main() -> None:
    """Print and store the answer."""
    findings = [measure(name, bound) for name, bound in COMPETITORS.items()]
    report("memory", f"Peak memory of a step beyond its gradients, bf16, M = {TOKENS}, N = K = {FEATURES}", findings)


if __name__ == "__main__":
    print(peak_beyond_gradients(sys.argv[1]))
