"""Tests specific to the cpu library: slabs and blocks that meet, threads, scratch memory, and the choice of its code.

tests/ops checks that its results are the reference's on every instruction set and path.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from amx_gemm import amx_gemm
from by_name import ByName, oracle
from guarded import guarded
from products import DTYPES, Operands, assert_equals_reference, assert_same, before, every_product, every_sum

from mft_kernels import reference
from mft_kernels.backends import cpu
from mft_kernels.testing import integer_inputs, random_inputs

flat = ByName(cpu)


@pytest.fixture
def fused(capability, take_path):
    """Yield each instruction set with its fused path, or with what replaces it if there is none."""
    take_path("fused")
    return capability


def sparse(t):
    """Zero all but one in 61 elements of x and grad_output, so that sums stay exact in 8 bits at large sizes."""
    for v in (t.x, t.grad_output):
        v *= (torch.arange(v.numel()).view_as(v) % 61 == 0).to(v.dtype)
    return t


@pytest.mark.parametrize("shape", [(3, 700, 3000), (70, 33, 3001), (2, 5000, 257)])
def test_slabs_meet_without_a_seam(fused, shape):
    """Where slabs meet depends on shape and instruction set.

    Each pair of them takes one dtype; all dtypes occur with each shape and with each instruction set.
    """
    dtype = DTYPES[(list(cpu.PATHS).index(fused) + shape[0]) % 3]
    o = Operands.of(sparse(integer_inputs(*shape, dtype, torch.bfloat16)), 2.0)
    assert_equals_reference(flat, o.change(guarded))


@pytest.mark.parametrize(
    ("shape", "scores_dtype", "count"),  # where blocks meet depends on neither dtype nor threads
    [
        *((shape, torch.float32, 2) for shape in ((513, 97, 70), (37, 517, 289), (64, 96, 512))),
        *((shape, torch.bfloat16, 1) for shape in ((12, 193, 1057), (25, 1030, 33), (2049, 14, 40))),
    ],
)
def test_blocks_of_the_bfloat16_gemm_meet_without_a_seam(fused, threads, shape, scores_dtype, count):
    # Its blocks: 512 deep, 96 rows, 256 and 1024 columns, 2048 tokens, tiles of 12 x 32.
    threads(count)
    t = sparse(integer_inputs(*shape, torch.bfloat16, scores_dtype))
    t.scores[t.scores == 0] = 1  # else a NaN weight gives a NaN gradient
    t.weight[t.scores.abs() < 2] = torch.nan  # dropped, so that forward and d_x must not see it
    o = Operands.of(t, 2.0).change(guarded)
    for name, got in every_product(flat, o, gradients=False):
        assert got.isfinite().all(), name
    assert_equals_reference(flat, o)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(513, 97, 70), (7, 100, 545)])
def test_blocks_of_the_score_gradient_meet_in_every_output_dtype(fused, shape, out_dtype):
    o = Operands.of(sparse(integer_inputs(*shape, torch.bfloat16)), 2.0)
    expected = every_sum(oracle, o, before(o, out_dtype))
    for (name, got), (_, right) in zip(every_sum(flat, o, before(o, out_dtype)), expected, strict=True):
        assert_same(got, right, name)


@pytest.mark.parametrize("shape", [(70, 97, 1100), (3, 40, 33)])
def test_emulated_tiles_give_the_bits_of_real_ones(monkeypatch, take_path, shape):
    """Including overflow, and subnormal operands and sums, which count as 0."""
    if "amx" not in cpu.capabilities():
        pytest.skip(f"amx is not among {cpu.capabilities()} of this machine and build")
    t = random_inputs(*shape, torch.bfloat16, torch.bfloat16)
    t.x[0, :2] = torch.tensor((1e-39, 3e38))
    t.x[1] *= 1e-37
    t.weight[1, 1] = 3e38
    t.weight[2] *= 1e-3
    o, results = Operands.of(t, 0.02), {}
    take_path("fused")
    for name in ("amx", "amx_emulated"):
        monkeypatch.setenv("MFT_CPU_CAPABILITY", name)
        results[name] = [product for _, product in every_product(flat, o)]
    for real, emulated in zip(results["amx"], results["amx_emulated"], strict=True):
        assert torch.equal(real.nan_to_num(), emulated.nan_to_num())


def test_no_slab_is_read_beyond_its_rows(fused):
    """The weight is cut in two, so that grad_output's columns have a pitch. One token has NaN in one feature."""
    t = sparse(integer_inputs(3, 500, 2500, torch.bfloat16))
    t.grad_output[1, 5] = torch.nan
    o = Operands.of(t, 2.0)
    exact = o.change(torch.Tensor.float, "x", "weight", "bias", "grad_output")
    with amx_gemm():
        results = list(every_product(flat, o))
    for (name, got), (_, right) in zip(results, every_product(oracle, exact), strict=True):
        assert_same(got, right.to(got.dtype), name)


def test_scratch_memory_carries_nothing_from_one_call_to_the_next(capability):
    """The scratch memory is large enough to be kept. Calls of other sizes, full of NaN, run in between."""

    def results(fill=None):
        found = []
        for m in (1500, 300, 2100, 700):
            t = random_inputs(m, 200, 576, torch.bfloat16, torch.bfloat16)
            for tensor in () if fill is None else (t.x, t.grad_output):
                tensor.fill_(fill)
            threshold = reference.kept_threshold(t.scores, 0.9, "magnitude")
            found.append(flat.masked_linear(t.x, t.weight, t.scores, threshold, None, "magnitude"))
            arguments = (t.grad_output, t.x, t.weight, t.scores, threshold, "magnitude", [True, False, True, False])
            d_x, _, d_scores, _ = flat.masked_linear_backward(*arguments)
            found += [d_x, d_scores]
        return found

    first = results()
    results(torch.nan)
    for got, expected in zip(results(), first, strict=True):
        assert_same(got, expected)


def test_the_library_needs_no_python_symbol():
    # One build serves every Python and every torch from 2.11 on: only the stable C interface may be undefined.
    library = Path(cpu.__file__).with_name("libmft_cpu.so")
    nm = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
    if nm.returncode != 0:
        pytest.skip(f"nm cannot read the library: {nm.stderr}")
    symbols = [line.split()[-1] for line in nm.stdout.splitlines()]
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    assert not [s for s in symbols if "c10" in s or "at6native" in s]
