"""A step's memory beyond its gradients, for the instruction sets that have a bound in bf16."""

import subprocess
import sys

import pytest

from benchmarks.bench_memory import COMPETITORS, ROOT, WEIGHT_BYTES
from mft_kernels.backends import built

ASKED = ("amx", "avx512_bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["op", "packed op + accumulate_score_grad"])
def test_a_step_takes_no_more_than_is_asked(name):
    capability = built.cpu_ops.capability()
    if capability not in ASKED:
        pytest.skip(f"nothing is asked of {capability}")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_memory", name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 100 * int(run.stdout) / WEIGHT_BYTES <= COMPETITORS[name]
