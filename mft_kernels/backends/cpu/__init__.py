"""The cpu backend: the C++ library of csrc/, its arguments made 2-d and contiguous.

The library picks AVX-512 with bf16 dot products, AVX-512, AVX2 or portable code when it runs; the environment variable
MFT_CPU_CAPABILITY (one of ``capabilities()``) overrides that, for tests and comparisons. By which path it makes a
product is in cpu_choice.py.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import reference
from ...reference.linear import Gradients, kept_count
from .. import built
from ..autotune import AUTOTUNE, measuring
from ..built import load
from ..table import Backend, register
from .choice import grad_product_of, measured_path, product_of
from .grouped import grouped_product, grouped_score_grad, kept_thresholds


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor, bias: Tensor | None, mode: str
) -> Tensor:
    """y = x @ where(keep, weight, 0).T + bias, straight from the scores; through their bits with thresholds by row."""
    if threshold.dim() == 1:
        return _forward(x, weight, None, None, pack_mask(scores, threshold, mode), bias, "value")
    return _forward(x, weight, scores.contiguous(), threshold, None, bias, mode)


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
    if threshold.dim() == 1:
        packed = pack_mask(scores, threshold, mode)
        return _backward(grad_output, x, weight, scores, None, packed, None, mode, output_mask)
    return _backward(grad_output, x, weight, scores.contiguous(), threshold, None, None, mode, output_mask)


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
    """masked_linear_packed with a mask a row: few rows in one pass over the weight, else one product a mask."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    masks = [packed.contiguous() for packed in masks]
    tasks = tasks.to(torch.int64).contiguous()
    y = built.cpu_ops.try_masked_linear_many(x.contiguous(), weight, masks, tasks, bias, "auto")
    return reference.masked_linear_many(x, weight, masks, tasks, bias) if y is None else y  # None: it is empty


def masked_linear_many_backward(grad_output: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor) -> Tensor:
    """d_x of masked_linear_many, one product a mask."""
    weight = weight.contiguous()

    def product(rows: Tensor, task: int) -> Tensor:
        if task < 0:
            return reference.grad_of_linear(rows, weight)
        packed, d_x = masks[task].contiguous(), [True, False, False, False]
        return _backward(rows, rows, weight, None, None, packed, None, "value", d_x)[0]

    return _by_task(grad_output, tasks, weight.shape[1], product)


def accumulate_score_grad(
    out: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor | None, signs: Tensor | None, mode: str
) -> None:
    """out += (grad_output.T @ x) * weight [* sign(scores)], (N, K) contiguous; no temporary of that size."""
    _score_grad(out, _rows(grad_output), _rows(x), weight.contiguous(), scores, signs, mode, accumulate=True)


def accumulate_product(out: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """out += grad_output.T @ x, (N, K) contiguous; no temporary of that size."""
    _grad_scores(out, _rows(grad_output), _rows(x), None, None, None, accumulate=True)


def kept_threshold(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """The k-th largest key, by histograms; +inf if nothing is kept, NaN if a score is not finite."""
    return built.cpu_ops.kept_threshold(
        scores.contiguous(), kept_count(scores.numel(), keep_ratio), mode == "magnitude"
    )


def pack_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """keep as bits, int32 (N, ceil(K / 32)); threshold () or (N,), one a row."""
    if threshold.dim() == 1:
        return built.cpu_ops.pack_mask_by_row(scores.contiguous(), threshold.contiguous(), mode == "magnitude")
    return built.cpu_ops.pack_mask(scores.contiguous(), threshold, mode == "magnitude")


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(scores > 0 as bits, how many scores are exactly 0)."""
    return built.cpu_ops.pack_signs(scores.contiguous())


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
    """One pass over gradient, weight, scores and moments, which finds the next threshold too; a second packs the mask.

    fp32 scores take a third pass where the threshold before is not given or more than 3 % away from the next.
    """
    magnitude = mode == "magnitude"
    found = built.cpu_ops.score_step_(
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
        magnitude and weight is not None,
        -1 if keep_ratio is None else kept_count(scores.numel(), keep_ratio),
        magnitude,
        threshold,
    )
    if keep_ratio is None:
        return scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)
    if scores.dtype == torch.int16:  # codes order as fp16
        return found, built.cpu_ops.pack_mask(scores.view(torch.float16), found.view(torch.float16), magnitude)
    return found, built.cpu_ops.pack_mask(scores, found, magnitude)


def dequantize(codes: Tensor, absmax: list[Tensor], shape: list[int], kind: str, dtype: torch.dtype) -> Tensor:
    """The dense (N, K) of codes in NF4 or int8."""
    dense = torch.empty(shape, dtype=dtype)
    built.cpu_ops.dequantize_(dense, *_codes(codes, absmax), kind == "nf4")
    return dense


def masked_linear_quantized(
    x: Tensor,
    codes: Tensor,
    absmax: list[Tensor],
    packed: Tensor | None,
    bias: Tensor | None,
    shape: list[int],
    kind: str,
) -> Tensor:
    """masked_linear_packed of the decoded weight, to the bit; it is decoded in parts where it is masked."""
    packed, bias = (None if t is None else t.contiguous() for t in (packed, bias))
    return built.cpu_ops.masked_linear_quantized(
        x.contiguous(), *_codes(codes, absmax), packed, bias, *shape, kind == "nf4", "auto"
    )


def masked_linear_quantized_d_x(
    grad_output: Tensor, codes: Tensor, absmax: list[Tensor], packed: Tensor | None, shape: list[int], kind: str
) -> Tensor:
    """d_x of masked_linear_quantized."""
    packed = None if packed is None else packed.contiguous()
    d_x = built.cpu_ops.grad_x_quantized(
        _rows(grad_output), *_codes(codes, absmax), packed, *shape, kind == "nf4", "auto"
    )
    return d_x.view(*grad_output.shape[:-1], shape[1])


def capabilities() -> list[str]:
    """The instruction sets that can run here, best first; empty without the library."""
    return [] if unavailable is not None else built.cpu_ops.capabilities().split(",")


# What is run where a path is taken, best first: for people.
PATHS = {
    "amx": "bf16 products by tiles of AMX, which the kernel permits; all others by AVX-512",
    "avx512_bf16": "bf16 products by AVX512-BF16, all others by AVX-512",
    "avx512": "products by AVX-512, in fp32",
    "avx2": "few tokens by AVX2, larger products by torch on slabs of the masked weight",
    "portable": "few tokens by portable code, larger products by torch on slabs of the masked weight",
    "amx_emulated": "bf16 products by tiles of AMX in plain code: for tests, and slow",
}
_CHOOSE = "MFT_CPU_CAPABILITY"


def capability_reasons() -> str:
    """Lines "name: reason" of the instruction sets that are ahead of the one taken, and are not."""
    taken, available = built.cpu_ops.capability(), capabilities()
    asked = f"{_CHOOSE}={os.environ.get(_CHOOSE)} asks for {taken}"
    missing = dict(line.split(": ", 1) for line in built.cpu_ops.missing_capabilities().splitlines())
    lines = [
        f"{name}: {asked if name in available else missing[name]}"
        for name in list(PATHS)[: list(PATHS).index(taken)]
        if name in available or name in missing
    ]
    return "\n".join(lines)


def path_taken() -> tuple[str, list[str]]:
    """("amx: tiles and ...", the lines of capability_reasons) of the path that products take here and now.

    Raises: RuntimeError if MFT_CPU_CAPABILITY names what cannot run here, ValueError for an unknown
    value of MFT_AUTOTUNE.
    """
    if unavailable is not None:
        return "none, plain PyTorch instead", [f"the library: {unavailable}"]
    taken = built.cpu_ops.capability()
    what = PATHS.get(taken, "")
    why = f"{_CHOOSE}={os.environ[_CHOOSE]} asks for it" if os.environ.get(_CHOOSE) else what
    measured = f"; the path of each product is measured, as {AUTOTUNE}=1 asks" if measuring() else ""
    return f"{taken}: {why}{measured}", capability_reasons().splitlines()


# ---------------------------------------------------------------------------------------------- below: private


def _rows(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.contiguous()
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _codes(codes: Tensor, absmax: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return codes.contiguous(), [each.contiguous() for each in absmax]


def _by_task(rows: Tensor, tasks: Tensor, width: int, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """(..., width): product(the rows of a task, the task), for each of the tasks."""
    places: dict[int, list[int]] = {}
    for place, task in enumerate(tasks.tolist()):
        places.setdefault(task, []).append(place)
    if len(places) == 1:
        return product(rows, *places)
    out = rows.new_empty((*rows.shape[:-1], width))
    for task, each in places.items():
        index = torch.tensor(each)
        out[index] = product(rows[index], task)
    return out


def _forward(x, weight, scores, threshold, packed, bias, mode) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    arguments = (x.contiguous(), weight.contiguous(), scores, threshold, packed, bias, mode == "magnitude")
    return _product("forward", built.cpu_ops.masked_linear, arguments, scores if packed is None else packed)


def _product(name: str, op: Callable[..., Tensor], arguments: tuple, mask: Tensor) -> Tensor:
    """The forward pass or d_x of arguments that begin with tokens and weight, by the path that is chosen."""
    path = "auto"
    if measuring():
        product = product_of(name, arguments[0], arguments[1], mask)
        path = measured_path(product, lambda: lambda path: op(*arguments, path))
    return op(*arguments, path)


def _backward(grad_output, x, weight, scores, threshold, packed, signs, mode, output_mask) -> Gradients:
    grad, weight, magnitude = _rows(grad_output), weight.contiguous(), mode == "magnitude"
    d_x = d_weight = d_scores = d_bias = None
    if output_mask[0]:
        arguments = (grad, weight, scores, threshold, packed, magnitude)
        d_x = _product("d_x", built.cpu_ops.grad_x, arguments, scores if packed is None else packed)
        d_x = d_x.view(*grad_output.shape[:-1], weight.shape[1])
    if output_mask[1]:
        d_weight = built.cpu_ops.grad_weight(grad, _rows(x), scores, threshold, packed, magnitude)
    if output_mask[2]:
        d_scores = weight.new_empty(weight.shape, dtype=torch.float32 if scores is None else scores.dtype)
        _score_grad(d_scores, grad, _rows(x), weight, scores, signs, mode, accumulate=False)
    if output_mask[3]:
        d_bias = grad.sum(0)
    empty = [grad.new_empty(0) if g is None else g for g in (d_x, d_weight, d_scores, d_bias)]
    return empty[0], empty[1], empty[2], empty[3]


def _score_grad(out, grad, x, weight, scores, signs, mode, *, accumulate: bool) -> None:
    if mode == "value":  # no sign factor
        scores = signs = None
    elif signs is not None:
        scores, signs = None, signs.contiguous()
    else:
        scores = scores.contiguous()
    _grad_scores(out, grad, x, weight, scores, signs, accumulate=accumulate)


def _grad_scores(out, grad, x, weight, scores, signs, *, accumulate: bool) -> None:
    path = "auto"
    if measuring():

        def prepare() -> Callable[[str], None]:
            aside = torch.zeros_like(out)  # out itself gets its sum once
            return lambda path: built.cpu_ops.grad_scores_(aside, grad, x, weight, scores, signs, accumulate, path)

        sign = scores if signs is None else signs
        path = measured_path(grad_product_of(out, x, weight, sign, accumulate=accumulate), prepare)
    built.cpu_ops.grad_scores_(out, grad, x, weight, scores, signs, accumulate, path)


unavailable = load("cpu")

register(
    Backend(
        name="cpu",
        device_types=frozenset({"cpu"}),
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
                accumulate_score_grad,
                accumulate_product,
                kept_threshold,
                pack_mask,
                pack_signs,
                score_step,
                dequantize,
                masked_linear_quantized,
                masked_linear_quantized_d_x,
                grouped_product,
                grouped_score_grad,
                kept_thresholds,
            )
        },
        short={}
        if unavailable
        else {
            "masked_linear": built.cpu_ops.try_masked_linear.default,
            "masked_linear_backward": built.cpu_ops.try_masked_linear_backward.default,
            "masked_linear_packed": built.cpu_ops.try_masked_linear_packed.default,
            "masked_linear_packed_backward": built.cpu_ops.try_masked_linear_packed_backward.default,
            "accumulate_product": built.cpu_ops.try_accumulate_product.default,
            "masked_linear_many": built.cpu_ops.try_masked_linear_many.default,
        },
        unavailable=unavailable,
        detail="" if unavailable else f"C++, {built.cpu_ops.capability()}",
    )
)
