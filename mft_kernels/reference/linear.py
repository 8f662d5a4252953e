"""Parts of the reference: thresholds, packed masks and signs, and products that are correct on every processor.

keep is ``|scores| >= threshold`` ("magnitude") or ``scores >= threshold`` ("value").
"""

import torch
from torch import Tensor

from ..operands import as_rows

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, scores, bias; (0,) if not wanted

_WORD = 32  # bits of an int32 word of a packed mask
_AMX_ROW = 32  # 16-bit elements in a row of an AMX tile
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a floating element


def kept_count(numel: int, keep_ratio: float) -> int:
    """Return k = numel - int((1 - keep_ratio) * numel): how many of ``numel`` weights a keep ratio keeps."""
    return numel - int((1 - keep_ratio) * numel)


def keep_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """Return the boolean mask (N, K) of what is kept. Ties at the threshold are kept; a NaN score is dropped.

    threshold is () or (N,), one per row, in the scores' dtype.
    """
    if threshold.dim() == 1:
        threshold = threshold.unsqueeze(-1)
    kept = _keys(scores, mode) >= _keys(threshold, "value")
    return kept & ~(scores.isnan() | threshold.isnan())


def kept_threshold(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """Return the k-th largest key (|scores|, or scores in value mode), 0-d in the scores' dtype.

    It is +inf if nothing is kept. It is NaN if any score is not finite, so that the caller need not read the scores.
    """
    flat = scores.reshape(-1)
    kept = kept_count(flat.numel(), keep_ratio)
    kth = flat.new_full((), torch.inf)
    if kept:
        key = _kth_smallest(_keys(flat, mode), flat.numel() - kept + 1)
        kth = torch.where(key < 0, -key | torch.iinfo(key.dtype).min, key).view(scores.dtype)
    return torch.where(flat.isfinite().all(), kth, torch.nan)


def pattern_mask(scores: Tensor, keep_ratio: float, mode: str, pattern: str) -> Tensor:
    """Return the boolean mask (N, K) that keeps equally many of the largest keys in each group of adjacent inputs.

    pattern "row": a group is a row, which keeps kept_count(K, keep_ratio). "N:M": a group is M inputs, which keep N.
    Among equal keys the first columns are kept.
    """
    kept, size = kept_count(scores.shape[1], keep_ratio), scores.shape[1]
    if pattern != "row":
        kept, size = map(int, pattern.split(":"))
    if not kept or not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    keys = _keys(scores, mode).reshape(-1, size)
    last = _kth_smallest(keys, size - kept + 1).unsqueeze(-1)
    above, ties = keys > last, keys == last
    return (above | (ties & (ties.cumsum(-1) <= kept - above.sum(-1, keepdim=True)))).view(scores.shape)


def pack_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """Return keep as bits, int32 (N, ceil(K / 32)): bit j % 32 of word j // 32 of row n is keep[n, j].

    Padding bits are 0.
    """
    return pack_bits(keep_mask(scores, threshold, mode))


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores > 0 as bits, in the layout of pack_mask, and how many scores are exactly 0, as 0-d int64.

    A score of 0 has no sign bit.
    """
    signs = signs_of(scores)
    return pack_bits(signs > 0), ((signs == 0) & ~scores.isnan()).sum()


def unpack_mask(packed: Tensor, shape: list[int]) -> Tensor:
    """Return the boolean mask of ``shape`` (..., K) from its bits."""
    bits = (packed.unsqueeze(-1) >> torch.arange(_WORD, device=packed.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., : shape[-1]].bool()


def signs_of(scores: Tensor) -> Tensor:
    """Return sign(scores) as integers; the sign of NaN is 0."""
    return _keys(scores, "value").sign().masked_fill(scores.isnan(), 0)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack a boolean (N, K) into int32 words (N, ceil(K / 32)), lowest bit first."""
    rows, columns = bits.shape
    words = -(-columns // _WORD)
    padded = torch.nn.functional.pad(bits, (0, words * _WORD - columns)).view(rows, words, _WORD)
    # The sum runs in int64 and wraps into the sign bit of int32, which is bit 31.
    return (padded * (1 << torch.arange(_WORD, device=bits.device, dtype=torch.int64))).sum(-1).to(torch.int32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y = x @ weight.T + bias, (..., N); see filled."""
    y = torch.nn.functional.linear(filled(as_rows(x), 1), filled(weight, 1), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def grad_of_linear(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Compute d_x = grad_output @ weight, (..., K)."""
    d_x = filled(as_rows(grad_output), 1) @ filled(weight, 0)
    return d_x.view(*grad_output.shape[:-1], weight.shape[1])


def weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """Compute grad_output.T @ x, (N, K)."""
    return filled(as_rows(grad_output), 0).T @ filled(as_rows(x), 0)


def filled(operand: Tensor, axis: int) -> Tensor:
    """Return a 2-d operand for a torch product that sums over ``axis``, so that every processor computes it correctly.

    A CPU with AMX (oneDNN 3.12, torch 2.13) reads rows of 16-bit elements up to the next multiple of 32. It multiplies
    what it finds there, between rows or in the next row, by 0. NaN and Inf there spoil the result. So 16-bit operands
    on a CPU are made contiguous and filled up with zeros.
    """
    if operand.device.type != "cpu" or operand.element_size() != 2:
        return operand
    missing = -operand.shape[axis] % _AMX_ROW
    if missing == 0:
        return operand.contiguous()
    return torch.nn.functional.pad(operand, (0, missing) if axis == 1 else (0, 0, 0, missing))


def _keys(values: Tensor, mode: str) -> Tensor:
    """Return integers in the order of the values, or of their magnitudes. -0 is 0, and NaN lies outside the infinities.

    Comparing floats depends on the processor's mode: with torch.set_flush_denormal, subnormals tie with 0.
    """
    bits = values.detach().view(_BITS[values.element_size()])
    magnitude = bits & torch.iinfo(bits.dtype).max
    return magnitude if mode == "magnitude" else torch.where(bits < 0, -magnitude, magnitude)


def _kth_smallest(keys: Tensor, k: int) -> Tensor:
    """Return the k-th smallest key of each row, or of all if keys has one dimension."""
    # Deterministic mode refuses kthvalue on a GPU: its index, not its value, depends on the order of threads.
    if torch.are_deterministic_algorithms_enabled():
        return keys.sort().values[..., k - 1]
    return keys.kthvalue(k).values
