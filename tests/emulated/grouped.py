"""The kernels of products over experts on CPU tensors, called like reference_grouped; see emulated."""

import ctypes

import torch
from torch import Tensor

from . import (
    GroupedProduct,
    GroupedScoreGrad,
    Keep,
    Matrix,
    Product,
    ScoreGrad,
    Sign,
    _call,
    _matrix,
    _new,
    _nowhere,
    _words,
    library,
)


def grouped_product(
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    threshold: Tensor | None,
    packed: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    mode: str,
    transposed: bool,
    **device,
) -> Tensor:
    out = _new((len(x), weight.shape[2 if transposed else 1]), x.dtype)
    asked = product(x, weight, scores, threshold, packed, offsets, bias, mode, transposed, out)
    asked.of.tokens = device.pop("tokens", 0)
    _call("grouped_product_sm90" if device.get("arch") == "sm_90" else "grouped_product", asked, device)
    return out


def product(x, weight, scores, threshold, packed, offsets, bias, mode, transposed, out) -> GroupedProduct:
    """Return the arguments of the product; ``out`` is the result."""
    if packed is not None:
        keep = Keep(words=_words(packed))
    else:
        keep = Keep(scores=_matrix(scores[0]), thresholds=threshold.data_ptr(), magnitude=mode == "magnitude")
    one = Product(out=_matrix(out), weight=_matrix(weight[0]), keep=keep, transposed=transposed)
    setattr(one, "in", _matrix(x))
    one.bias = None if bias is None else bias.data_ptr() or _nowhere()
    return GroupedProduct(one, *_groups(offsets, weight, scores))


def grouped_score_grad(
    out: Tensor,
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    accumulate: bool,
    **device,
) -> None:
    sign = Sign()
    if weight is not None and mode == "magnitude":
        sign = Sign(words=_words(signs)) if signs is not None else Sign(scores=_matrix(scores[0]))
    of_x, factor = _matrix(x), _matrix(out[0])
    one = ScoreGrad(
        d_scores=_matrix(out[0]),
        grad_output=_matrix(grad_output),
        x=of_x,
        weight=Matrix(None, of_x.type, factor.rows, factor.columns, 0) if weight is None else _matrix(weight[0]),
        sign=sign,
        accumulate=accumulate,
    )
    _call("grouped_score_grad", GroupedScoreGrad(one, *_groups(offsets, weight, scores)), device)


def tokens_of(asked: GroupedProduct) -> int:
    """Return the number of tokens of a tile."""
    return library().emulated_grouped_tokens(ctypes.byref(asked))


def _groups(offsets: Tensor, weight: Tensor | None, scores: Tensor | None) -> tuple[int, ...]:
    assert offsets.dtype == torch.int32
    assert offsets.is_contiguous()
    strides = (0 if t is None else t.stride(0) for t in (weight, scores))
    return offsets.data_ptr(), len(offsets), *strides
