"""Every backend's optimiser step equals the reference's bit for bit: scores, moments, scales, threshold, mask.

On an NVIDIA GPU, triton's 8-bit scheme may round a few scores and codes the other way; see assert_state_is_near.
"""

import itertools

import pytest
import torch
from by_name import oracle
from forms import every_backend_but_cuda
from products import MODES
from score_steps import (
    DEFAULTS,
    STATE,
    arguments,
    assert_same,
    assert_state_is_near,
    assert_state_is_the_same,
    assert_steps_equal_the_reference,
    copied,
    is_approximate,
    normal,
    scores_of,
)

from mft_kernels import reference
from mft_kernels.operands import clocks_of
from mft_kernels.reference.fixed_point import LARGEST_CODE, selectable

pytestmark = every_backend_but_cuda

FORMATS = (torch.float32, torch.bfloat16, torch.int16)
NARROW = (torch.bfloat16, torch.int16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = pytest.mark.parametrize("eight_bit", [True, False], ids=["8bit", "exact"])
#: From the interpreter's arithmetic on NaN and infinity.
FROM_NUMPY = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def needs_exact_fma(kernels, request):
    """Skip if the interpreter rounds a fused multiply-add twice, as in older versions of Triton."""
    if kernels.interpreted and request.node.callspec.params.get("eight_bit") is False:
        from mft_kernels.backends.triton.target import installed_triton

        if installed_triton() < (3, 9):
            pytest.skip("this Triton's interpreter has no fused multiply-add")


@pytest.fixture(autouse=True)
def reference_with_the_kernels_sqrt(kernels, request):
    """Use the kernels' sqrt in the reference; the cpu backend calls torch's."""
    if kernels.name != "cpu":
        request.getfixturevalue("correctly_rounded_sqrt")


def assert_equals_reference(kernels, tensors, **options):
    return assert_steps_equal_the_reference(kernels.score_step, tensors, device=kernels.device, **options)


# ---------------------------------------------------------------------------------------------- every format


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_format_equals_the_reference(kernels, dtype, eight_bit):
    formats, turn = list(itertools.product((*FLOATS, None), FLOATS)), FORMATS.index(dtype)
    for i, (weight_dtype, grad_dtype) in enumerate(kernels.fewer([*formats[turn:], *formats[:turn]], 5)):
        tensors = arguments((23, 45), dtype, eight_bit, weight_dtype, grad_dtype)  # more than a chunk of 1024
        scale = torch.tensor(0.3) if i % 4 == 0 else None
        options = {"mode": MODES[i % 2], "weight_decay": 0.01, "grad_scale": scale}
        assert_equals_reference(kernels, tensors, message=f"{weight_dtype} {grad_dtype}", **options)


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_number_and_rate_may_lie_in_memory(kernels, dtype, eight_bit):
    def step_by_tensors(*, step, lr, **given):
        step, lr = torch.tensor(step), torch.tensor(lr, dtype=torch.float64)
        if step > 9:  # a row of clocks
            step = clocks_of(step.view(1), lr, given["beta1"], given["beta2"], given["weight_decay"], eight_bit)[0]
        return kernels.score_step(step=step.to(kernels.device), lr=lr.to(kernels.device), **given)

    for first in kernels.fewer((1, 9, 1000), 2):
        tensors = arguments((23, 45), dtype, eight_bit)
        options = {"step": first, "lr": 3e-3 / first, "weight_decay": 0.01}
        assert_steps_equal_the_reference(step_by_tensors, tensors, device=kernels.device, message=f"{first}", **options)


@SCHEMES
def test_blocks_and_chunks_meet_without_a_seam(kernels, eight_bit):
    for i, numel in enumerate(kernels.fewer((1, 3, 255, 256, 257, 1023, 1024, 1025, 2051), 2)):
        tensors = arguments((1, numel), FORMATS[i % 3], eight_bit)
        assert_equals_reference(kernels, tensors, message=f"{numel}")


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_misaligned_and_strided_tensors_are_stepped(kernels, dtype, eight_bit):
    tensors = arguments((21, 260), dtype, eight_bit)
    layouts = [lambda t: t.T.contiguous().T, lambda t: t[:1].expand(t.shape)]
    if not kernels.any_strides:  # its backend copies these: cuda_kernels/test_bindings.py
        layouts = [lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)]
    for layout in kernels.fewer(layouts, 2):
        ours, theirs = copied(tensors, kernels.device), copied(tensors)
        for name in STATE[:3]:
            memory = torch.empty(ours[name].numel() + 1, dtype=ours[name].dtype, device=kernels.device)
            ours[name] = memory[1:].view_as(ours[name]).copy_(ours[name])
        for given in (ours, theirs):
            given["grad"], given["weight"] = layout(given["grad"]), layout(given["weight"])
        got = kernels.score_step(**ours, **DEFAULTS)
        expected = oracle.score_step(**theirs, **DEFAULTS)
        if is_approximate(kernels.device, ours):
            assert_state_is_near(ours, theirs)
            continue
        assert_state_is_the_same(ours, theirs)
        for name, a, b in zip(("threshold", "packed"), got, expected):
            assert_same(name, a, b)


def test_any_shape_equals_the_reference(kernels):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(
        shape=st.tuples(st.integers(0, 70), st.integers(0, 70)),
        dtype=st.sampled_from(FORMATS),
        eight_bit=st.just(True) if kernels.interpreted else st.booleans(),
        keep_ratio=st.sampled_from((0.0, 0.1, 0.5, 0.999, 1.0)),
        beta1=st.sampled_from((0.1, 0.3, 0.9)),
    )
    @hypothesis.settings(max_examples=3 if kernels.interpreted else 40, deadline=None)
    def check(shape, dtype, eight_bit, keep_ratio, beta1):
        options = {"keep_ratio": keep_ratio, "beta1": beta1, "beta2": 0.99, "eps": 1e-6}
        assert_equals_reference(kernels, arguments(shape, dtype, eight_bit), **options)

    check()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_matrix_without_elements_keeps_nothing(kernels, dtype):
    for shape in ((0, 5), (5, 0)):
        hint = torch.zeros((), dtype=dtype)
        assert_equals_reference(kernels, arguments(shape, dtype, True), steps=1, threshold=hint)


# ---------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("eight_bit", [False], ids=["exact"])
def test_the_exact_scheme_is_torch_s_adamw_bit_for_bit(kernels, eight_bit):
    shape, lr = (23, 103), 3e-3
    betas = ((0.9, 0.98), (0.3, 0.9), (0.0, 0.5))  # below 0.5, m is interpolated from the other end
    for (beta1, beta2), weight_decay in kernels.fewer(list(itertools.product(betas, (0.0, 0.1))), 3):
        ours = {"scores": 0.02 * normal(*shape), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        theirs = torch.nn.Parameter(ours["scores"].clone())
        options = {"lr": lr, "weight_decay": weight_decay}
        optimiser = torch.optim.AdamW([theirs], betas=(beta1, beta2), foreach=False, fused=False, **options)
        options |= {"beta1": beta1, "beta2": beta2, "keep_ratio": None}
        ours = copied(ours, kernels.device)
        for step in range(1, 6):
            theirs.grad = normal(*shape, seed=step) * normal(shape[0], 1, seed=100 + step).exp()
            optimiser.step()
            given = {"grad": theirs.grad.to(kernels.device), "weight": None, "scales": None}
            kernels.score_step(**ours, **given, **DEFAULTS | options | {"step": step})
            assert_same("scores", ours["scores"], theirs.detach())
            for name in ("exp_avg", "exp_avg_sq"):
                assert_same(name, ours[name], optimiser.state[theirs][name])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_words_depend_on_all_bits_of_seed_and_step(kernels, dtype):
    tensors = arguments((5, 300), dtype, True)
    results = [
        assert_equals_reference(kernels, tensors, steps=1, seed=seed, step=step)[0]["scores"]
        for seed, step in ((1, 1), (1 + 2**32, 1), (2**63 - 1, 1), (1, 2**31 + 5))
    ]
    assert all(not torch.equal(results[0], other) for other in results[1:])


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_zero_keeps_its_sign_or_has_none(kernels, dtype, eight_bit):
    tensors = arguments((2, 64), dtype, eight_bit, torch.float32)
    tensors["scores"].zero_()
    negative = -0x80000000 if dtype == torch.float32 else -0x8000
    tensors["scores"].view(torch.int32 if dtype == torch.float32 else torch.int16)[1] = negative
    still = copied(tensors)
    still["grad"].zero_()
    assert_equals_reference(kernels, still, steps=1)
    ours, _ = assert_equals_reference(kernels, tensors, steps=1)
    assert (ours["scores"].count_nonzero() > 64) == (dtype == torch.int16)


@FROM_NUMPY
@pytest.mark.parametrize("eight_bit", [False], ids=["exact"])
def test_a_fixed_point_score_that_meets_zero_keeps_its_sign(kernels, eight_bit):
    zeros = torch.zeros(1, 2)
    tensors = dict.fromkeys(("weight", "scales")) | {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    tensors |= {"scores": torch.tensor([[1, 1 - 0x8000]], dtype=torch.int16), "grad": torch.tensor([[1.0, -1.0]])}
    options = {"lr": 2.0**-18, "beta1": 0.0, "beta2": 0.0, "eps": 0.0}  # then an update is exactly lr * sign(grad)
    ours, _ = assert_equals_reference(kernels, tensors, steps=1, **options)
    assert ours["scores"].tolist() == [[0, -0x8000]]


@FROM_NUMPY
@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_gradients_and_scores_of_any_size_equal_the_reference(kernels, dtype, eight_bit):
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e30, 3e38, torch.inf, torch.nan])
    rows = [normal(256, seed=i) * size for i, size in enumerate(sizes)]  # one block each
    mixed = [row.roll(i) * sizes[torch.arange(256) % 11] for i, row in enumerate(rows)]
    tensors = arguments((26, 256), dtype, eight_bit, None)
    tensors["grad"] = torch.stack(rows + mixed)
    tensors["grad"][6] *= torch.logspace(-12, 0, 256)  # down to the subnormal codes and below
    special = scores_of(torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 1e-40, -1e-40]), dtype)
    tensors["scores"][2:26:3, 5:11] = special
    ours, (threshold, packed) = assert_equals_reference(
        kernels, tensors, steps=1 if kernels.interpreted else 3, mode="value"
    )
    assert selectable(threshold).isnan()
    assert not packed.any()
    if eight_bit:
        scales = ours["scales"].cpu()
        assert scales[:, 0].tolist() == [0, 0]
        assert scales[:, 12].isnan().all()
        assert (ours["exp_avg"][12] == 0).all()


@FROM_NUMPY
def test_a_scale_of_the_gradient_that_is_not_finite_reaches_no_element_beyond_the_end(kernels):
    tensors = arguments((1, 300), torch.bfloat16, True, None)
    tensors["grad"].fill_(1)  # each is infinite; a 0 beyond the end would give NaN
    assert_equals_reference(kernels, tensors, steps=1, grad_scale=torch.tensor(torch.inf))


# ---------------------------------------------------------------------------------------------- threshold and mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_threshold_is_exact_wherever_the_one_before_was(kernels, dtype, mode):
    if kernels.interpreted and dtype in NARROW:
        pytest.skip("test_step_window.py has these steps")
    tensors = arguments((40, 130), dtype, True)
    far = scores_of(torch.tensor([1e-12, 0.1, torch.nan, torch.inf]), dtype)
    cases = [(0.9, None), *((ratio, "near") for ratio in (0, 0.1, 0.9, 1)), *((0.9, hint) for hint in far)]
    for keep_ratio, hint in kernels.fewer(cases, 5):
        if hint == "near":
            hint = reference.kept_threshold(selectable(tensors["scores"]), keep_ratio, mode).view(dtype)
        options = {"threshold": hint, "mode": mode, "keep_ratio": keep_ratio, "lr": 1e-4}
        assert_equals_reference(kernels, tensors, steps=1, message=f"{keep_ratio} {hint}", **options)
    tensors["scores"].fill_(scores_of(torch.tensor(0.01), dtype))  # more candidates than are kept
    hint = tensors["scores"][0, 0].clone()
    assert_equals_reference(kernels, tensors, steps=1, threshold=hint, mode=mode, lr=1e-5)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_no_ratio_asks_for_no_mask(kernels, dtype):
    _, (threshold, packed) = assert_equals_reference(kernels, arguments((3, 400), dtype, True), keep_ratio=None)
    assert threshold.numel() == packed.numel() == 0


@FROM_NUMPY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_one_non_finite_score_makes_the_threshold_nan_and_keeps_nothing(kernels, dtype, mode):
    for bad in kernels.fewer((torch.nan, torch.inf, -torch.inf), 2):
        tensors = arguments((5, 300), dtype, True, weight_dtype=None)
        tensors["grad"][3, 7] = bad
        hint = scores_of(torch.tensor(0.002), dtype)
        ours, (threshold, packed) = assert_equals_reference(kernels, tensors, threshold=hint, mode=mode)
        assert selectable(threshold).isnan()
        assert not packed.any()
        assert (~selectable(ours["scores"]).isfinite()).sum() >= 1
        if dtype == torch.int16:
            assert ours["scores"][3, 7] & 0x7FFF == LARGEST_CODE + 1
