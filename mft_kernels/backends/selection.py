"""Compute a whole selection by a backend's three functions "select", "pack" and "signs"."""

from collections.abc import Callable

import torch
from torch import Tensor

Selection = tuple[Tensor, Tensor, Tensor, Tensor]  # threshold, packed mask, packed signs, number of zeros


def select_by_pieces(
    select: Callable,
    pack: Callable,
    signs: Callable,
    scores: Tensor,
    keep_ratio: float,
    threshold: Tensor | None,
    mode: str,
    with_signs: bool,
) -> Selection:
    """Return what select_mask of ops/select.py returns, for floating scores. ``threshold``: a fixed one, ()."""
    rows = scores.flatten(0, -2)
    if threshold is not None:
        of_rows = threshold
    elif scores.dim() == 2:
        of_rows = threshold = select(scores, keep_ratio, mode)
    else:
        threshold = select(scores, keep_ratio, mode, each=True)
        of_rows = threshold.repeat_interleave(scores.shape[1])
    packed = pack(rows, of_rows, mode)
    shape = (*scores.shape[:-1], packed.shape[1])
    if not with_signs:
        return threshold, packed.view(shape), packed.new_empty(0), packed.new_zeros((), dtype=torch.int64)
    words, zeros = signs(rows)
    return threshold, packed.view(shape), words.view(shape), zeros
