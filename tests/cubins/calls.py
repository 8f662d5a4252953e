"""Calls of the hot path on memory that nobody reads or writes: only their launches matter."""

from collections.abc import Callable

import torch
from by_name import ByName
from torch import Tensor

from mft_kernels.backends.triton import bits, ops, score_step, scratch, select
from mft_kernels.operands import Keep, Update
from mft_kernels.reference.step import BLOCK

flat = ByName(ops)

BF16 = torch.bfloat16


def packed_forward(m: int, n: int, k: int, has_bias: bool = False) -> Callable[[], Tensor]:
    x, weight = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16)
    packed, bias = torch.empty(n, k // 32, dtype=torch.int32), torch.empty(n, dtype=BF16) if has_bias else None
    return lambda: flat.masked_linear_packed(x, weight, packed, bias)


def scores_forward(m: int, n: int, k: int) -> Callable[[], Tensor]:
    x, weight = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16)
    scores, threshold = torch.empty(n, k), torch.empty(())
    return lambda: flat.masked_linear(x, weight, scores, threshold, None, "magnitude")


def both_gradients(m: int, n: int, k: int) -> Callable[[], Tensor]:
    x, grad, weight = (torch.empty(*shape, dtype=BF16) for shape in ((m, k), (m, n), (n, k)))
    packed, signs = (torch.empty(n, k // 32, dtype=torch.int32) for _ in range(2))
    wanted = [True, False, True, False]
    return lambda: flat.masked_linear_packed_backward(grad, x, weight, packed, None, signs, "magnitude", wanted)[2]


def rows_of_many_masks(m: int, n: int, k: int, masks: int) -> Callable[[], Tensor]:
    x, weight, tasks = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16), torch.zeros(m, dtype=torch.int32)
    packed = [torch.empty(n, k // 32, dtype=torch.int32) for _ in range(masks)]
    return lambda: flat.masked_linear_many(x, weight, packed, tasks, None)


def step(n: int, k: int) -> Callable[..., Tensor]:
    scores, weight, grad = torch.empty(n, k, dtype=torch.int16), torch.empty(n, k, dtype=BF16), torch.empty(n, k)
    first, second = (torch.empty(n, k, dtype=torch.uint8) for _ in range(2))
    scales, threshold = torch.empty(2, -(-n * k // BLOCK)), torch.zeros((), dtype=torch.int16)
    adam = {"step": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    asked = {"grad_scale": None, "seed": 2**40, "mode": "magnitude", "keep_ratio": 0.9, "threshold": threshold}
    given = scores, grad, weight, first, second, scales
    return lambda **other: score_step.score_step(Update(*given, **adam | other, **asked))[1]


def both_gradients_by_value(m: int, n: int, k: int) -> Callable[[], Tensor]:
    x, grad, weight, scores = (torch.empty(*shape) for shape in ((m, k), (m, n), (n, k), (n, k)))
    wanted = [True, False, True, False]
    return lambda: flat.masked_linear_backward(grad, x, weight, scores, torch.empty(()), "value", wanted)[2]


def sums(m: int, n: int, k: int) -> Callable[[], Tensor]:
    x, grad, out = torch.empty(m, k, dtype=BF16), torch.empty(m, n, dtype=BF16), torch.empty(n, k, dtype=BF16)
    return lambda: flat.accumulate_product(out, grad, x) or out


def over_codes(m: int, n: int, k: int, kind: str, forward: bool, has_bias: bool = True) -> Callable[[], Tensor]:
    """Return a forward or d_x over codes. kind "nested": NF4 whose absmax are codes too."""
    codes, absmax = torch.empty(n * k // 2, dtype=torch.uint8), [torch.empty(n * k // 64)]
    if kind == "nested":
        absmax = [
            torch.empty(n * k // 64, dtype=torch.uint8),
            *(torch.empty(shape) for shape in (n * k // 2**14, 256, ())),
        ]
    elif kind == "int8":
        codes, absmax = torch.empty(n, k, dtype=torch.int8), [torch.empty(n)]
    packed, levels = torch.empty(n, k // 32, dtype=torch.int32), "int8" if kind == "int8" else "nf4"
    if not forward:
        grad = torch.empty(m, n, dtype=BF16)
        return lambda: flat.masked_linear_quantized_d_x(grad, codes, absmax, packed, [n, k], levels)
    x, bias = torch.empty(m, k, dtype=BF16), torch.empty(n, dtype=BF16) if has_bias else None
    return lambda: flat.masked_linear_quantized(x, codes, absmax, packed, bias, [n, k], levels)


def before_scratch(n: int, k: int) -> Callable[[], Tensor]:
    weight, keep = torch.empty(n, k), Keep(torch.empty(n, k), torch.empty(()), "value")
    return lambda: scratch.masked_weight(weight, keep)


def every_call() -> dict[str, Callable[[], Tensor]]:
    return {
        "packed": packed_forward(1, 512, 1024),
        "packed, bias": packed_forward(100, 512, 1024, True),
        "packed, a single part": packed_forward(600, 4096, 128),
        "packed, words at no multiple of 16": packed_forward(20, 256, 576, True),
        "scores": scores_forward(70, 512, 1024),
        "scores, packed first": scores_forward(4096, 4096, 4096),
        "both gradients": both_gradients(32, 512, 1024),
        "threshold": lambda: select.kept_threshold(torch.empty(64, 512, dtype=BF16), 0.9, "magnitude"),
        "rows of many masks": rows_of_many_masks(8, 512, 1024, 3),
        "step": step(64, 512),
        "both gradients by value, fp32": both_gradients_by_value(16, 512, 512),
        "sums": sums(32, 512, 1024),
        "nf4": over_codes(1, 512, 1024, "nf4", True),
        "nested nf4, d_x": over_codes(40, 512, 512, "nested", False),
        "int8": over_codes(40, 512, 1024, "int8", True),
        "before a product through scratch": before_scratch(512, 512),
        "signs": lambda: bits.pack_signs(torch.empty(64, 512))[0],
        "mask": lambda: bits.pack_mask(torch.empty(64, 512), torch.empty(()), "magnitude"),
    }
