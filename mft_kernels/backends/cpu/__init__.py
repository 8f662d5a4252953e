"""The cpu backend: calls the C++ library of csrc/, with arguments made 2-d and contiguous.

The library picks AMX, AVX-512 with bf16 dot products, AVX-512, AVX2 or portable code when it runs. The environment
variable MFT_CPU_CAPABILITY (one of ``capabilities()``) overrides that, for tests and comparisons. choice.py chooses the
path of each product.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ... import reference
from ...codes import Codes, Int8, Table
from ...operands import (
    MODES,
    MOST_MASKS,
    Experts,
    Keep,
    KeepByTask,
    Sums,
    Update,
    Weight,
    as_rows,
    contiguous,
    scores_and_signs,
)
from ...reference.fixed_point import selectable
from ...reference.linear import grad_of_linear, kept_count
from .. import built
from ..autotune import AUTOTUNE, measuring
from ..built import load
from ..table import Backend, register
from .choice import grad_product_of, measured_path, product_of
from .in_place import drop, put_aside, put_back


def product(
    a: Tensor, weight: Weight, keep: Keep | KeepByTask | None, bias: Tensor | None, *, transposed: bool = False
) -> Tensor:
    """Compute a @ where(keep, weight, 0).T + bias, without the .T if transposed; see the reference."""
    if isinstance(keep, KeepByTask):
        assert isinstance(weight, Tensor), "a mask per row needs a dense matrix"
        return _product_by_task(a, weight, keep, bias, transposed)
    if isinstance(weight, Codes):
        return _product_of_codes(a, weight, keep, bias, transposed)
    assert keep is not None, "only quantised weights are multiplied without a mask"
    if isinstance(weight, Experts):
        return _product_of_experts(a, weight, keep, bias, transposed)
    return _product_of_matrix(a, weight, keep, bias, transposed)


def score_grad(sums: Sums) -> None:
    """Compute d_scores = [d_scores +] (grad_output.T @ x) [* weight] [* sign] without a temporary of that size."""
    grad, x = as_rows(sums.grad_output).contiguous(), as_rows(sums.x).contiguous()
    weight, d_scores = sums.weight, sums.d_scores
    sign = scores_and_signs(contiguous(sums.sign))
    if sums.offsets is not None:
        built.cpu_ops.grouped_score_grad_(
            d_scores, grad, x, sums.offsets.contiguous(), weight, *sign, sums.accumulate, "auto"
        )
        return
    if sums.d_weight is not None:
        assert sums.keep is not None
        sums.d_weight.copy_(built.cpu_ops.grad_weight(grad, x, *_mask(sums.keep), sums.keep.magnitude))
    if d_scores is not None:
        _grad_scores(d_scores, (grad, x, contiguous(weight), *sign), accumulate=sums.accumulate)


def select(scores: Tensor, keep_ratio: float, mode: str, *, each: bool = False) -> Tensor:
    """Return the k-th largest key, nearly always in one pass: +inf if nothing is kept, NaN if a score is not finite."""
    matrices = scores if each else scores.reshape(1, -1)
    kept = kept_count(matrices[0].numel(), keep_ratio)
    found = built.cpu_ops.kept_thresholds(matrices.contiguous(), kept, mode == "magnitude")
    return found if each else found.squeeze(0)


def pack(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """Return keep as bits, int32 (N, ceil(K / 32)). threshold is () or (N,), one per row."""
    return built.cpu_ops.pack_mask(scores.contiguous(), threshold.contiguous(), mode == "magnitude")


def signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores > 0 as bits, and how many scores are exactly 0."""
    return built.cpu_ops.pack_signs(scores.contiguous())


def step(update: Update) -> tuple[Tensor, Tensor]:
    """Step in one pass over gradient, weight, scores and moments, which also finds the next threshold.

    A second pass packs the mask. There is another one if the threshold before the step is not given, or is more than
    3 % away from the next.
    """
    update = update.on_host()
    scores, (decay, step_size, correction) = update.scores, update.rates
    found = built.cpu_ops.score_step_(
        *update.tensors(),
        *(update.step, step_size, update.beta1, update.beta2, correction, update.eps, decay),
        *(update.grad_scale, update.seed),
        update.magnitude and update.weight is not None,
        -1 if update.keep_ratio is None else kept_count(scores.numel(), update.keep_ratio),
        update.magnitude,
        update.threshold,
    )
    if update.keep_ratio is None:
        return scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)
    return found, built.cpu_ops.pack_mask(selectable(scores), selectable(found), update.magnitude)


def decode(weight: Codes, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix (N, K) of ``dtype``."""
    dense = torch.empty(tuple(weight.shape), dtype=dtype)
    built.cpu_ops.dequantize_(dense, *_codes(weight), *_table(weight))
    return dense


def capabilities() -> list[str]:
    """Return the instruction sets that can run here, best first; [] without the library."""
    return [] if unavailable is not None else built.cpu_ops.capabilities().split(",")


# What runs with each instruction set, best first, in words for users.
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
    """Return lines "name: reason", which say why each better instruction set is not the one taken."""
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
    """Return the path that products take here and now, as in "amx: tiles and ...", and lines of capability_reasons.

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


def _mask(keep: Keep) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (scores, threshold, packed) as the library takes them for one matrix.

    Scores with a threshold per row are packed into bits first.
    """
    if keep.thresholds is not None and keep.by_row and keep.source.dim() == 2:
        return None, None, pack(keep.source, keep.thresholds, keep.mode)
    return contiguous(keep.scores), contiguous(keep.thresholds), contiguous(keep.words)


def _codes(weight: Codes) -> tuple[Tensor, list[Tensor]]:
    return weight.codes.contiguous(), [each.contiguous() for each in weight.scales]


def _table(weight: Codes) -> tuple[Tensor | None, int]:
    """Return levels, and how many weights share a scale, as the library takes them; (None, 0) for int8."""
    return (weight.levels_on(weight.codes.device), weight.block) if isinstance(weight, Table) else (None, 0)


def _product_of_matrix(a: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, transposed: bool) -> Tensor:
    weight = weight.contiguous()
    if transposed:
        given = (a.contiguous(), weight, *_mask(keep), keep.magnitude)
        return _by_path("d_x", built.cpu_ops.grad_x, given, keep.source)
    operands = (a.contiguous(), weight, *_mask(keep), contiguous(bias), keep.magnitude)
    return _by_path("forward", built.cpu_ops.masked_linear, operands, keep.source)


def _product_of_experts(a: Tensor, weight: Experts, keep: Keep, bias: Tensor | None, transposed: bool) -> Tensor:
    """Multiply each expert like a matrix, by the path that the library's model chooses for its rows.

    If there are several experts, each thread takes whole experts, so that no expert is waited for. A weight that is not
    contiguous is made so one expert at a time, and only if that expert has rows.
    """
    mask, offsets, bias = _mask(keep), weight.offsets.contiguous(), contiguous(bias)
    return built.cpu_ops.grouped_product(
        a.contiguous(), weight.matrices, *mask, offsets, bias, keep.magnitude, transposed, "auto"
    )


def _product_of_codes(a: Tensor, weight: Codes, keep: Keep | None, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the product with the decoded weight, bit for bit. It is decoded in parts, where it is masked."""
    words = None if keep is None else contiguous(keep.words)
    how = *weight.shape, *_table(weight), "auto"
    if not transposed:
        return built.cpu_ops.masked_linear_quantized(a.contiguous(), *_codes(weight), words, contiguous(bias), *how)
    return built.cpu_ops.grad_x_quantized(a.contiguous(), *_codes(weight), words, *how)


def _product_by_task(a: Tensor, weight: Tensor, keep: KeepByTask, bias: Tensor | None, transposed: bool) -> Tensor:
    """Multiply few rows in one pass over the weight, and many rows by one product per mask."""
    if transposed:
        return _d_x_by_task(a, weight, keep)
    masks, tasks = [packed.contiguous() for packed in keep.masks], keep.tasks.to(torch.int64).contiguous()
    y = built.cpu_ops.try_masked_linear_many(a.contiguous(), weight, masks, tasks, contiguous(bias), "auto")
    return reference.product(a, weight, KeepByTask(masks, tasks), bias) if y is None else y  # None if it is empty


def _d_x_by_task(grad_output: Tensor, weight: Tensor, keep: KeepByTask) -> Tensor:
    """Compute one product per mask."""
    places: dict[int, list[int]] = {}
    for place, task in enumerate(keep.tasks.tolist()):
        places.setdefault(task, []).append(place)
    d_x = grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))
    for task, each in places.items():
        rows = grad_output if len(places) == 1 else grad_output[torch.tensor(each)]
        if task < 0:
            of_task = grad_of_linear(rows, weight)
        else:
            of_task = _product_of_matrix(rows, weight, Keep(keep.masks[task]), None, True)
        if len(places) == 1:
            return of_task
        d_x[torch.tensor(each)] = of_task
    return d_x


def _by_path(name: str, op: Callable[..., Tensor], operands: tuple, mask: Tensor) -> Tensor:
    """Compute the forward pass or d_x by the path that is chosen. Operands begin with tokens and weight."""
    path = "auto"
    if measuring():
        asked = product_of(name, operands[0], operands[1], mask)
        path = measured_path(asked, lambda: lambda path: op(*operands, path))
    return op(*operands, path)


def _grad_scores(out: Tensor, operands: tuple, *, accumulate: bool) -> None:
    """Compute d_scores by the path that is chosen. ``operands``: grad_output, x, weight, scores, signs."""
    path = "auto"
    if measuring():

        def prepare() -> Callable[[str], None]:
            aside = torch.zeros_like(out)  # out itself must get the sum only once
            return lambda path: built.cpu_ops.grad_scores_(aside, *operands, accumulate, path)

        _, x, weight, scores, signs = operands
        sign = scores if signs is None else signs
        path = measured_path(grad_product_of(out, x, weight, sign, accumulate=accumulate), prepare)
    built.cpu_ops.grad_scores_(out, *operands, accumulate, path)


def _try_accumulate_product(out, grad_output, x, *rest) -> bool:
    weight, scores, signs, mode = rest
    usual = weight is scores is signs is None and mode in MODES
    return usual and built.cpu_ops.try_accumulate_product.default(out, grad_output, x)


def _try_masked_linear_many(x, weight, masks, tasks, bias) -> Tensor | None:
    usual = type(masks) in (list, tuple) and len(masks) <= MOST_MASKS
    if not usual or not all(type(each) is Tensor for each in (tasks, *masks)):
        return None
    return built.cpu_ops.try_masked_linear_many.default(x, weight, masks, tasks, bias, "short")


def _short() -> dict[str, Callable]:
    """Return the short way of each op: it checks in C++, and declines an unusual call with None, [] or False."""
    ops = built.cpu_ops
    return {
        "masked_linear": ops.try_masked_linear.default,
        "masked_linear_backward": ops.try_masked_linear_backward.default,
        "masked_linear_packed": ops.try_masked_linear_packed.default,
        "masked_linear_packed_backward": ops.try_masked_linear_packed_backward.default,
        "accumulate_score_grad": _try_accumulate_product,
        "masked_linear_many": _try_masked_linear_many,
    }


def try_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return x @ weight.T + bias, without a gradient; None if the call is unusual, so that torch has to serve it."""
    return None if unavailable else built.cpu_ops.try_masked_linear_packed.default(x, weight, None, bias)


unavailable = load("cpu")

register(
    Backend(
        name="cpu",
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        functions={
            f.__name__: f for f in (product, score_grad, select, pack, signs, step, decode, put_aside, put_back, drop)
        },
        takes=frozenset({Table, Int8, Experts, KeepByTask}),
        short={} if unavailable else _short(),
        unavailable=unavailable,
        detail="" if unavailable else f"C++, {built.cpu_ops.capability()}",
    )
)
