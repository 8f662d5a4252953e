"""The optimiser step on scores: arithmetic and mask, every backend against the reference, and what is refused."""

import math

import pytest
import torch
from score_matrix import Matrix
from torch.library import opcheck

from mft_kernels import float_from_fixed, reference, score_step
from mft_kernels.backends import cpu

SCORES = (torch.float32, torch.bfloat16, torch.int16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
MOMENTS = ("fp32", "8bit")


@pytest.fixture(params=("avx512", "avx2", "portable"))
def capability(request, monkeypatch):
    if cpu.unavailable is not None or request.param not in cpu.capabilities():
        pytest.skip(f"{request.param} cannot run here: {cpu.unavailable or cpu.capabilities()}")
    monkeypatch.setenv("MFT_CPU_CAPABILITY", request.param)
    return request.param


def selectable(scores):
    return scores.view(torch.float16) if scores.dtype == torch.int16 else scores


def assert_same(got, want):
    """Equal in dtype and every bit; NaN equals NaN, and -0 is not 0."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.is_floating_point():
        assert torch.equal(got.isnan(), want.isnan())
        bits = {4: torch.int32, 2: torch.int16}[got.element_size()]
        got, want = got.nan_to_num(0).view(bits), want.nan_to_num(0).view(bits)
    assert torch.equal(got, want), (got != want).nonzero()[:5]


def assert_backends_agree(matrix, steps=3, grads=None, **options):
    """cpu against the reference: scores, moments, scales, threshold and mask after each step, bit for bit."""
    ours, theirs = matrix, matrix.clone()
    threshold = None
    for i in range(1, steps + 1):
        grad = matrix.next_grad() if grads is None else grads[i - 1]
        options = {"keep_ratio": 0.9, **options, "threshold": threshold}
        got = ours.step(grad, i, backend="cpu", **options)
        want = theirs.step(grad, i, backend="reference", **options)
        for a, b in zip([ours.scores, *ours.moments, *got], [theirs.scores, *theirs.moments, *want]):
            assert_same(a, b)
        threshold = got[0]


# ---------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weight_and_sign_are_factors_of_the_gradient(backend):
    with_weight = Matrix(33, 65, weight=torch.bfloat16)
    without = with_weight.clone()
    without.weight = None
    for i in range(1, 6):
        grad = with_weight.next_grad()
        score_grad = grad * with_weight.weight * without.scores.sign()
        with_weight.step(grad, i, backend=backend)
        without.step(score_grad, i, backend=backend)
        assert torch.equal(with_weight.scores, without.scores)
        assert torch.equal(with_weight.moments[1], without.moments[1])


@pytest.mark.parametrize("weight", [None, torch.float32])
def test_moments_free_of_the_weight_give_the_same_update_where_nothing_is_rounded(weight):
    # One step from zero: m = 0.1 h, v = 0.001 h^2, so that the update is -lr * sign(w * h) before any coding.
    exact, coded = Matrix(16, 64, weight=weight), Matrix(16, 64, moments="8bit", weight=weight)
    before, grad = exact.scores.clone(), exact.next_grad()
    exact.step(grad, 1, weight_decay=0.1)
    coded.step(grad, 1, weight_decay=0.1)
    torch.testing.assert_close(coded.scores, exact.scores, rtol=1e-5, atol=1e-7)
    assert not torch.equal(exact.scores, before)


def test_a_fixed_point_zero_keeps_its_sign_and_counts_as_it():
    scores = torch.tensor([[0, -0x8000]], dtype=torch.int16)
    still = scores.clone()
    zeros = torch.zeros(1, 2)
    score_step(still, zeros, zeros + 1, zeros.clone(), zeros.clone(), step=1, lr=0.01)
    assert torch.equal(still, scores)
    # A gradient that lifts the weight lifts either zero's magnitude, away from 0 on its own side.
    score_step(scores, zeros - 1, zeros + 1, zeros.clone(), zeros.clone(), step=1, lr=0.01)
    assert torch.equal(float_from_fixed(scores).sign(), torch.tensor([[1.0, -1.0]]))
    assert float_from_fixed(scores).abs().min() > 0.009


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_fixed_point_score_that_meets_zero_keeps_its_sign(backend):
    scores, zeros = torch.tensor([[1, 1 - 0x8000]], dtype=torch.int16), torch.zeros(1, 2)
    grad = torch.tensor([[1.0, -1.0]])  # with these betas and eps an update is lr * sign(grad), exactly
    exact = {"step": 1, "lr": 2.0**-18, "betas": (0.0, 0.0), "eps": 0.0}
    score_step(scores, grad, None, zeros.clone(), zeros.clone(), **exact, backend=backend)
    assert scores.tolist() == [[0, -0x8000]]


def test_a_floating_zero_gets_no_gradient():
    scores, zeros = torch.tensor([[0.0, -0.0, 0.5]]), torch.zeros(1, 3)
    score_step(scores, zeros + 1, zeros + 1, zeros.clone(), zeros.clone(), step=1, lr=0.01)
    assert scores[0, :2].tolist() == [0.0, 0.0]
    assert scores[0, 2] < 0.5


def test_a_factor_on_the_device_scales_the_gradient():
    scaled, plain = Matrix(9, 70), Matrix(9, 70)
    grad = plain.next_grad()
    scaled.step(grad, 1, grad_scale=torch.tensor(0.25))
    plain.step(grad * 0.25, 1)
    assert torch.equal(scaled.scores, plain.scores)
    assert torch.equal(scaled.moments[0], plain.moments[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("scores", SCORES)
def test_equal_arguments_give_equal_results_and_another_seed_gives_others(scores, moments, backend):
    first = Matrix(17, 300, scores, moments)
    second, third = first.clone(), first.clone()
    for i in range(1, 4):
        grad = first.next_grad()
        for matrix, seed in ((first, 1), (second, 1), (third, 2)):
            matrix.step(grad, i, seed=seed, backend=backend)
    assert torch.equal(first.scores, second.scores)
    assert all(torch.equal(a, b) for a, b in zip(first.moments, second.moments))
    if scores != torch.float32 or moments == "8bit":
        assert not torch.equal(first.scores, third.scores)


# ---------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("keep_ratio", [0.0, 0.3, 0.9, 1.0])
def test_the_result_is_the_threshold_and_mask_of_the_new_scores(backend, mode, scores, keep_ratio):
    matrix = Matrix(31, 77, scores, "8bit")
    threshold, packed = matrix.step(matrix.next_grad(), 1, keep_ratio=keep_ratio, mode=mode, backend=backend)
    floats = selectable(matrix.scores)
    want = reference.kept_threshold(floats, keep_ratio, mode)
    assert threshold.dtype == scores
    assert_same(selectable(threshold), want)
    assert torch.equal(packed, reference.pack_mask(floats, want, mode))


def test_without_a_keep_ratio_there_is_no_result():
    matrix = Matrix(3, 5)
    assert matrix.step(matrix.next_grad(), 1) is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("scores", SCORES)
def test_a_gradient_that_is_not_finite_shows_in_the_threshold(scores, moments, bad, backend):
    matrix = Matrix(31, 77, scores, moments)
    grad = matrix.next_grad()
    grad[5, 5] = bad
    threshold, packed = matrix.step(grad, 1, keep_ratio=0.9, backend=backend)
    assert selectable(threshold).isnan()
    assert not packed.any()
    assert (~selectable(matrix.scores).isfinite()).sum() == 1
    threshold, _ = matrix.step(matrix.next_grad(), 2, keep_ratio=0.9, backend=backend)
    assert selectable(threshold).isnan()


# ---------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [None, *FLOATS])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("scores", SCORES)
def test_cpu_equals_the_reference_bit_for_bit(capability, scores, moments, weight, mode):
    for grad in FLOATS:
        matrix = Matrix(33, 101, scores, moments, weight, grad)
        assert_backends_agree(matrix, weight_decay=0.01, mode=mode, grad_scale=torch.tensor(0.7))


def test_cpu_equals_the_reference_on_any_shape():
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(
        n=st.integers(0, 70),
        k=st.integers(0, 70),
        scores=st.sampled_from(SCORES),
        moments=st.sampled_from(MOMENTS),
        keep_ratio=st.sampled_from((0.0, 0.1, 0.5, 0.999, 1.0)),
        beta1=st.sampled_from((0.0, 0.3, 0.9)),
    )
    @hypothesis.settings(max_examples=60, deadline=None)
    def check(n, k, scores, moments, keep_ratio, beta1):
        matrix = Matrix(n, k, scores, moments, seed=n * 71 + k)
        assert_backends_agree(matrix, 2, keep_ratio=keep_ratio, betas=(beta1, 0.99), eps=1e-6)

    check()


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("scores", SCORES)
def test_cpu_equals_the_reference_on_gradients_of_any_size(capability, scores, moments):
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e30, 3e38, torch.inf, torch.nan])
    matrix = Matrix(len(sizes) * 2, 256, scores, moments, weight=None)
    rows = [matrix.normal(256) * size for size in sizes]  # a block each
    mixed = [row.roll(i) * sizes[torch.arange(256) % 11] for i, row in enumerate(rows)]
    grad = torch.stack(rows + mixed)
    assert_backends_agree(matrix, 3, [grad, grad.flip(1), torch.zeros_like(grad)], mode="value")


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("moments", MOMENTS)
def test_cpu_equals_the_reference_on_several_threads_and_chunks(scores, moments):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        matrix = Matrix(601, 901, scores, moments)  # three chunks of 2^18, the last one cut within a block
        assert_backends_agree(matrix, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hint", ["next", "far", "nan", "all equal", "none"])
def test_the_threshold_is_exact_whether_or_not_the_hint_is_near(mode, hint):
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    matrix = Matrix(90, 401)
    if hint == "all equal":  # more candidates than are kept
        matrix.scores.fill_(0.01)
    near = reference.kept_threshold(matrix.scores, 0.9, mode)
    hints = {"next": near, "far": near * 7 + 1, "nan": near * torch.nan, "all equal": near, "none": None}
    threshold, packed = matrix.step(
        matrix.next_grad(), 1, lr=1e-5, keep_ratio=0.9, mode=mode, threshold=hints[hint], backend="cpu"
    )
    want = reference.kept_threshold(matrix.scores, 0.9, mode)
    assert torch.equal(threshold, want)
    assert torch.equal(packed, reference.pack_mask(matrix.scores, want, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lower", [0, 0x7FFF])
def test_the_first_and_the_last_value_of_a_bin_are_found_near_the_hint(mode, lower):
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    matrix = Matrix(20, 40)
    matrix.scores.view(torch.int32).fill_(0x3C238000 + lower)  # about 0.01; few enough to be candidates all
    hint = matrix.scores[0, 0].clone()
    threshold, packed = matrix.step(
        matrix.next_grad(), 1, lr=0.0, keep_ratio=0.9, mode=mode, threshold=hint, backend="cpu"
    )
    assert torch.equal(threshold, hint)
    assert torch.equal(packed, reference.pack_mask(matrix.scores, hint, mode))


def test_strided_gradients_and_weights_are_taken():
    plain = Matrix(40, 30)
    strided = plain.clone()
    strided.weight = plain.weight.T.contiguous().T
    grad = plain.next_grad()
    for backend in ("reference", "cpu"):
        a, b = plain.clone(), strided.clone()
        a.step(grad, 1, backend=backend)
        b.step(grad.T.contiguous().T, 1, backend=backend)
        assert torch.equal(a.scores, b.scores)
        c = plain.clone()
        c.weight = None
        c.step(grad[:1].expand(40, 30), 1, backend=backend)
        assert c.scores.isfinite().all()


# ---------------------------------------------------------------------------------------------- the dispatcher


@pytest.mark.parametrize("keep_ratio", [None, 0.8])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("scores", SCORES)
def test_opcheck(scores, moments, keep_ratio):
    matrix = Matrix(33, 70, scores, moments)
    moment_tensors = [*matrix.moments, None][:3]
    numbers = (1, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    rest = (torch.tensor(0.5), 0, "magnitude", keep_ratio, None, "auto")
    arguments = (matrix.scores, matrix.next_grad(), matrix.weight, *moment_tensors, *numbers, *rest)
    opcheck(torch.ops.mft.score_step.default, arguments)


def test_it_compiles_without_a_graph_break():
    matrix = Matrix(20, 64, moments="8bit")
    eager, grad = matrix.clone(), matrix.next_grad()
    compiled = torch.compile(lambda grad: matrix.step(grad, 1, keep_ratio=0.9), fullgraph=True, backend="aot_eager")
    threshold, packed = compiled(grad)
    want = eager.step(grad, 1, keep_ratio=0.9)
    assert_same(matrix.scores, eager.scores)
    assert_same(threshold, want[0])
    assert torch.equal(packed, want[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_every_changed_tensor_has_a_new_version(backend, moments):
    matrix = Matrix(4, 40, moments=moments)
    tensors = [matrix.scores, *matrix.moments]
    before = [t._version for t in tensors]
    matrix.step(matrix.next_grad(), 1, backend=backend)
    assert all(t._version > v for t, v in zip(tensors, before))


# ---------------------------------------------------------------------------------------------- errors


OK = {"step": 1, "lr": 1e-3}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": 0}, ValueError, "step must be an integer from 1, got 0"),
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"lr": torch.tensor(1.0)}, TypeError, "lr must be a number, got Tensor; use float(lr)"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must lie in [0, 1), got 1.0"),
        ({"eps": math.nan}, ValueError, "eps must be finite and at least 0, got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0, got -0.1"),
        ({"seed": -1}, ValueError, "seed must be an integer in [0, 2^63), got -1"),
        ({"mode": "sign"}, ValueError, "mode must be one of ('magnitude', 'value'), got 'sign'"),
        ({"keep_ratio": 1.5}, ValueError, "keep_ratio must lie in [0, 1]"),
        (
            {"threshold": torch.tensor(1, dtype=torch.int16)},
            TypeError,
            "threshold must be torch.float32, got torch.int16",
        ),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must be a scalar (), got (2,)"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot serve score_step"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, error, message):
    matrix = Matrix(4, 8)
    with pytest.raises(error) as caught:
        score_step(matrix.scores, matrix.next_grad(), None, *matrix.moments, **{**OK, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("scores", torch.zeros(4, 8).half(), TypeError, "scores must be float32, bfloat16 (rounded stochastically) or"),
        ("scores", torch.zeros(4, 8).double(), TypeError, "scores must be float32, bfloat16"),
        ("scores", torch.zeros(8, 4).T, ValueError, "scores must be (N, K) and contiguous, got (4, 8), strides (1, 4)"),
        ("scores", torch.zeros(8), ValueError, "scores must be (N, K) and contiguous"),
        ("grad", torch.zeros(8, 4), ValueError, "grad must match scores (4, 8), got (8, 4)"),
        ("grad", torch.zeros(4, 8).long(), TypeError, "grad must be float32, bfloat16 or float16, got torch.int64"),
        ("weight", torch.zeros(4, 9), ValueError, "weight must match scores (4, 8), got (4, 9)"),
        ("exp_avg", torch.zeros(4, 8).bfloat16(), TypeError, "exp_avg must be torch.float32 without scales, got"),
        (
            "exp_avg_sq",
            torch.zeros(4, 9),
            ValueError,
            "exp_avg_sq must be contiguous and match scores (4, 8), got (4, 9)",
        ),
        ("scales", torch.zeros(2, 1), TypeError, "exp_avg must be torch.uint8 with scales, got torch.float32"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(name, tensor, error, message):
    tensors = dict.fromkeys(("scores", "grad", "weight", "exp_avg", "exp_avg_sq"), torch.zeros(4, 8)) | {"scales": None}
    with pytest.raises(error) as caught:
        score_step(**{**tensors, name: tensor}, **OK)
    assert message in str(caught.value)


def test_scales_of_another_size_are_refused():
    codes = torch.zeros(4, 80, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales must be contiguous \(2, 2\), one a block of 256, got \(2, 1\)"):
        score_step(torch.zeros(4, 80), torch.zeros(4, 80), None, codes, codes.clone(), torch.zeros(2, 1), **OK)
