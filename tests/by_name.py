"""Call a backend's functions by the names and flat arguments of the ops, without checks: for tests of kernels."""

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mft_kernels.backends.gradients import by_two_functions
from mft_kernels.backends.table import registered
from mft_kernels.codes import FORMATS
from mft_kernels.operands import Backward, Experts, Keep, KeepByTask, Sums, Update


class ByName:
    """The ops of a backend. ``functions`` is a mapping like Backend.functions, or a module that has the functions."""

    def __init__(self, functions: Mapping[str, Callable] | Any) -> None:
        named = functions if isinstance(functions, Mapping) else vars(functions)
        self._f = SimpleNamespace(**named)
        if "gradients" not in named and {"product", "score_grad"} <= named.keys():
            self._f.gradients = functools.partial(by_two_functions, named["product"], named["score_grad"])

    def masked_linear(self, x, weight, scores, threshold, bias, mode, **how):
        return self._f.product(x, weight, Keep(scores, threshold, mode), bias, **how)

    def masked_linear_backward(self, grad_output, x, weight, scores, threshold, mode, output_mask, **how):
        keep, sign = Keep(scores, threshold, mode), _sign(scores, None, mode)
        return self._f.gradients(Backward(grad_output, x, weight, keep, sign, scores.dtype, output_mask), **how)

    def masked_linear_packed(self, x, weight, packed, bias, **how):
        return self._f.product(x, weight, Keep(packed), bias, **how)

    def masked_linear_packed_backward(self, grad_output, x, weight, packed, scores, signs, mode, output_mask, **how):
        sign, dtype = _sign(scores, signs, mode), torch.float32 if scores is None else scores.dtype
        return self._f.gradients(Backward(grad_output, x, weight, Keep(packed), sign, dtype, output_mask), **how)

    def masked_linear_many(self, x, weight, masks, tasks, bias):
        return self._f.product(x, weight, KeepByTask(masks, tasks), bias)

    def masked_linear_many_backward(self, grad_output, weight, masks, tasks):
        return self._f.product(grad_output, weight, KeepByTask(masks, tasks), None, transposed=True)

    def accumulate_score_grad(self, out, grad_output, x, weight, scores, signs, mode, **how):
        self._f.score_grad(Sums(grad_output, x, weight, _sign(scores, signs, mode), out, accumulate=True), **how)

    def accumulate_product(self, out, grad_output, x, **how):
        self._f.score_grad(Sums(grad_output, x, None, None, out, accumulate=True), **how)

    def kept_threshold(self, scores, keep_ratio, mode, **how):
        return self._f.select(scores, keep_ratio, mode, **how)

    def kept_thresholds(self, scores, keep_ratio, mode):
        return self._f.select(scores, keep_ratio, mode, each=True)

    def pack_mask(self, scores, threshold, mode, **how):
        return self._f.pack(scores, threshold, mode, **how)

    def pack_signs(self, scores, **how):
        return self._f.signs(scores, **how)

    def score_step(self, *fields, **named):
        return self._f.step(Update(*fields, **named))

    def dequantize(self, codes, absmax, shape, kind, dtype):
        return self._f.decode(FORMATS[kind](codes, absmax, shape), dtype)

    def masked_linear_quantized(self, x, codes, absmax, packed, bias, shape, kind):
        keep = None if packed is None else Keep(packed)
        return self._f.product(x, FORMATS[kind](codes, absmax, shape), keep, bias)

    def masked_linear_quantized_d_x(self, grad_output, codes, absmax, packed, shape, kind):
        keep = None if packed is None else Keep(packed)
        return self._f.product(grad_output, FORMATS[kind](codes, absmax, shape), keep, None, transposed=True)

    def grouped_product(self, x, weight, scores, threshold, packed, offsets, bias, mode, transposed):
        keep = Keep(packed) if packed is not None else Keep(scores, threshold, mode)
        return self._f.product(x, Experts(weight, offsets), keep, bias, transposed=transposed)

    def grouped_score_grad(self, out, grad_output, x, offsets, weight, scores, signs, mode, accumulate):
        sign = None if weight is None else _sign(scores, signs, mode)
        self._f.score_grad(Sums(grad_output, x, weight, sign, out, accumulate, offsets))


def _sign(scores: Tensor | None, signs: Tensor | None, mode: str) -> Tensor | None:
    if mode == "value":
        return None
    return scores if signs is None else signs


def backend(name: str) -> ByName:
    """Return the ops of a registered backend."""
    found = registered(name)
    return ByName(found.functions)


oracle = backend("reference")
