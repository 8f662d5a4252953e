"""The oracle: every op in plain PyTorch, one function an op, on any device and in any floating dtype.

M tokens, N out_features, K in_features. ``scores`` and ``weight`` are (N, K); keep is ``|scores| >= threshold``
("magnitude") or ``scores >= threshold`` ("value"). Kernels take the same arguments and are checked against these
functions; arguments are trusted here, the public door in ``ops`` checks them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # x, weight, scores, bias; (0,) where not wanted

_WORD = 32  # bits of an int32 word of a packed mask
_AMX_ROW = 32  # 16-bit elements in a row of an AMX tile
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as a floating element


def kept_count(numel: int, keep_ratio: float) -> int:
    """k = numel - int((1 - keep_ratio) * numel): how many of ``numel`` weights a keep ratio keeps."""
    return numel - int((1 - keep_ratio) * numel)


def keep_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """Boolean (N, K): what is kept. Ties at the threshold, () or one a row (N,), are kept; a NaN score is dropped.

    threshold is of the scores' dtype.
    """
    if threshold.dim() == 1:
        threshold = threshold.unsqueeze(-1)
    kept = _keys(scores, mode) >= _keys(threshold, "value")
    return kept & ~(scores.isnan() | threshold.isnan())


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor, bias: Tensor | None, mode: str
) -> Tensor:
    """y = x @ where(keep, weight, 0).T + bias, (..., N) in x's dtype."""
    return linear(x, _select(weight, keep_mask(scores, threshold, mode)), bias)


def masked_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    mode: str,
    output_mask: list[bool],
) -> Gradients:
    """d_x, d_weight, d_scores and d_bias of masked_linear, straight through the comparison (arXiv 2503.22764)."""
    keep = keep_mask(scores, threshold, mode)
    return _backward(grad_output, x, weight, keep, scores, None, mode, output_mask)


def masked_linear_packed(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """masked_linear with the mask given as bits: packed is int32 (N, ceil(K / 32)), see pack_mask."""
    return linear(x, _select(weight, unpack_mask(packed, list(weight.shape))), bias)


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
    """Gradients of masked_linear_packed; the sign of the scores comes from the bits of ``signs`` where given."""
    keep = unpack_mask(packed, list(weight.shape))
    return _backward(grad_output, x, weight, keep, scores, signs, mode, output_mask)


def masked_linear_many(
    x: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor, bias: Tensor | None
) -> Tensor:
    """y[i] = masked_linear_packed of x[i] with masks[tasks[i]], with the whole weight for -1; all rows once a mask."""
    return _by_task(x, weight, masks, tasks, lambda masked: linear(x, masked, bias))


def masked_linear_many_backward(grad_output: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor) -> Tensor:
    """d_x of masked_linear_many."""
    return _by_task(grad_output, weight, masks, tasks, lambda masked: grad_of_linear(grad_output, masked))


def accumulate_score_grad(
    out: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor | None, signs: Tensor | None, mode: str
) -> None:
    """out += (grad_output.T @ x) * weight [* sign(scores) in magnitude mode], out (N, K)."""
    out += _score_grad(grad_output, x, weight, scores, signs, mode, out.dtype)


def accumulate_product(out: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """out += grad_output.T @ x, out (N, K)."""
    out += _weight_gradient(grad_output, x)


def kept_threshold(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """The k-th largest key (|scores|, or scores in value mode), 0-d in the scores' dtype.

    +inf when nothing is kept; NaN when any score is not finite, so that the caller sees it without reading the scores.
    """
    flat = scores.reshape(-1)
    kept = kept_count(flat.numel(), keep_ratio)
    kth = flat.new_full((), torch.inf)
    if kept:
        key = _kth_smallest(_keys(flat, mode), flat.numel() - kept + 1)
        kth = torch.where(key < 0, -key | torch.iinfo(key.dtype).min, key).view(scores.dtype)
    return torch.where(flat.isfinite().all(), kth, torch.nan)


def pack_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """keep as bits, int32 (N, ceil(K / 32)): bit j % 32 of word j // 32 of row n is keep[n, j]; padding bits are 0."""
    return pack_bits(keep_mask(scores, threshold, mode))


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(scores > 0 as bits like pack_mask, how many scores are exactly 0 as 0-d int64: those have no sign bit)."""
    signs = signs_of(scores)
    return pack_bits(signs > 0), ((signs == 0) & ~scores.isnan()).sum()


def unpack_mask(packed: Tensor, shape: list[int]) -> Tensor:
    """Boolean mask of ``shape`` (..., K) from its bits."""
    bits = (packed.unsqueeze(-1) >> torch.arange(_WORD, device=packed.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., : shape[-1]].bool()


def signs_of(scores: Tensor) -> Tensor:
    """sign(scores) as integers; that of NaN is 0."""
    return _keys(scores, "value").sign().masked_fill(scores.isnan(), 0)


def pack_bits(bits: Tensor) -> Tensor:
    """A boolean (N, K) as int32 words (N, ceil(K / 32)), lowest bit first."""
    rows, columns = bits.shape
    words = -(-columns // _WORD)
    padded = torch.nn.functional.pad(bits, (0, words * _WORD - columns)).view(rows, words, _WORD)
    # The sum runs in int64 and wraps into the sign bit of int32, which is bit 31.
    return (padded * (1 << torch.arange(_WORD, device=bits.device, dtype=torch.int64))).sum(-1).to(torch.int32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias, (..., N); see filled."""
    y = torch.nn.functional.linear(filled(_rows(x), 1), filled(weight, 1), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def grad_of_linear(grad_output: Tensor, weight: Tensor) -> Tensor:
    """d_x = grad_output @ weight, (..., K)."""
    d_x = filled(_rows(grad_output), 1) @ filled(weight, 0)
    return d_x.view(*grad_output.shape[:-1], weight.shape[1])


def filled(operand: Tensor, axis: int) -> Tensor:
    """A 2-d operand of one of torch's products, which sums over ``axis``, as every processor multiplies it rightly.

    A CPU with AMX (oneDNN 3.12, torch 2.13) reads rows of 16-bit elements on to the next multiple of 32 and multiplies
    what it finds there, in a pitch or in the next row, by 0; NaN and Inf come out. So its operands are contiguous, and
    long enough by zeros.
    """
    if operand.device.type != "cpu" or operand.element_size() != 2:
        return operand
    missing = -operand.shape[axis] % _AMX_ROW
    if missing == 0:
        return operand.contiguous()
    return torch.nn.functional.pad(operand, (0, missing) if axis == 1 else (0, 0, 0, missing))


def _keys(values: Tensor, mode: str) -> Tensor:
    """Integers in the order of the values, or of their magnitudes; -0 is 0, and NaN lies outside the infinities.

    A comparison of floats is the processor's: told to take subnormals for 0 (torch.set_flush_denormal), it finds ties.
    """
    bits = values.detach().view(_BITS[values.element_size()])
    magnitude = bits & torch.iinfo(bits.dtype).max
    return magnitude if mode == "magnitude" else torch.where(bits < 0, -magnitude, magnitude)


def _kth_smallest(keys: Tensor, k: int) -> Tensor:
    # Deterministic mode refuses kthvalue on a GPU: its index, not its value, depends on the order of threads.
    if torch.are_deterministic_algorithms_enabled():
        return keys.sort().values[k - 1]
    return keys.kthvalue(k).values


def _select(weight: Tensor, keep: Tensor) -> Tensor:
    # Select, never multiply: a dropped NaN or Inf contributes an exact +0.
    return torch.where(keep, weight, 0)


def _rows(x: Tensor) -> Tensor:
    # Not reshape(-1, ...): with no features the number of rows would be anyone's guess.
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _by_task(
    rows: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor, product: Callable[[Tensor], Tensor]
) -> Tensor:
    """Row i of product(weight masked by masks[tasks[i]]), NaN for a task that there is not; no task is waited for."""
    tasks = tasks.view(-1, *(1,) * (rows.dim() - 1))
    y = torch.where(tasks == -1, product(weight), torch.nan)
    for task, packed in enumerate(masks):
        y = torch.where(tasks == task, product(_select(weight, unpack_mask(packed, list(weight.shape)))), y)
    return y


def _weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """grad_output.T @ x, (N, K)."""
    return filled(_rows(grad_output), 0).T @ filled(_rows(x), 0)


def _backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    output_mask: list[bool],
) -> Gradients:
    grad = _rows(grad_output)
    d_x = d_weight = d_scores = d_bias = None
    if output_mask[0]:
        d_x = grad_of_linear(grad_output, _select(weight, keep))
    if output_mask[1]:
        d_weight = _select(_weight_gradient(grad_output, x), keep)
    if output_mask[2]:
        dtype = scores.dtype if scores is not None else torch.float32
        d_scores = _score_grad(grad_output, x, weight, scores, signs, mode, dtype)
    if output_mask[3]:
        d_bias = grad.sum(0)
    empty = [grad_output.new_empty(0) if g is None else g for g in (d_x, d_weight, d_scores, d_bias)]
    return empty[0], empty[1], empty[2], empty[3]


def _score_grad(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    dtype: torch.dtype,
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    d_scores = _weight_gradient(grad_output, x).to(wide)
    d_scores *= weight
    if mode == "magnitude":
        if signs is not None:
            d_scores *= unpack_mask(signs, list(weight.shape)).to(wide).mul_(2).sub_(1)
        else:
            assert scores is not None, "magnitude mode takes the sign from scores or signs"
            d_scores *= signs_of(scores)
    return d_scores.to(dtype)
