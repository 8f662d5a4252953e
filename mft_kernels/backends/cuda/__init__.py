"""The cuda backend: calls the kernels of csrc/cuda for NVIDIA GPUs, with arguments made 2-d with unit column stride.

The library picks Hopper's kernels on compute capability 9.0 if they can take the arguments, and the general ones
otherwise. The environment variable MFT_CUDA_CAPABILITY=80 overrides that, for tests and comparisons.
"""

import functools

import torch
from torch import Tensor

from ...operands import Keep, Sums, as_rows, contiguous, scores_and_signs
from ...reference.linear import kept_count
from .. import built
from ..built import load, report
from ..table import Backend, Dtypes, register

_OLDEST = 80


def product(a: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, *, transposed: bool = False) -> Tensor:
    """Compute a @ where(keep, weight, 0).T + bias, without the .T if transposed; see the reference."""
    bias = contiguous(bias)
    y = built.cuda_ops.product(_rows(a), _matrix(weight), *_mask(keep), bias, keep.magnitude, transposed)
    return y.view(*a.shape[:-1], weight.shape[transposed])


def score_grad(sums: Sums) -> None:
    """Compute d_scores = [d_scores +] (grad_output.T @ x) [* weight] [* sign] in the epilogue, without a temporary."""
    keep = sums.keep
    scores, signs = scores_and_signs(sums.sign)
    weight = None if sums.weight is None else _matrix(sums.weight)
    operands = _rows(sums.grad_output), _rows(sums.x)
    mask, magnitude = ((None, None, None), False) if keep is None else (_mask(keep), keep.magnitude)
    of_sign = None if scores is None else _matrix(scores), contiguous(signs)
    outputs = sums.d_scores, sums.d_weight
    built.cuda_ops.score_grad_(*outputs, *operands, weight, *of_sign, *mask, magnitude, sums.accumulate)


def select(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """Return the k-th largest key, by histograms: +inf if nothing is kept, NaN if a score is not finite."""
    k = kept_count(scores.numel(), keep_ratio)
    return built.cuda_ops.kept_threshold(scores.contiguous(), k, mode == "magnitude")


def pack(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """Return keep as bits, int32 (N, ceil(K / 32))."""
    return built.cuda_ops.pack_mask(_matrix(scores), threshold, mode == "magnitude")


def signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores > 0 as bits, and how many scores are exactly 0."""
    return built.cuda_ops.pack_signs(_matrix(scores))


# ---------------------------------------------------------------------------------------------- below: private


def _matrix(t: Tensor) -> Tensor:
    """Return t, (N, K), or a copy unless columns have unit stride and rows do not overlap.

    The rows of an expanded tensor overlap.
    """
    rows, columns = t.shape
    fits = (columns <= 1 or t.stride(1) == 1) and (rows <= 1 or t.stride(0) >= columns)
    return t if fits else t.contiguous()


def _rows(x: Tensor) -> Tensor:
    return _matrix(as_rows(x))


def _mask(keep: Keep) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (scores, thresholds, packed) as the library takes them."""
    scores = None if keep.scores is None else _matrix(keep.scores)
    return scores, keep.thresholds, contiguous(keep.words)


# Functions of tokens or a weight. The others take scores, also in float32.
_PRODUCTS = ("product", "score_grad", "gradients")


class _Cuda(Backend):
    """The cuda backend, which also refuses products in float32, and GPUs that the library has no code for."""

    def refusal(
        self, function: str, device: torch.device, dtypes: Dtypes, operands: frozenset[type] = frozenset()
    ) -> str | None:
        if reason := super().refusal(function, device, dtypes, operands):
            return reason
        if function in _PRODUCTS and dtypes[0] == torch.float32:
            return "its products take bfloat16 or float16, got float32: the triton backend takes float32"
        return _device_refusal(device.index)


@functools.cache
def _device_refusal(index: int | None) -> str | None:
    """Return why the library has no code for a GPU, or None if it has. ``index`` None: the current GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    return _capability_refusal(10 * major + minor, built.cuda_ops.contents().split()[0].split("."))


def _capability_refusal(capability: int, targets: list[str]) -> str | None:
    """Return why none of ``targets`` runs on this capability, or None if one does.

    sm_80 is code for every 8.x from 8.0 on. compute_80 can become code for anything newer.
    """
    named = f"{capability // 10}.{capability % 10}"
    if capability < _OLDEST:
        return f"it needs compute capability 8.0 or newer, got {named}"
    for kind, _, number in (target.partition("_") for target in targets):
        same = int(number) // 10 == capability // 10
        if int(number) <= capability and (same or kind == "compute"):
            return None
    return f"it was built for {', '.join(targets)}, got compute capability {named}; build it with another MFT_CUDA"


def _driver_refusal(runtime: int, driver: int) -> str | None:
    """Return why the driver cannot run code built with that CUDA version, or None if it can.

    Versions are 1000 * major + 10 * minor. Code of one major version runs on every driver of that major version.
    """
    if driver // 1000 >= runtime // 1000:
        return None
    shown = [f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver)]
    return (
        f"it was built with CUDA {shown[0]}, and the driver serves up to {shown[1]}; update the driver, "
        "or build with an older nvcc (MFT_NVCC=/path/to/nvcc)"
    )


def _unavailable() -> str | None:
    """Return why no GPU here can run the library, or None if one can."""
    if torch.version.hip is not None:
        return "it is for NVIDIA's GPUs, and this torch is for AMD's"
    if not torch.cuda.is_available():
        return "no GPU found by torch"
    return _driver_refusal(*built.cuda_ops.versions()) or _device_refusal(torch.cuda.current_device())


def _detail() -> str:
    targets, *kernels = built.cuda_ops.contents().split()
    left_out = report("cuda").get("left_out", {})
    names = {reason: [name for name in left_out if left_out[name] == reason] for reason in left_out.values()}
    without = "".join(f"; without {' and '.join(n)} (general kernels only): {reason}" for reason, n in names.items())
    return f"CUDA C++, {targets.replace('.', ' ')}{''.join(f', {name}' for name in kernels)}{without}"


_not_loaded = load("cuda")
unavailable = _not_loaded or _unavailable()

register(
    _Cuda(
        name="cuda",
        device_types=frozenset({"cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        functions={f.__name__: f for f in (product, score_grad, select, pack, signs)},
        unavailable=unavailable,
        detail="" if _not_loaded else _detail(),
        on_request="it has not been timed on a GPU yet; backend='cuda' selects it",
    )
)
