"""The oracle of quantised weights: codes and absmax decoded as bitsandbytes 0.50 does, then as reference.py does.

    nf4   w[i] = NF4[code[i]] * absmax[i // 64]    i over the whole matrix; two codes a byte, the first in the high bits
    int8  w[n, k] = code[n, k] * (absmax[n] / 127)

In fp32, rounded once to the dtype of the tokens. ``packed`` None: every weight is kept.

``absmax`` is a list: of the one tensor, or of the four of bitsandbytes' double quantisation, (codes, nested, map,
offset): absmax[b] = map[codes[b]] * nested[b // 256] + offset, in fp32.
"""

import torch
from torch import Tensor

from .linear import filled, unpack_mask

NF4_BLOCK = 64  # weights that share an absmax
NESTED_BLOCK = 256  # codes of an absmax that share one
INT8_LARGEST = 127
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dequantize(codes: Tensor, absmax: list[Tensor], shape: list[int], kind: str, dtype: torch.dtype) -> Tensor:
    """The dense (N, K) of ``dtype``."""
    if kind == "int8":
        return (codes * (absmax[0] / INT8_LARGEST)[:, None]).to(dtype)
    numel = shape[0] * shape[1]
    levels = torch.tensor(NF4, device=codes.device)
    both = torch.stack((codes.view(-1) >> 4, codes.view(-1) & 15), 1).view(-1)[:numel]
    return (levels[both.int()] * plain_absmax(absmax).repeat_interleave(NF4_BLOCK)[:numel]).to(dtype).view(shape)


def plain_absmax(absmax: list[Tensor]) -> Tensor:
    """fp32, one a block of weights."""
    if len(absmax) == 1:
        return absmax[0]
    codes, nested, levels, offset = absmax
    return levels[codes.int()] * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


def masked_linear_quantized(
    x: Tensor,
    codes: Tensor,
    absmax: list[Tensor],
    packed: Tensor | None,
    bias: Tensor | None,
    shape: list[int],
    kind: str,
) -> Tensor:
    """y = x @ where(mask, decoded, 0).T + bias, (..., N) in x's dtype."""
    weight = _kept(dequantize(codes, absmax, shape, kind, x.dtype), packed)
    y = torch.nn.functional.linear(filled(_rows(x), 1), filled(weight, 1), bias)
    return y.view(*x.shape[:-1], shape[0])


def masked_linear_quantized_d_x(
    grad_output: Tensor, codes: Tensor, absmax: list[Tensor], packed: Tensor | None, shape: list[int], kind: str
) -> Tensor:
    """d_x = grad_output @ where(mask, decoded, 0), (..., K) in grad_output's dtype."""
    weight = _kept(dequantize(codes, absmax, shape, kind, grad_output.dtype), packed)
    return (filled(_rows(grad_output), 1) @ filled(weight, 0)).view(*grad_output.shape[:-1], shape[1])


def _kept(weight: Tensor, packed: Tensor | None) -> Tensor:
    return weight if packed is None else torch.where(unpack_mask(packed, list(weight.shape)), weight, 0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
