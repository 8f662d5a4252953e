"""score_step of the triton backend is that of the reference, bit for bit.

But for one thing: torch's fp32 sqrt on the CPU is MKL's, off by a unit in the last place for a fifth of all numbers.
The kernel's is rounded correctly, as torch's on a GPU; so the reference is given such a one here.
"""

from dataclasses import replace

import pytest
import torch
from score_steps import DEFAULTS, arguments, normal, scores_of

from mft_kernels import reference
from mft_kernels.backends.triton import score_step as kernels
from mft_kernels.backends.triton import select
from mft_kernels.backends.triton.target import assume, installed_triton, target_of
from mft_kernels.by_name import oracle
from mft_kernels.operands import Update
from mft_kernels.reference.fixed_point import LARGEST_CODE

FORMATS = (torch.float32, torch.bfloat16, torch.int16)
NARROW = (torch.bfloat16, torch.int16)
MODES = ("magnitude", "value")


@pytest.fixture(autouse=True)
def correctly_rounded_sqrt(monkeypatch):
    sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda t: sqrt(t.double()).to(t.dtype))


def floats(tensor):
    """Codes read as fp16, so that NaN is told from numbers."""
    return tensor.view(torch.float16) if tensor.dtype == torch.int16 else tensor


def assert_same(name, got, expected):
    got = got.cpu()
    assert got.dtype == expected.dtype, name
    assert got.shape == expected.shape, name
    a, b = (t.double().nan_to_num(12345, 1e300, -1e300) for t in (floats(got), floats(expected)))
    assert torch.equal(a, b), (name, (a != b).sum(), (a - b).abs().max())
    assert torch.equal(a.signbit(), b.signbit()), (name, "sign of zero")


def copy_to(device, tensors):
    return {name: None if t is None else t.to(device, copy=True) for name, t in tensors.items()}


def assert_steps_equal_the_reference(device, tensors, steps=2, between=None, **options):
    """Both from the same start, each handing its threshold to its next step. Returns the kernel's tensors."""
    ours, theirs = copy_to(device, tensors), copy_to("cpu", tensors)
    options = DEFAULTS | options
    got = expected = (options["threshold"],)
    for step in range(options["step"], options["step"] + steps):
        for state, result in ((ours, got), (theirs, expected)):
            if result[0] is not None and options["keep_ratio"] is not None:
                options["threshold"] = result[0].to(state["scores"].device)
            scale = options["grad_scale"]
            now = options | {"step": step, "grad_scale": None if scale is None else scale.to(state["scores"].device)}
            if state is ours:
                got = kernels.score_step(Update(**state, **now))
            else:
                expected = oracle.score_step(**state, **now)
        for name, value in theirs.items():
            if value is not None:
                assert_same(name, ours[name], value)
        assert_same("threshold", got[0], expected[0])
        assert_same("packed", got[1], expected[1])
    return ours


needs_exact_fma = pytest.mark.skipif(
    installed_triton() < (3, 9), reason="the interpreter of older versions rounds a fused multiply-add twice"
)
#: The interpreter's arithmetic on NaN and infinity.
FROM_NUMPY = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
EXACT = pytest.param(False, marks=needs_exact_fma, id="exact")
SCHEMES = pytest.mark.parametrize("eight_bit", [pytest.param(True, id="8bit"), EXACT])


@SCHEMES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_scheme_equals_the_reference(device, dtype, weight_dtype, mode, eight_bit):
    tensors = arguments((37, 45), dtype, eight_bit, weight_dtype)
    assert_steps_equal_the_reference(device, tensors, mode=mode, weight_decay=0.01)


@SCHEMES
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float16, None])
def test_gradients_of_16_bits_are_scaled_by_a_tensor(device, grad_dtype, weight_dtype, eight_bit):
    tensors = arguments((9, 130), torch.int16, eight_bit, weight_dtype, grad_dtype)
    assert_steps_equal_the_reference(device, tensors, grad_scale=torch.tensor(0.3))


@SCHEMES
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 1025, 4096, 2 * 4096 + 1500])
def test_blocks_chunks_and_groups_meet_without_a_seam(device, numel, eight_bit):
    tensors = arguments((1, numel), torch.bfloat16, eight_bit)
    results = []
    for multiprocessors in (1, 1000):
        with assume(replace(target_of(device), multiprocessors=multiprocessors)):
            results.append(assert_steps_equal_the_reference(device, tensors))
    for one, two in zip(*(r.values() for r in results)):
        assert one is two is None or torch.equal(one, two)


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS)
def test_misaligned_and_strided_tensors_are_read(device, dtype, eight_bit):
    tensors = arguments((21, 260), dtype, eight_bit)
    ours, theirs = copy_to(device, tensors), copy_to("cpu", tensors)
    for name in ("scores", "exp_avg", "exp_avg_sq"):
        memory = torch.empty(ours[name].numel() + 1, dtype=ours[name].dtype, device=device)
        ours[name] = memory[1:].view_as(ours[name]).copy_(ours[name])
    ours["grad"] = ours["grad"].T.contiguous().T
    ours["weight"] = ours["weight"].repeat(1, 2)[:, :260]
    got = kernels.score_step(Update(**ours, **DEFAULTS))
    expected = oracle.score_step(**theirs, **DEFAULTS)
    for name, value in theirs.items():
        if value is not None:
            assert_same(name, ours[name], value)
    for name, a, b in zip(("threshold", "packed"), got, expected):
        assert_same(name, a, b)


@needs_exact_fma
def test_a_small_beta1_is_interpolated_from_the_other_end(device):
    tensors = arguments((5, 300), torch.float32, False)
    assert_steps_equal_the_reference(device, tensors, beta1=0.3, beta2=0.9)


@pytest.mark.parametrize("dtype", NARROW)
def test_words_depend_on_all_bits_of_seed_and_step(device, dtype):
    tensors = arguments((5, 300), dtype, True)
    results = [
        assert_steps_equal_the_reference(device, tensors, steps=1, seed=seed, step=step)["scores"]
        for seed, step in ((1, 1), (1 + 2**32, 1), (2**63 - 1, 1), (1, 2**31 + 5))
    ]
    assert all(not torch.equal(results[0], other) for other in results[1:])


def test_no_ratio_asks_for_no_mask(device):
    ours = copy_to(device, arguments((3, 40), torch.int16, True))
    threshold, packed = kernels.score_step(Update(**ours, **DEFAULTS | {"keep_ratio": None}))
    assert threshold.numel() == packed.numel() == 0


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_matrix_without_elements_keeps_nothing(device, dtype, shape):
    tensors = arguments(shape, dtype, True)
    hint = torch.zeros((), dtype=dtype)
    assert_steps_equal_the_reference(device, tensors, steps=1, threshold=hint)


# ---------------------------------------------------------------------------------------------- moments


@FROM_NUMPY
def test_blocks_of_zeros_of_tiny_huge_and_non_finite_moments_are_coded_as_the_reference_does(device):
    tensors = arguments((8, 256), torch.float32, True, weight_dtype=None)
    tensors["grad"][0] = 0
    tensors["grad"][1] *= 1e-37
    tensors["grad"][2] *= 1e-30
    tensors["grad"][3, 5] = torch.nan
    tensors["grad"][4, 5] = torch.inf
    tensors["grad"][5] *= 1e19
    tensors["grad"][6] *= torch.logspace(-12, 0, 256)  # down to the subnormal codes and below
    ours = assert_steps_equal_the_reference(device, tensors, steps=3, keep_ratio=None)
    scales = ours["scales"].cpu()
    assert scales[:, 0].tolist() == [0, 0]
    assert scales[:, 3].isnan().all()
    assert (ours["exp_avg"][3] == 0).all()


# ---------------------------------------------------------------------------------------------- the window


@pytest.fixture
def missed(monkeypatch):
    """Whether each step's window missed the threshold, as the flag on the device says; None: no window."""
    flags = []

    def spy(*args, **kwargs):
        flag = kwargs.get("only_if")
        flags.append(None if flag is None else bool(flag.item()))
        return select.kept_threshold(*args, **kwargs)

    monkeypatch.setattr(kernels, "kept_threshold", spy)
    return flags


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("keep_ratio", [0.1, 1])
def test_a_threshold_near_the_old_one_is_read_from_the_window(device, dtype, mode, keep_ratio, missed):
    tensors = arguments((40, 130), dtype, True)
    before = reference.kept_threshold(floats(tensors["scores"]), keep_ratio, mode).view(dtype)
    options = {"threshold": before, "mode": mode, "keep_ratio": keep_ratio, "lr": 1e-4}
    assert_steps_equal_the_reference(device, tensors, steps=2, **options)
    assert missed == [False, False]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("hint", [1e-12, 0.5, torch.nan, torch.inf])
def test_a_threshold_outside_the_window_is_found_by_the_full_selection(device, dtype, mode, hint, missed):
    tensors = arguments((40, 130), dtype, True)
    tensors["scores"] = scores_of(0.01 + 0.001 * normal(40, 130), dtype)
    if mode == "value":
        tensors["scores"] = scores_of(-0.01 + 0.001 * normal(40, 130), dtype)
    hint = scores_of(torch.tensor(hint), dtype)
    assert_steps_equal_the_reference(device, tensors, steps=1, threshold=hint, mode=mode, keep_ratio=0.5)
    assert missed == [True]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["lowest", "below", "highest", "above"])
def test_the_window_ends_where_it_should(device, dtype, mode, end, missed):
    hint = scores_of(torch.tensor(0.02), dtype)
    half = kernels.window_of(target_of(device)) // 2
    offset = {"lowest": -half, "below": -half - 1, "highest": half - 1, "above": half}[end]
    tensors = arguments((3, 700), dtype, True, weight_dtype=None)
    tensors["grad"].zero_()  # nothing moves
    tensors["scores"].view(torch.int16).fill_(int(hint.view(torch.int16)) + offset)
    options = {"threshold": hint, "mode": mode, "keep_ratio": 0.5}
    assert_steps_equal_the_reference(device, tensors, steps=1, **options)
    assert missed == [end in ("below", "above")]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("with_hint", [True, False])
def test_nothing_is_kept_at_ratio_zero(device, dtype, with_hint, missed):
    tensors = arguments((5, 300), dtype, True)
    hint = scores_of(torch.tensor(0.02), dtype) if with_hint else None
    assert_steps_equal_the_reference(device, tensors, steps=1, threshold=hint, keep_ratio=0)
    assert missed == [False if with_hint else None]


@FROM_NUMPY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_non_finite_score_makes_the_threshold_nan_and_keeps_nothing(device, dtype, bad, mode, missed):
    tensors = arguments((5, 300), dtype, True, weight_dtype=None)
    tensors["grad"][3, 7] = bad
    hint = scores_of(torch.tensor(0.002), dtype)
    ours = assert_steps_equal_the_reference(device, tensors, steps=1, threshold=hint, mode=mode)
    assert missed == [None if dtype == torch.float32 else False]
    options = DEFAULTS | {"step": 2, "mode": mode, "threshold": hint.to(device)}
    threshold, packed = kernels.score_step(Update(**ours, **options))
    assert floats(threshold).isnan()
    assert not packed.any()
    assert not floats(ours["scores"])[3, 7].isfinite()
    if dtype == torch.int16:
        assert ours["scores"][3, 7] & 0x7FFF == LARGEST_CODE + 1


def test_the_full_selection_leaves_its_output_alone_where_it_is_not_asked_for(device):
    scores = normal(3000).to(device)
    for asked in (0, 1):
        into = torch.full((), 5.0, device=device)
        flag = torch.tensor(asked, dtype=torch.int32, device=device)
        assert select.kept_threshold(scores, 0.9, "magnitude", into=into, only_if=flag) is into
        expected = reference.kept_threshold(scores.cpu(), 0.9, "magnitude") if asked else torch.tensor(5.0)
        assert torch.equal(into.cpu(), expected)
