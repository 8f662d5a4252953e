"""Scores that begin in the order of importance, to be trained from there."""

from typing import Any

import torch
from torch import Tensor, nn

from mft.importance.importance import SIGNED, importance, is_transposed
from mft.masks.convert import masked_modules
from mft_kernels import fixed_from_float

_SCALE = 0.02  # root mean square of scores that will be trained, as MaskedLinear's own


def initialise_scores(
    model: nn.Module, method: str, dataset, *, rows: int = 64, batch_size: int = 4, seed: int = 0
) -> nn.Module:
    """Begin the scores of a masked model where ``method`` would mask it: positive, root mean square 0.02, none 0.

    In proportion to importance; for wanda to importance over that of the row's last kept weight, so that each row keeps
    its share; for gradient and fisher, whose importance has both signs, to its rank within the matrix.

    Returns: the same model. Raises: as importance; ValueError if nothing is masked.
    """
    masked = _masked(model)
    found = importance(model, masked, method, dataset, rows=rows, batch_size=batch_size, seed=seed)
    for name, module in masked.items():
        values = found.pop(name).double()
        if method == "wanda":
            values /= _last_kept(values, module.keep_ratio).clamp(min=torch.finfo(torch.float32).tiny)
        elif method in SIGNED:
            values = dense_ranks(values).double() + 1
        scores = (values * (_SCALE / values.square().mean((-2, -1), keepdim=True).sqrt())).float()
        scores.clamp_(min=torch.finfo(torch.float32).tiny)  # a score of exactly 0 never learns: sign(0) = 0
        scores = as_stored(module, scores)
        with torch.no_grad():
            module.scores.copy_(fixed_from_float(scores) if module.scores.dtype == torch.int16 else scores)
    return model


# ---------------------------------------------------------------------------------------------- for one-shot masks


def dense_ranks(values: Tensor) -> Tensor:
    """0 for the smallest value of the matrix, 1 for the next larger one."""
    return values.unique(return_inverse=True)[1]


def as_stored(module: Any, values: Tensor) -> Tensor:
    """(N, K) or (E, N, K) as the masked layer holds its scores."""
    return values.mT if is_transposed(module) else values


# ---------------------------------------------------------------------------------------------- private


def _last_kept(values: Tensor, keep_ratio: float) -> Tensor:
    """(..., N, 1): the smallest value of each row that is kept; the largest one where none is."""
    columns = values.shape[-1]
    kept = max(1, columns - int((1 - keep_ratio) * columns))
    return values.kthvalue(columns - kept + 1, dim=-1, keepdim=True).values


def _masked(model: nn.Module) -> dict[str, Any]:
    masked = masked_modules(model)
    if not masked:
        raise ValueError("model must hold masked layers, found none: call mask_model(model, config) first")
    return masked
