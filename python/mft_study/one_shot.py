"""Masks found in one shot, without training: keep the same share of every matrix, where importance is largest."""

import dataclasses

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.config import MaskConfig
from mft.importance.importance import importance
from mft.importance.initial_scores import dense_ranks, storage_layout
from mft.masks.convert import check_unmasked, mask_model, masked_modules
from mft.masks.targets import select_targets

_ONE = 0x3F800000  # the bits of 1.0 in fp32; about 2^30 finite floats follow it in order


def one_shot_mask(
    model: nn.Module, mask: MaskConfig, method: str, dataset, *, rows: int = 64, batch_size: int = 4
) -> nn.Module:
    """Mask a model as mask_model does, with the mask that ``method`` finds at the keep_ratio and seed of ``mask``.

    Weights of equal importance are kept or dropped together. wanda is the exception: each output row keeps exactly
    K - int((1 - keep_ratio) * K) weights, and among equal ones the first column is dropped last. With a mask.pattern
    other than matrix all methods keep the first of equal ones, and as many as the pattern says. The scores are ranks,
    not meant for training (see initialise_scores). init, mode and scores_dtype of ``mask`` have no effect.

    Returns: the same model.
    Raises: ValueError as importance and mask_model do, or if mask.threshold or mask.budget is given.
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
            module.scores.copy_(storage_layout(module, ranks(found.pop(name))))
    return model


def _ranks(values: Tensor) -> Tensor:
    """Return fp32 ranks, equal for equal values: the n-th float after 1 for the n-th value. Exact to 2^30 values."""
    return (dense_ranks(values).int() + _ONE).view(torch.float32)


def _row_ranks(values: Tensor) -> Tensor:
    """Return fp32 ranks 1 to K within each row, exact to K = 2^24. Among equal values the first is highest."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(values.shape[-1], 0, -1, device=values.device, dtype=torch.float32)
    return torch.empty_like(values, dtype=torch.float32).scatter_(-1, order, ranks.expand_as(values))
