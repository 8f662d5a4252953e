"""The calls whose launches are compiled ahead (cubins.py): layers in every dtype and mode, and the other ops.

Tensors have no device. tests/cubins/test_build_list.py says what is left out, and why.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mft_kernels.backends.triton import bits, in_place, ops, score_step, scratch, select
from mft_kernels.codes import FORMATS, Codes
from mft_kernels.operands import Backward, Keep, KeepByTask, Sums, Update
from mft_kernels.reference.step import BLOCK

Calls = Iterator[Callable[[], object]]
#: Source of the mask: "words", as in layers, or (dtype of the scores, mode).
Mask = str | tuple[torch.dtype, str]

#: (M, N, K). They reach every binary that layers with 64 to 151,936 features launch for 1 to 16,384 tokens, if N and K
#: are multiples of 64. The first sixteen cover the 13,000 sizes that were searched; the others are usual ones.
SIZES = (
    (1, 512, 64), (17, 896, 13824), (1500, 64, 2560), (1500, 2048, 64), (48, 896, 1024), (200, 256, 11008),
    (512, 4864, 1024), (128, 11008, 256), (1, 64, 64), (17, 64, 64), (1, 1024, 512), (17, 5632, 64), (128, 896, 512),
    (200, 4864, 576), (1, 64, 512), (65, 64, 13824),
    (1, 4096, 4096), (24, 1024, 4096), (300, 4096, 11008), (4096, 4096, 4096),
)  # fmt: skip
MODES = ("magnitude", "value")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
#: Dtypes of scores that have a gradient. int16 scores are selected as fp16 is, and learn only by optimiser steps.
SCORES = (FP32, BF16)
MASKS: tuple[Mask, ...] = ("words", *itertools.product(SCORES, MODES))
#: (dtype of weight, dtype of gradient) in a held layer's step; the gradient has the weight's unless asked otherwise.
STEPPED = ((BF16, BF16), (BF16, FP32), (FP32, FP32))
MOMENTS = (FP32, torch.uint8)


def calls() -> Calls:
    """Yield all calls."""
    for n, k in {(n, k): None for _, n, k in SIZES}:
        yield from (partial(selection, n, k, *which) for which in itertools.product(DTYPES, MODES))
        yield from (partial(masked_weight, n, k, *which) for which in itertools.product(DTYPES, MASKS))
        yield from (partial(flips, n, k, *which) for which in itertools.product((FP32, BF16), (False, True)))
        for scores, mode, stepped, moments, scaled in itertools.product(
            (*SCORES, torch.int16), MODES, STEPPED, MOMENTS, (False, True)
        ):
            yield partial(step, n, k, scores, mode, *stepped, moments, scaled, keep_ratio=0.9)
        for scores, mode, moments in itertools.product(SCORES, MODES, MOMENTS):
            yield partial(step, n, k, scores, mode, None, scores, moments, scaled=False, keep_ratio=None)
    for size in SIZES:
        for dtype in DTYPES:
            yield from _products(*size, dtype, MASKS)
            for which in itertools.product(("nf4", "nested", "int8"), (True, False), (False, True)):
                yield from (partial(of_codes, *size, dtype, *which) for of_codes in (codes_forward, codes_d_x))
        yield from (in_tf32(call) for call in _products(*size, FP32, ("words",)))
        for dtype, masks, bias in itertools.product((BF16, FP16), (1, 2, 4, 8, 16), (False, True)):
            yield partial(many_masks, *size, dtype, masks, bias)


def _products(m: int, n: int, k: int, dtype: torch.dtype, masks: tuple[Mask, ...]) -> Calls:
    for mask in masks:
        yield from (partial(forward, m, n, k, dtype, mask, bias) for bias in (False, True))
        yield partial(backward, m, n, k, dtype, mask, None, "none", "x")
        signs = [*itertools.product(SCORES, ("bits", "scores", "none"))]
        if not isinstance(mask, str):
            signs = [(mask[0], "none" if mask[1] == "value" else "scores")]
        for (scores, sign), wanted in itertools.product(signs, ("x scores", "scores")):
            yield partial(backward, m, n, k, dtype, mask, scores, sign, wanted)
    for of_sums in {FP32: None, dtype: None}:
        yield partial(sums, m, n, k, dtype, of_sums, None)
    yield from (partial(sums, m, n, k, dtype, FP32, sign) for sign in ("bits", "none"))


def selection(n: int, k: int, dtype: torch.dtype, mode: str, by_row: bool = False) -> None:
    """Compute threshold, mask and signs."""
    scores = empty(n, k, dtype=dtype)
    select.kept_threshold(scores, 0.9, mode)
    bits.pack_mask(scores, empty(*[n] * by_row, dtype=dtype), mode)
    bits.pack_signs(scores)


def flips(n: int, k: int, dtype: torch.dtype, held: bool) -> None:
    """Change an in-place mask from another one, or from none."""
    weight, aside, ends = empty(n, k, dtype=dtype), empty(n, dtype=dtype), empty(n, dtype=torch.int64)
    before = words(n, k) if held else None
    in_place.count_dropped(weight, words(n, k))
    in_place.launch_put_aside(aside, weight, words(n, k), ends, (aside, before, ends) if before is not None else None)
    in_place.launch_put_back(weight, aside, words(n, k), ends, before)
    in_place.drop(weight, words(n, k), before)


def forward(m: int, n: int, k: int, dtype: torch.dtype, mask: Mask, bias: bool, by_row: bool = False) -> None:
    x, _, weight = _operands(m, n, k, dtype)
    ops.product(x, weight, _keep(n, k, mask, by_row), empty(n, dtype=dtype) if bias else None)


def masked_weight(n: int, k: int, dtype: torch.dtype, mask: Mask, by_row: bool = False) -> None:
    """Make the masked weight before a product through scratch."""
    scratch.masked_weight(empty(n, k, dtype=dtype), _keep(n, k, mask, by_row))


def backward(
    m: int, n: int, k: int, dtype: torch.dtype, mask: Mask, scores: torch.dtype | None, sign: str, wanted: str
) -> None:
    """Compute the gradients in ``wanted``. ``sign``: source of the sign in d_scores; ``scores``: their dtype."""
    x, grad, weight = _operands(m, n, k, dtype)
    output_mask = [name in wanted.split() for name in ("x", "weight", "scores", "bias")]
    keep = _keep(n, k, mask)
    told = _sign(n, k, sign, scores) if keep.scores is None or sign == "none" else keep.source
    ops.gradients(Backward(grad, x, weight, keep, told, scores or FP32, output_mask))


def sums(m: int, n: int, k: int, dtype: torch.dtype, of_sums: torch.dtype, sign: str | None) -> None:
    """Add up gradients; ``sign`` None: a held layer's gradient of weight and scores together."""
    x, grad, weight = _operands(m, n, k, dtype)
    out = empty(n, k, dtype=of_sums)
    if sign is None:
        ops.score_grad(Sums(grad, x, None, None, out, accumulate=True))
    else:
        ops.score_grad(Sums(grad, x, weight, _sign(n, k, sign, FP32), out, accumulate=True))


def codes_forward(m: int, n: int, k: int, dtype: torch.dtype, kind: str, masked: bool, bias: bool) -> None:
    """Multiply by codes; ``kind`` "nested": NF4 whose absmax are codes too. A frozen layer has no mask."""
    added = empty(n, dtype=dtype) if bias else None
    ops.product(empty(m, k, dtype=dtype), _codes(n, k, kind), Keep(words(n, k)) if masked else None, added)


def codes_d_x(m: int, n: int, k: int, dtype: torch.dtype, kind: str, masked: bool, bias: bool = False) -> None:
    """Compute d_x over codes; the bias does not matter."""
    keep = Keep(words(n, k)) if masked else None
    ops.product(empty(m, n, dtype=dtype), _codes(n, k, kind), keep, None, transposed=True)


def many_masks(
    m: int, n: int, k: int, dtype: torch.dtype, masks: int, bias: bool, tasks: torch.dtype = torch.int64
) -> None:
    """Multiply with one mask per row. 16 masks take the longest to compile."""
    x, _, weight = _operands(m, n, k, dtype)
    added = empty(n, dtype=dtype) if bias else None
    ops.product(x, weight, KeepByTask([words(n, k)] * masks, empty(m, dtype=tasks)), added)


def step(
    n: int,
    k: int,
    scores: torch.dtype,
    mode: str,
    weight: torch.dtype | None,
    grad: torch.dtype,
    moments: torch.dtype,
    scaled: bool,
    keep_ratio: float | None,
) -> None:
    """Do an optimiser step.

    Held layers ask for the next threshold and mask. MaskAdamW.step asks for neither: it has d_scores and no weight.
    ``scaled``: gradients are clipped.
    """
    of_scores, of_weight = empty(n, k, dtype=scores), None if weight is None else empty(n, k, dtype=weight)
    first, second = (empty(n, k, dtype=moments) for _ in range(2))
    scales = empty(2, -(-n * k // BLOCK), dtype=FP32) if moments == torch.uint8 else None
    asked: dict[str, Any] = {"step": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    asked |= {"grad_scale": empty(dtype=FP32) if scaled else None, "seed": 0, "mode": mode, "keep_ratio": keep_ratio}
    asked["threshold"] = None if keep_ratio is None else empty(dtype=scores)
    score_step.score_step(Update(of_scores, empty(n, k, dtype=grad), of_weight, first, second, scales, **asked))


def in_tf32(call: Callable[..., object]) -> Callable[..., object]:
    """Return the call under torch.set_float32_matmul_precision("high")."""

    def run(*given: Any) -> object:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            return call(*given)
        finally:
            matmul.fp32_precision = before

    return run


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a meta tensor."""
    return torch.empty(shape, dtype=dtype, device="meta")


def words(n: int, k: int) -> Tensor:
    """Return the words of a packed mask or of packed signs."""
    return empty(n, -(-k // 32), dtype=torch.int32)


def _keep(n: int, k: int, mask: Mask, by_row: bool = False) -> Keep:
    if isinstance(mask, str):
        return Keep(words(n, k), None, "packed")
    dtype, mode = mask
    return Keep(empty(n, k, dtype=dtype), empty(*[n] * by_row, dtype=dtype), mode)


def _operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, grad_output, weight."""
    return empty(m, k, dtype=dtype), empty(m, n, dtype=dtype), empty(n, k, dtype=dtype)


def _sign(n: int, k: int, told_by: str, dtype: torch.dtype | None) -> Tensor | None:
    """Return the source of the scores' sign in d_scores."""
    if told_by == "none":
        return None
    return words(n, k) if told_by == "bits" or dtype is None else empty(n, k, dtype=dtype)


def _codes(n: int, k: int, kind: str) -> Codes:
    name, scales = ("nf4", 4) if kind == "nested" else (kind, 1)
    form = FORMATS[name]
    absmax = [empty(*size, dtype=dtype) for _, size, dtype in form.scales_expected((n, k), scales)]
    return form(empty(*form.code_shape((n, k)), dtype=form.code_dtype), absmax, (n, k))
