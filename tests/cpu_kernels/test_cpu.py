"""The cpu backend gives what the reference gives, on every instruction set that this machine has."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from amx_gemm import amx_gemm
from pitched import OPERANDS, assert_no_pitch_is_read, assert_rows_are_independent, every_product
from taken_path import take_path

from mft_kernels import reference
from mft_kernels.backends import cpu
from mft_kernels.by_name import ByName, oracle
from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

flat = ByName(cpu)

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

CAPABILITIES = ("amx", "amx_emulated", "avx512_bf16", "avx512", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
ALL = [True, True, True, True]


@pytest.fixture(params=CAPABILITIES)
def capability(request, monkeypatch):
    if request.param not in cpu.capabilities():
        pytest.skip(f"{request.param} is not among {cpu.capabilities()} of this machine and build")
    monkeypatch.setenv("MFT_CPU_CAPABILITY", request.param)
    assert torch.ops.mft_cpu.capability() == request.param
    take_path(monkeypatch, "fused")  # test_few_tokens.py and test_cpu_choice.py have the others
    return request.param


def assert_same(got, expected):
    """Equal in dtype, shape and every element (NaN equals NaN)."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.nan_to_num(12345), expected.nan_to_num(12345)), (got, expected)


def assert_matches_reference(t, threshold, mode):
    """Every op on the inputs ``t``, against the reference, bit for bit."""
    packed = flat.pack_mask(t.scores, threshold, mode)
    signs, zeros = flat.pack_signs(t.scores)
    assert_same(packed, reference.pack_mask(t.scores, threshold, mode))
    assert_same(signs, reference.pack_signs(t.scores)[0])
    assert_same(zeros, reference.pack_signs(t.scores)[1])
    for bias in (t.bias, None):
        arguments = (t.x, t.weight, t.scores, threshold, bias, mode)
        assert_same(flat.masked_linear(*arguments), oracle.masked_linear(*arguments))
        arguments = (t.x, t.weight, packed, bias)
        assert_same(flat.masked_linear_packed(*arguments), oracle.masked_linear_packed(*arguments))
    arguments = (t.grad_output, t.x, t.weight, t.scores, threshold, mode, ALL)
    for got, want in zip(flat.masked_linear_backward(*arguments), oracle.masked_linear_backward(*arguments)):
        assert_same(got, want)
    for sign in ((t.scores, None), (None, signs)):
        arguments = (t.grad_output, t.x, t.weight, packed, *sign, mode, ALL)
        gradients = zip(
            flat.masked_linear_packed_backward(*arguments), oracle.masked_linear_packed_backward(*arguments)
        )
        for got, want in gradients:
            assert_same(got, want)
        out = torch.ones_like(t.scores)
        expected = out.clone()
        flat.accumulate_score_grad(out, t.grad_output, t.x, t.weight, *sign, mode)
        oracle.accumulate_score_grad(expected, t.grad_output, t.x, t.weight, *sign, mode)
        assert_same(out, expected)


@pytest.mark.parametrize("scores_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_op_equals_the_reference_on_integers(capability, mode, dtype, scores_dtype):
    t = integer_inputs(5, 37, 59, dtype, scores_dtype)
    assert_matches_reference(t, flat.kept_threshold(t.scores, 0.6, mode), mode)


def test_odd_shapes_and_thresholds_equal_the_reference():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(
        m=st.integers(0, 50),
        n=st.integers(1, 60),
        k=st.integers(1, 60),
        dtype=st.sampled_from(DTYPES),
        scores_dtype=st.sampled_from(DTYPES),
        mode=st.sampled_from(MODES),
        threshold=st.sampled_from((-9.0, -1.0, 0.0, 1.0, 2.5, 9.0, torch.inf, -torch.inf, torch.nan)),
        capability=st.sampled_from(cpu.capabilities() or ["none"]),
        path=st.sampled_from(("few", "fused", "slabs")),
    )
    @hypothesis.settings(max_examples=150, deadline=None)
    def check(m, n, k, dtype, scores_dtype, mode, threshold, capability, path):
        t = integer_inputs(m, n, k, dtype, scores_dtype, seed=m + n + k)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MFT_CPU_CAPABILITY", capability)
            take_path(patch, path)
            assert_matches_reference(t, torch.tensor(threshold, dtype=scores_dtype), mode)

    check()


@pytest.mark.parametrize("shape", [(3, 700, 3000), (70, 33, 3001), (2, 5000, 257)])
def test_slabs_meet_without_a_seam(capability, shape):
    """Where they do depends on shape and instruction set; so a dtype a pair of them, and all beside each of either."""
    dtype = DTYPES[(CAPABILITIES.index(capability) + shape[0]) % 3]
    t = integer_inputs(*shape, dtype, torch.bfloat16)
    # One x and one grad_output in 61 is not zero, so that sums stay exact in 8 bits at these sizes.
    for v in (t.x, t.grad_output):
        v *= (torch.arange(v.numel()).view_as(v) % 61 == 0).to(dtype)
    assert_matches_reference(t, torch.tensor(2, dtype=torch.bfloat16), "magnitude")


@pytest.mark.parametrize(("scores_dtype", "count"), [(torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize(
    "shape", [(513, 97, 70), (12, 193, 1057), (37, 517, 289), (25, 1030, 33), (2049, 14, 40), (64, 96, 512)]
)
def test_blocks_of_the_bfloat16_gemm_meet_without_a_seam(capability, threads, shape, scores_dtype, count):
    # Its blocks: 512 deep, 96 rows, 256 and 1024 columns, 2048 tokens, tiles of 12 x 32.
    threads(count)
    t = integer_inputs(*shape, torch.bfloat16, scores_dtype)
    for v in (t.x, t.grad_output):
        v *= (torch.arange(v.numel()).view_as(v) % 61 == 0).to(torch.bfloat16)
    t.weight[t.scores.abs() < 2] = torch.nan  # dropped, so that forward and d_x must not see it
    threshold = torch.tensor(2, dtype=scores_dtype)
    packed = flat.pack_mask(t.scores, threshold, "magnitude")
    signs = flat.pack_signs(t.scores)[0]
    arguments = (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    y = oracle.masked_linear(*arguments)
    assert y.isfinite().all()
    assert_same(flat.masked_linear(*arguments), y)
    assert_same(flat.masked_linear_packed(t.x, t.weight, packed, t.bias), y)
    arguments = (t.grad_output, t.x, t.weight, t.scores, threshold, "magnitude", ALL)
    for got, want in zip(flat.masked_linear_backward(*arguments), oracle.masked_linear_backward(*arguments)):
        assert_same(got, want)
    d_x = flat.masked_linear_packed_backward(
        t.grad_output, t.x, t.weight, packed, None, signs, "magnitude", [True, False, False, False]
    )[0]
    assert_same(d_x, oracle.masked_linear_backward(*arguments)[0])


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("sign", ["scores", "signs", "none"])
@pytest.mark.parametrize("shape", [(513, 97, 70), (7, 100, 545)])
def test_accumulation_equals_the_reference_in_every_output_dtype(capability, shape, sign, out_dtype):
    t = integer_inputs(*shape, torch.bfloat16)
    t.x *= (torch.arange(t.x.numel()).view_as(t.x) % 61 == 0).to(torch.bfloat16)
    out = torch.ones(t.weight.shape, dtype=out_dtype)
    expected = out.clone()
    scores = t.scores if sign == "scores" else None
    signs = flat.pack_signs(t.scores)[0] if sign == "signs" else None
    arguments = (t.grad_output, t.x, t.weight, scores, signs, "value" if sign == "none" else "magnitude")
    for _ in range(2):
        flat.accumulate_score_grad(out, *arguments)
        oracle.accumulate_score_grad(expected, *arguments)
    assert_same(out, expected)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(513, 97, 70), (7, 100, 545), (0, 5, 7), (1, 1, 1)])
def test_accumulation_without_a_weight_equals_the_reference(capability, shape, dtype, out_dtype):
    t = integer_inputs(*shape, dtype)
    t.x *= (torch.arange(t.x.numel()).view_as(t.x) % 61 == 0).to(dtype)
    out = torch.ones(t.weight.shape, dtype=out_dtype)
    expected = out.clone()
    for _ in range(2):
        flat.accumulate_product(out, t.grad_output, t.x)
        oracle.accumulate_product(expected, t.grad_output, t.x)
    assert_same(out, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="forbidden pages are made with Linux's mprotect")
def test_no_op_reads_or_writes_beyond_its_tensors():
    # In a process of its own, which such an access kills.
    script = Path(__file__).parents[1] / "guarded.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # the package need not be installed
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.stdout == "within bounds\n", (run.returncode, run.stderr)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 40, 50), (1, 1, 1), (3, 1, 60), (4, 60, 1), (1, 33, 31)])
def test_empty_batches_and_single_rows_and_columns_equal_the_reference(capability, dtype, shape):
    assert_matches_reference(integer_inputs(*shape, dtype, dtype), torch.tensor(2, dtype=dtype), "magnitude")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_without_inputs_gives_its_bias_and_one_without_outputs_a_zero_gradient(capability, dtype):
    t = integer_inputs(3, 5, 7, dtype)
    none = torch.empty(5, 0, dtype=dtype)
    y = flat.masked_linear(t.x[:, :0], none, none, torch.tensor(0.0), t.bias, "magnitude")
    assert_same(y, t.bias.expand(3, 5))
    d_x = flat.masked_linear_backward(
        t.grad_output[:, :0],
        t.x,
        t.weight[:0],
        t.scores[:0],
        torch.tensor(0.0),
        "magnitude",
        [True, False, False, False],
    )[0]
    assert_same(d_x, torch.zeros(3, 7, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96, 160), (33, 130, 71)])
def test_error_stays_within_twice_that_of_pytorch(capability, dtype, shape):
    t = random_inputs(*shape, dtype, torch.bfloat16)
    threshold = flat.kept_threshold(t.scores, 0.7, "magnitude")

    def exact(v):
        return v.double()

    y = flat.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    assert_within_budget(
        y,
        oracle.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude"),
        oracle.masked_linear(*map(exact, (t.x, t.weight, t.scores, threshold, t.bias)), "magnitude"),
    )
    arguments = (t.grad_output, t.x, t.weight, t.scores, threshold)
    for got, same, want in zip(
        flat.masked_linear_backward(*arguments, "magnitude", ALL),
        oracle.masked_linear_backward(*arguments, "magnitude", ALL),
        oracle.masked_linear_backward(*map(exact, arguments), "magnitude", ALL),
    ):
        assert_within_budget(got, same, want)


@pytest.mark.parametrize("shape", [(70, 97, 1100), (3, 40, 33)])
def test_emulated_tiles_give_the_bits_of_real_ones(monkeypatch, shape):
    """Overflow and subnormal operands and sums, which count as 0, included."""
    if "amx" not in cpu.capabilities():
        pytest.skip(f"amx is not among {cpu.capabilities()} of this machine and build")
    t = random_inputs(*shape, torch.bfloat16, torch.bfloat16)
    t.x[0, :2] = torch.tensor((1e-39, 3e38))
    t.x[1] *= 1e-37
    t.weight[1, 1] = 3e38
    t.weight[2] *= 1e-3
    t.scores *= 100  # of which every_product keeps a third
    results = {}
    take_path(monkeypatch, "fused")
    for name in ("amx", "amx_emulated"):
        monkeypatch.setenv("MFT_CPU_CAPABILITY", name)
        results[name] = [product for _, product in every_product(flat, t)]
    for real, emulated in zip(results["amx"], results["amx_emulated"], strict=True):
        assert_same(real, emulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_nan_and_inf_weights_contribute_a_positive_zero(capability, dtype):
    weight = torch.tensor([[torch.nan, 2.0, torch.inf], [-torch.inf, torch.nan, -torch.nan]]).to(dtype)
    scores = torch.tensor([[0.1, 1.0, -0.2], [0.1, 0.1, 0.1]]).to(dtype)
    threshold = torch.tensor(0.5, dtype=dtype)
    x = torch.full((1, 3), -3.0, dtype=dtype)
    y = flat.masked_linear(x, weight, scores, threshold, None, "magnitude")
    assert y.tolist() == [[-6, 0]]
    grad = torch.ones(1, 2, dtype=dtype)
    d_x, d_weight, _, _ = flat.masked_linear_backward(grad, x, weight, scores, threshold, "magnitude", ALL)
    assert d_x.tolist() == [[0, 2, 0]]
    assert not d_x.signbit().any()
    assert d_weight.tolist() == [[0, -3, 0], [0, 0, 0]]
    assert not d_weight[1].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_infinity_meets_no_padding(capability, dtype):
    t = integer_inputs(5, 37, 59, dtype, torch.float32)
    t.weight[-1, -1] = torch.inf  # by a zero it would be NaN
    x, grad = t.x.abs() + 1, t.grad_output.abs() + 1
    packed = flat.pack_mask(t.scores, torch.tensor(0.0), "magnitude")
    assert flat.masked_linear_packed(x, t.weight, packed, None)[:, -1].isposinf().all()
    gradients = flat.masked_linear_packed_backward(
        grad, x, t.weight, packed, t.scores, None, "magnitude", [True, False, False, False]
    )
    assert gradients[0][:, -1].isposinf().all()
    assert gradients[0][:, :-1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_scores_are_dropped_and_have_no_sign(capability, dtype):
    scores = torch.tensor([[torch.nan, -torch.nan, 1.0, -0.0, 0.0, -1.0]]).to(dtype)
    for threshold in (0.0, -1.0, torch.inf, torch.nan):
        t = torch.tensor(threshold, dtype=dtype)
        for mode in MODES:
            assert_same(flat.pack_mask(scores, t, mode), reference.pack_mask(scores, t, mode))
    ones = torch.ones(1, 6, dtype=dtype)
    want = [False, False, True, False]
    t = torch.tensor(0.0, dtype=dtype)
    d_scores = flat.masked_linear_backward(ones[:, :1], ones, ones, scores, t, "magnitude", want)[2]
    assert d_scores.tolist() == [[0, 0, 1, 0, 0, -1]]


def test_strided_and_expanded_inputs_are_read_as_they_are(capability):
    t = integer_inputs(12, 20, 24, torch.bfloat16)
    threshold = torch.tensor(2.0)
    x = t.x.view(3, 4, 24).transpose(0, 1)
    weight, scores = t.weight.T.contiguous().T, t.scores.repeat(1, 2)[:, ::2]
    arguments = (x, weight, scores, threshold, t.bias.expand(2, 20)[0], "magnitude")
    assert_same(flat.masked_linear(*arguments), oracle.masked_linear(*arguments))
    grad = torch.ones((), dtype=torch.bfloat16).expand(4, 3, 20)  # what y.sum().backward() sends
    arguments = (grad, x, weight, scores, threshold, "magnitude", ALL)
    for got, want in zip(flat.masked_linear_backward(*arguments), oracle.masked_linear_backward(*arguments)):
        assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_gemm_gets_nothing_that_amx_would_multiply_wrongly(capability, dtype):
    with amx_gemm():
        for length in (5, 31, 33, 45, 60):
            assert_no_pitch_is_read(flat, length, dtype, *OPERANDS)
            assert_rows_are_independent(flat, length, dtype)


def test_no_slab_is_read_beyond_its_rows(capability):
    """The weight is cut in two, with which grad_output's columns have a pitch; NaN in one token of one feature."""
    t = integer_inputs(3, 500, 2500, torch.bfloat16)
    for v in (t.x, t.grad_output):
        v *= (torch.arange(v.numel()).view_as(v) % 61 == 0).to(torch.bfloat16)
    t.grad_output[1, 5] = torch.nan
    exact = replace(t, **{name: value.float() for name, value in vars(t).items()})
    expected = every_product(oracle, exact)
    with amx_gemm():
        results = list(every_product(flat, t))
    for (name, got), (_, want) in zip(results, expected):
        assert torch.equal(got.nan_to_num(777), want.to(got.dtype).nan_to_num(777)), name


def test_misaligned_pointers_are_read(capability):
    t = integer_inputs(5, 40, 50, torch.bfloat16, torch.bfloat16)
    for name in ("x", "weight", "scores", "grad_output"):
        value = getattr(t, name)
        shifted = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view_as(value)
        setattr(t, name, shifted.copy_(value))
    assert_matches_reference(t, torch.tensor(2, dtype=torch.bfloat16), "magnitude")


def test_thread_count_changes_no_bit(threads):
    t = random_inputs(40, 513, 700, torch.bfloat16)
    results = []
    for count in (1, 2):
        threads(count)
        threshold = flat.kept_threshold(t.scores, 0.9, "magnitude")
        packed = flat.pack_mask(t.scores, threshold, "magnitude")
        y = flat.masked_linear_packed(t.x, t.weight, packed, t.bias)
        arguments = (t.grad_output, t.x, t.weight, t.scores, threshold, "magnitude", [True, False, True, False])
        d_x, _, d_scores, _ = flat.masked_linear_backward(*arguments)
        results.append((threshold, packed, *flat.pack_signs(t.scores), y, d_x, d_scores))
    for one, two in zip(*results):
        assert_same(one, two)


def test_scratch_memory_carries_nothing_from_one_call_to_the_next(capability):
    """Calls whose scratch is large enough to be kept, of other sizes and full of NaN in between."""

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


def test_accumulation_adds_in_fp32_and_leaves_no_rounding_to_the_terms(capability):
    t = random_inputs(16, 40, 70, torch.bfloat16)
    out = torch.zeros(40, 70)
    for _ in range(3):
        flat.accumulate_score_grad(out, t.grad_output, t.x, t.weight, t.scores, None, "magnitude")
    want = [False, False, True, False]
    arguments = (t.grad_output, t.x, t.weight, t.scores, torch.tensor(0.0), "magnitude", want)
    once = flat.masked_linear_backward(*arguments)[2]
    torch.testing.assert_close(out, 3 * once, rtol=1e-6, atol=0)


def test_an_unknown_or_missing_capability_is_an_error(monkeypatch):
    monkeypatch.setenv("MFT_CPU_CAPABILITY", "mmx")
    with pytest.raises(RuntimeError, match="MFT_CPU_CAPABILITY must be one of .*portable.* got 'mmx'"):
        torch.ops.mft_cpu.capability()


def test_the_library_needs_no_python_symbol():
    # One build serves every Python and every torch from 2.11 on: only the stable C interface may be undefined.
    library = Path(cpu.__file__).with_name("libmft_cpu.so")
    nm = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
    if nm.returncode != 0:
        pytest.skip(f"nm cannot read the library: {nm.stderr}")
    symbols = [line.split()[-1] for line in nm.stdout.splitlines()]
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    assert not [s for s in symbols if "c10" in s or "at6native" in s]


def test_ops_below_the_library_hold_under_inference_mode_and_grad_mode(capability):
    t = integer_inputs(4, 8, 16, torch.bfloat16)
    t.weight.requires_grad_()
    threshold = torch.tensor(2.0)
    with torch.inference_mode():
        y = flat.masked_linear(t.x.clone(), t.weight, t.scores, threshold, None, "magnitude")
    assert_same(y.clone(), oracle.masked_linear(t.x, t.weight, t.scores, threshold, None, "magnitude").detach())
