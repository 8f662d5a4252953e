"""Inputs of score_step that reach every corner case of a format, and a bitwise comparison with the reference."""

from collections.abc import Callable, Mapping

import torch
from by_name import oracle
from torch import Tensor

from mft_kernels import float_from_fixed, score_step
from mft_kernels.reference import step as reference_step
from mft_kernels.reference.fixed_point import fixed_from_float, selectable

DEFAULTS = {
    "step": 1,
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "grad_scale": None,
    "seed": 7,
    "mode": "magnitude",
    "keep_ratio": 0.9,
    "threshold": None,
}
MEAN = reference_step.MEAN_BIAS, reference_step.MEAN_CODES
SQUARE = reference_step.SQUARE_BIAS, reference_step.SQUARE_CODES
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MOST_APART = 1e-3  # share of scores or codes; less than 1e-4 is expected
ATOL = 2.0**-30  # of scores: a few units in the last place of an update of 1e-3
STATE = ("scores", "exp_avg", "exp_avg_sq", "scales")  # what a step writes

Tensors = Mapping[str, Tensor | None]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores_of(values, dtype):
    return fixed_from_float(values) if dtype == torch.int16 else values.to(dtype)


def arguments(shape, dtype, eight_bit, weight_dtype=torch.bfloat16, grad_dtype=torch.float32):
    """Return scores that include zeros of either sign, with fresh moments."""
    values = 0.02 * normal(*shape)
    values.view(-1)[1::11] = 0
    scores = scores_of(values, dtype)
    if dtype != torch.float32:
        scores.view(torch.int16).view(-1)[1::22] = -0x8000
    moments = torch.uint8 if eight_bit else torch.float32
    return {
        "scores": scores,
        "grad": normal(*shape, seed=1).to(grad_dtype),
        "weight": None if weight_dtype is None else (0.02 * normal(*shape, seed=2)).to(weight_dtype),
        "exp_avg": torch.zeros(shape, dtype=moments),
        "exp_avg_sq": torch.zeros(shape, dtype=moments),
        "scales": torch.zeros(2, -(-scores.numel() // reference_step.BLOCK)) if eight_bit else None,
    }


def copied(tensors: Tensors, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to(device, copy=True) for name, t in tensors.items()}


def assert_same(name: str, got: Tensor, expected: Tensor) -> None:
    """Assert equal dtype, shape and bits; NaN equals NaN, and -0 differs from 0."""
    got = got.cpu()
    assert got.dtype == expected.dtype, name
    assert got.shape == expected.shape, name
    got, expected = selectable(got), selectable(expected)  # codes as fp16, in which some are NaN or infinite
    if got.is_floating_point():
        assert torch.equal(got.isnan(), expected.isnan()), name
        bits = INTEGER[got.element_size()]
        got, expected = (t.masked_fill(t.isnan(), 0).view(bits) for t in (got, expected))
    assert torch.equal(got, expected), (name, (got != expected).nonzero()[:5])


def assert_steps_equal_the_reference(
    score_step: Callable[..., tuple[Tensor, Tensor]],
    tensors: Tensors,
    *,
    steps: int = 2,
    device: torch.device | str = "cpu",
    message: str = "",
    **options,
) -> tuple[dict[str, Tensor | None], tuple[Tensor, Tensor]]:
    """Run both from the same start; each passes its threshold to its own next step.

    Args: score_step: a backend's score_step, for tensors on ``device``. options: added to DEFAULTS, or instead of them.
    Returns: the backend's tensors, and its last result.
    """
    ours, theirs = copied(tensors, device), copied(tensors)
    options = DEFAULTS | options
    moved = copied({name: options[name] for name in ("grad_scale", "threshold")}, device)
    got, expected = (moved["threshold"],), (options["threshold"],)
    approximate = is_approximate(device, ours)
    for number in range(options["step"], options["step"] + steps):
        hints = (got[0], expected[0]) if options["keep_ratio"] is not None else (None, None)
        now = options | {"step": number}
        got = score_step(**ours, **now | {"grad_scale": moved["grad_scale"], "threshold": hints[0]})
        expected = oracle.score_step(**theirs, **now | {"threshold": hints[1]})
        if approximate:
            assert_state_is_near(ours, theirs, message)
            theirs = copied(ours)  # errors do not add up; the mask is that of these scores
            expected = reference_step.next_mask(theirs["scores"], options["mode"], options["keep_ratio"])
        else:
            assert_state_is_the_same(ours, theirs, message)
        assert_same(f"threshold {message}", got[0], expected[0])
        assert_same(f"packed {message}", got[1], expected[1])
    return ours, got


def is_approximate(device: torch.device | str, tensors: Tensors) -> bool:
    """Whether a GPU steps these tensors with approximate quotients and roots: the 8-bit scheme of triton."""
    return torch.device(device).type == "cuda" and torch.version.hip is None and tensors["scales"] is not None


def assert_state_is_near(ours: Tensors, theirs: Tensors, message: str = "") -> None:
    """Assert what quotients and roots that are off by 2 units in the last place may change.

    Few words and codes differ, each by one rounding; scales and fp32 scores differ in their last bits.
    """
    for name in STATE:
        got, expected = (selectable(t[name]).cpu() for t in (ours, theirs))
        assert torch.equal(got.isnan(), expected.isnan()), (name, message)
        if expected.dtype == torch.float32:
            assert torch.allclose(got, expected, rtol=2.0**-20, atol=ATOL, equal_nan=True), (name, message)
            continue
        apart = (got.view(INTEGER[got.element_size()]).int() - expected.view(INTEGER[got.element_size()]).int()).abs()
        near = (got.float() - expected.float()).abs() <= ATOL  # -0 and 0, or two tiny scores, are many words apart
        apart[near | got.isnan()] = 0
        assert apart.max() <= 1, (name, message)
        assert (apart > 0).sum() <= max(3, MOST_APART * apart.numel()), (name, message)


def assert_state_is_the_same(ours: Tensors, theirs: Tensors, message: str = "") -> None:
    for name in STATE:
        if theirs[name] is not None:
            assert_same(f"{name} {message}", ours[name], theirs[name])


class Matrix:
    """Scores from N(0, 0.02), a weight, and moments at zero; next_grad returns the next of a series of gradients."""

    def __init__(self, n, k, scores=torch.float32, moments="fp32", weight=torch.float32, grad=torch.float32, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.grad_dtype = grad
        wide = 0.02 * self.normal(n, k)
        self.scores = fixed_from_float(wide) if scores == torch.int16 else wide.to(scores)
        self.weight = None if weight is None else (0.02 * self.normal(n, k)).to(weight)
        dtype = torch.float32 if moments == "fp32" else torch.uint8
        self.moments = [torch.zeros(n, k, dtype=dtype), torch.zeros(n, k, dtype=dtype)]
        if moments == "8bit":
            self.moments.append(torch.zeros(2, -(-n * k // 256)))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def next_grad(self):
        n, k = self.scores.shape
        return (self.normal(n, k) * self.normal(n, 1).exp()).to(self.grad_dtype)

    def clone(self):
        other = object.__new__(Matrix)
        other.__dict__.update(self.__dict__)
        other.scores, other.moments = self.scores.clone(), [t.clone() for t in self.moments]
        return other

    def step(self, grad, step, **options):
        options = {"lr": 1e-3, "seed": 7 << 40 | 3, **options}
        return score_step(self.scores, grad, self.weight, *self.moments, step=step, **options)

    def floats(self):
        return float_from_fixed(self.scores) if self.scores.dtype == torch.int16 else self.scores.float()
