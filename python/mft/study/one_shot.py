"""Masks found in one shot, without training: the same share of every matrix is kept, where importance is largest."""

import dataclasses

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.config import MaskConfig
from mft.importance.importance import importance
from mft.importance.scores import as_stored, dense_ranks
from mft.masks.convert import check_unmasked, mask_model, masked_modules
from mft.masks.targets import select_targets

_ONE = 0x3F800000  # the bits of 1.0 in fp32; from there on 2^30 finite floats follow in order


def one_shot_mask(
    model: nn.Module, mask: MaskConfig, method: str, dataset, *, rows: int = 64, batch_size: int = 4
) -> nn.Module:
    """mask_model with the mask that ``method`` finds on the layers that ``mask`` chooses, at its keep_ratio and seed.

    Equal importance is kept or dropped together, except by wanda, where the first column goes last: each output row
    keeps exactly K - int((1 - keep_ratio) * K) weights. The scores are ranks, not for training
    (see initialise_scores); init, mode and scores_dtype of ``mask`` play no part.

    Returns: the same model. Raises: ValueError as importance and mask_model do, or if mask.threshold or mask.budget is
        given.
    """
    for name in ("threshold", "budget"):
        value = getattr(mask, name)
        check_rule(value is None, f"mask.{name}", "be null for a one-shot mask: give keep_ratio", value)
    check_unmasked(model)
    names = select_targets(model, mask)
    found = importance(model, names, method, dataset, rows=rows, batch_size=batch_size, seed=mask.seed)
    mask_model(model, dataclasses.replace(mask, mode="magnitude", init="constant", scores_dtype="float32"))
    with torch.no_grad():
        for name, module in masked_modules(model).items():
            ranks = _row_ranks if method == "wanda" else _ranks
            module.scores.copy_(as_stored(module, ranks(found.pop(name))))
    return model


def _ranks(values: Tensor) -> Tensor:
    """fp32 in the order of values and equal where they are: the n-th float from 1 for the n-th value, exact to 2^30."""
    return (dense_ranks(values).int() + _ONE).view(torch.float32)


def _row_ranks(values: Tensor) -> Tensor:
    """1 to K within each row, fp32 (exact to K = 2^24); of equal values the first column's is the largest.

    One cut of the whole matrix then falls at the same rank in every row.
    """
    order = values.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(values.shape[-1], 0, -1, device=values.device, dtype=torch.float32)
    return torch.empty_like(values, dtype=torch.float32).scatter_(-1, order, ranks.expand_as(values))
