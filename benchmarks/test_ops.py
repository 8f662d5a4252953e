"""masked_linear's forward and backward under pytest-benchmark, on every backend that serves this machine's CPU.

    python -m pytest benchmarks/test_ops.py -k "576x1536"    # and pytest-benchmark's options, such as --benchmark-save

The cases are the quick ones of bench_ops.py. A record comes from `python -m benchmarks ops`.
"""

import pytest
import torch

from mft_kernels import kept_threshold, masked_linear
from mft_kernels.testing import random_inputs

from .bench_ops import QUICK
from .rivals import KEEP_RATIO
from .side_by_side import serving


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("tokens", QUICK.tokens)
@pytest.mark.parametrize("shape", QUICK.shapes, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("backend", serving())
def test_masked_linear(benchmark, backend, shape, tokens, op):
    benchmark.group = f"{op}, {shape[0]} x {shape[1]}, M = {tokens}"
    t = random_inputs(tokens, *shape, torch.bfloat16, torch.bfloat16)
    threshold, learned = kept_threshold(t.scores, KEEP_RATIO), (t.x.requires_grad_(), t.scores.requires_grad_())
    y = masked_linear(t.x, t.weight, t.scores, threshold, backend=backend)
    if op == "forward":
        benchmark(masked_linear, t.x.detach(), t.weight, t.scores.detach(), threshold, backend=backend)
    else:
        benchmark(torch.autograd.grad, y, learned, t.grad_output, retain_graph=True)
