"""The cuda backend: the kernels of csrc/cuda for NVIDIA GPUs, their arguments made 2-d with unit column stride.

The library picks Hopper's kernels on compute capability 9.0 where they can take the arguments, and the general ones
otherwise; the environment variable MFT_CUDA_CAPABILITY=80 overrides that, for tests and comparisons.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference.linear import Gradients, kept_count
from .. import built
from ..built import load, report
from ..table import Backend, register
from .grouped import grouped_product, grouped_score_grad, kept_thresholds

_OLDEST = 80


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor, bias: Tensor | None, mode: str
) -> Tensor:
    """y = x @ where(keep, weight, 0).T + bias, straight from the scores."""
    return _forward(x, weight, _matrix(scores), threshold, None, bias, mode)


def masked_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    mode: str,
    output_mask: list[bool],
) -> Gradients:
    """d_x, d_weight, d_scores, d_bias; (0,) for what output_mask leaves out."""
    return _backward(grad_output, x, weight, _matrix(scores), threshold, None, None, mode, output_mask)


def masked_linear_packed(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """masked_linear with the mask given as bits, int32 (N, ceil(K / 32))."""
    return _forward(x, weight, None, None, packed.contiguous(), bias, "value")


def masked_linear_packed_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    output_mask: list[bool],
) -> Gradients:
    """Gradients of masked_linear_packed; the sign comes from the bits of ``signs`` where given, else from scores."""
    return _backward(grad_output, x, weight, scores, None, packed.contiguous(), signs, mode, output_mask)


def masked_linear_many(
    x: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor, bias: Tensor | None
) -> Tensor:
    """masked_linear_packed with a mask a row; the weight is read once for each 64 rows, whatever the masks are."""
    rows = _rows(x)
    y = built.cuda_ops.product_many(
        rows,
        _matrix(weight),
        [packed.contiguous() for packed in masks],
        (tasks if tasks.dtype in (torch.int64, torch.int32) else tasks.int()).contiguous(),
        None if bias is None else bias.contiguous(),
        _rows_of_a_task(rows, tasks),
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def masked_linear_many_backward(grad_output: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor) -> Tensor:
    """d_x of masked_linear_many: a product of all rows for each mask, of which its rows are taken."""
    grad, weight = _rows(grad_output), _matrix(weight)
    task = tasks.repeat_interleave(_rows_of_a_task(grad, tasks))[: len(grad)].unsqueeze(1)
    everything = weight.new_full((weight.shape[0], -(-weight.shape[1] // 32)), -1, dtype=torch.int32)
    d_x = grad.new_full((len(grad), weight.shape[1]), torch.nan)
    for place, packed in enumerate([everything, *masks], start=-1):
        product = built.cuda_ops.product(grad, weight, None, None, packed.contiguous(), None, False, True)
        d_x = torch.where(task == place, product, d_x)
    return d_x.view(*grad_output.shape[:-1], weight.shape[1])


def masked_linear_quantized(
    x: Tensor,
    codes: Tensor,
    absmax: list[Tensor],
    packed: Tensor | None,
    bias: Tensor | None,
    shape: list[int],
    kind: str,
) -> Tensor:
    """y = x @ where(mask, decoded, 0).T + bias; the kernel reads codes, and the decoded weight is never in memory."""
    return _quantized(x, codes, absmax, packed, bias, shape, kind, transposed=False)


def masked_linear_quantized_d_x(
    grad_output: Tensor, codes: Tensor, absmax: list[Tensor], packed: Tensor | None, shape: list[int], kind: str
) -> Tensor:
    """d_x = grad_output @ where(mask, decoded, 0), likewise."""
    return _quantized(grad_output, codes, absmax, packed, None, shape, kind, transposed=True)


def accumulate_score_grad(
    out: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor | None, signs: Tensor | None, mode: str
) -> None:
    """out += (grad_output.T @ x) * weight [* sign(scores)], in the epilogue; no temporary of that size."""
    sign = _sign(scores, signs, mode)
    built.cuda_ops.score_grad_(
        out, None, _rows(grad_output), _rows(x), _matrix(weight), *sign, None, None, None, False, True
    )


def accumulate_product(out: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """out += grad_output.T @ x, by the same kernels, which then read neither weight nor sign."""
    built.cuda_ops.score_grad_(out, None, _rows(grad_output), _rows(x), None, None, None, None, None, None, False, True)


def kept_threshold(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """The k-th largest key, by histograms; +inf if nothing is kept, NaN if a score is not finite."""
    return built.cuda_ops.kept_threshold(
        scores.contiguous(), kept_count(scores.numel(), keep_ratio), mode == "magnitude"
    )


def pack_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """keep as bits, int32 (N, ceil(K / 32))."""
    return built.cuda_ops.pack_mask(_matrix(scores), threshold, mode == "magnitude")


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(scores > 0 as bits, how many scores are exactly 0)."""
    return built.cuda_ops.pack_signs(_matrix(scores))


def score_step(
    scores: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    seed: int,
    mode: str,
    keep_ratio: float | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One pass over gradient, weight, scores and moments, which counts the next threshold too; a second packs the mask.

    fp32 scores take three more passes, others one or two where the threshold before is not given or far from the next.
    """
    return built.cuda_ops.score_step_(
        scores,
        grad.contiguous(),
        None if weight is None else weight.contiguous(),
        exp_avg,
        exp_avg_sq,
        scales,
        step,
        lr / (1 - beta1**step),
        beta1,
        beta2,
        (1 - beta2**step) ** (0.5 if scales is None else -0.5),
        eps,
        1 - lr * weight_decay,
        grad_scale,
        seed,
        mode == "magnitude",
        -1 if keep_ratio is None else kept_count(scores.numel(), keep_ratio),
        threshold,
    )


# ---------------------------------------------------------------------------------------------- below: private


def _matrix(t: Tensor) -> Tensor:
    """The 2-d tensor itself where rows have unit stride and do not overlap (expanded ones do), else a copy."""
    rows, columns = t.shape
    fits = (columns <= 1 or t.stride(1) == 1) and (rows <= 1 or t.stride(0) >= columns)
    return t if fits else t.contiguous()


def _rows(x: Tensor) -> Tensor:
    return _matrix(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def _rows_of_a_task(rows: Tensor, tasks: Tensor) -> int:
    return max(1, len(rows) // max(1, len(tasks)))


def _sign(scores: Tensor | None, signs: Tensor | None, mode: str) -> tuple[Tensor | None, Tensor | None]:
    """(scores, bits) of which the sign is taken: one of them, or in mode "value" neither."""
    if mode == "value":
        return None, None
    if signs is not None:
        return None, signs.contiguous()
    assert scores is not None, "magnitude mode takes the sign from scores or signs"
    return _matrix(scores), None


def _forward(x, weight, scores, threshold, packed, bias, mode) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y = built.cuda_ops.product(_rows(x), _matrix(weight), scores, threshold, packed, bias, mode == "magnitude", False)
    return y.view(*x.shape[:-1], weight.shape[0])


def _quantized(given, codes, absmax, packed, bias, shape, kind, *, transposed: bool) -> Tensor:
    out = built.cuda_ops.product_quantized(
        _rows(given),
        codes.contiguous(),
        [scale.contiguous() for scale in absmax],
        None if packed is None else packed.contiguous(),
        None if bias is None else bias.contiguous(),
        *shape,
        kind == "nf4",
        transposed,
    )
    return out.view(*given.shape[:-1], shape[transposed])


def _backward(grad_output, x, weight, scores, threshold, packed, signs, mode, output_mask) -> Gradients:
    grad, weight, magnitude = _rows(grad_output), _matrix(weight), mode == "magnitude"
    keep = (None, None, packed) if packed is not None else (scores, threshold, None)
    d_x = d_weight = d_scores = d_bias = None
    if output_mask[0]:
        d_x = built.cuda_ops.product(grad, weight, *keep, None, magnitude, True)
        d_x = d_x.view(*grad_output.shape[:-1], weight.shape[1])
    if output_mask[1]:
        d_weight = weight.new_empty(weight.shape)
    if output_mask[2]:
        d_scores = weight.new_empty(weight.shape, dtype=torch.float32 if scores is None else scores.dtype)
    if d_weight is not None or d_scores is not None:
        sign = _sign(scores, signs, mode) if d_scores is not None else (None, None)
        built.cuda_ops.score_grad_(d_scores, d_weight, grad, _rows(x), weight, *sign, *keep, magnitude, False)
    if output_mask[3]:
        d_bias = grad.sum(0)
    empty = [grad.new_empty(0) if g is None else g for g in (d_x, d_weight, d_scores, d_bias)]
    return empty[0], empty[1], empty[2], empty[3]


# Whose dtype an op is asked by first, where that is not the weight.
_OPERANDS = {
    "accumulate_product": "x",
    "grouped_score_grad": "x",
    "masked_linear_quantized": "x",
    "masked_linear_quantized_d_x": "grad_output",
}


# These take float32 too.
_OF_SCORES = ("kept_threshold", "kept_thresholds", "pack_mask", "pack_signs", "score_step")


class _Cuda(Backend):
    """Refuses more: weights in float32, and single GPUs that the library has no code for."""

    def refusal(self, op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        if reason := super().refusal(op, device, dtypes):
            return reason
        if op not in _OF_SCORES and dtypes[0] == torch.float32:
            operand = _OPERANDS.get(op, "weight")
            return f"its {operand} must be bfloat16 or float16, got float32, which the triton backend takes"
        return _device_refusal(device.index)


@functools.cache
def _device_refusal(index: int | None) -> str | None:
    """Why the library has no code for a GPU, None if it has; ``index`` None: the current one."""
    major, minor = torch.cuda.get_device_capability(index)
    return _capability_refusal(10 * major + minor, built.cuda_ops.contents().split()[0].split("."))


def _capability_refusal(capability: int, targets: list[str]) -> str | None:
    """``targets``: sm_80 is code for every 8.x from 8.0 on, compute_80 becomes code for anything newer."""
    named = f"{capability // 10}.{capability % 10}"
    if capability < _OLDEST:
        return f"it needs compute capability 8.0 or newer, got {named}"
    for kind, _, number in (target.partition("_") for target in targets):
        same = int(number) // 10 == capability // 10
        if int(number) <= capability and (same or kind == "compute"):
            return None
    return f"it was built for {', '.join(targets)}, got compute capability {named}; build it with another MFT_CUDA"


def _driver_refusal(runtime: int, driver: int) -> str | None:
    """Versions as 1000 * major + 10 * minor. Code of one major version runs on every driver of that version."""
    if driver // 1000 >= runtime // 1000:
        return None
    shown = [f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver)]
    return (
        f"it was built with CUDA {shown[0]}, and the driver serves up to {shown[1]}; update the driver, "
        "or build with an older nvcc (MFT_NVCC=/path/to/nvcc)"
    )


def _unavailable() -> str | None:
    """Why no GPU here can run what the library has."""
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
        ops={
            f.__name__: f
            for f in (
                masked_linear,
                masked_linear_backward,
                masked_linear_packed,
                masked_linear_packed_backward,
                masked_linear_many,
                masked_linear_many_backward,
                masked_linear_quantized,
                masked_linear_quantized_d_x,
                accumulate_score_grad,
                accumulate_product,
                grouped_product,
                grouped_score_grad,
                kept_thresholds,
                kept_threshold,
                pack_mask,
                pack_signs,
                score_step,
            )
        },
        unavailable=unavailable,
        detail="" if _not_loaded else _detail(),
        on_request="no GPU has timed it yet; backend='cuda' asks for it",
    )
)
