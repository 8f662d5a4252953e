"""Initialise scores in the order of importance, for training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import check_one_of
from mft.config import DATA_INITS, MaskConfig
from mft.engines.mode import place
from mft.engines.placed import Placed
from mft.engines.sharded.score_rows import score_rows
from mft.importance.importance import SIGNED, check_tells_apart, importance, input_norms, is_transposed, matrix_of
from mft.masks.budget import budget_of
from mft.masks.convert import mask_model, masked_modules, set_scores

_SCALE = 0.02  # root mean square of initial scores, as in MaskedLinear


def initialise_scores(
    model: nn.Module, method: str, dataset, *, rows: int = 64, batch_size: int = 4, seed: int = 0
) -> nn.Module:
    """Initialise a masked model's scores so that they select the masks of ``method``.

    Scores are positive, never 0, and have root mean square 0.02 in each matrix. They are proportional to the
    importance, with two exceptions:

    - wanda without a budget: to the importance divided by that of the row's last kept weight, so that each row keeps
      its share;
    - gradient and fisher, whose importance has both signs: to its rank within the matrix.

    Returns: the same model. Raises: as importance; ValueError if nothing is masked.
    """
    masked = _masked_layers(model)
    found = importance(model, masked, method, dataset, rows=rows, batch_size=batch_size, seed=seed)
    for name, module in masked.items():
        values = found.pop(name).double()
        if method == "wanda" and budget_of(model) is None:
            values /= _last_kept(values, module.keep_ratio).clamp(min=torch.finfo(torch.float32).tiny)
        elif method in SIGNED:
            values = dense_ranks(values).double() + 1
        _begin(module, _scale(values))
    _select(model, masked)
    return model


def mask_from_data(model: nn.Module, mask: MaskConfig, dataset, **options: Any) -> nn.Module:
    """Call mask_model, then init_from_data if mask.init uses data. options: see init_from_data.

    Returns: the same model.
    """
    mask_model(model, drawn(mask))
    return init_from_data(model, mask, dataset, **options) if mask.init in DATA_INITS else model


def init_from_data(
    model: nn.Module | Placed, mask: MaskConfig, dataset, *, batch_size: int = 4, **options: Any
) -> nn.Module:
    """Initialise the scores of a masked model as mask.init says, from mask.calibration_rows rows of dataset.

    For wanda, let v = |w_ij| * ||x_j||_2, scaled to root mean square 0.02 in each matrix. The scores are

    - threshold + v with a fixed threshold, so that everything is kept and the most important weights are farthest from
      being dropped;
    - v with a budget;
    - otherwise those of initialise_scores.

    For an expert that no row reached, v = |w_ij|.

    Args:
        model: A model masked with the configuration drawn(mask). Its base may be quantised.
        dataset: Columns input_ids, labels, document. Rows are drawn by mask.seed.
        options: See engines.mode.place: way, device and processes, which all use the norms of the first one.

    All processes get the same bits. The scores of two memory modes may differ by one rounding of their dtype, because
    some modes run the masked layers' products and others the base's.

    Returns: the same model. Raises: ValueError as importance, for another init, or if nothing is masked.
    """
    check_one_of("init", mask.init, DATA_INITS)
    placed = place(model, **options)
    model = placed.model
    masked = _masked_layers(model)
    norms = input_norms(placed, masked, dataset, rows=mask.calibration_rows, batch_size=batch_size, seed=mask.seed)
    norms = placed.processes.gather({name: norm.cpu() for name, norm in norms.items()})[0]

    def begin(name: str, module: Any) -> None:
        _begin(module, wanda_scores(name, matrix_of(module), norms[name], mask))

    rows = score_rows(model)
    if rows is not None:
        rows.begin(drawn(mask), begin)
        return model
    for name, module in masked.items():
        begin(name, module)
    _select(model, masked)
    return model


def drawn(mask: MaskConfig) -> MaskConfig:
    """Return mask with an init that needs no data, if its own does; init_from_data sets the scores afterwards."""
    return dataclasses.replace(mask, init="constant") if mask.init in DATA_INITS else mask


def wanda_scores(name: str, weight: Tensor, norms: Tensor, mask: MaskConfig) -> Tensor:
    """Return the scores of init_from_data for one weight and its input norms: fp32 (N, K) or (E, N, K)."""
    reached = torch.where((norms != 0).any(-1, keepdim=True), norms, 1.0)
    values = (weight.abs().float() * reached.to(weight.device)).double()
    check_tells_apart(name, mask.init, values)
    if mask.keep_ratio is not None:
        values = values / _last_kept(values, mask.keep_ratio).clamp(min=torch.finfo(torch.float32).tiny)
    return _scale(values) + (mask.threshold or 0.0)


# ---------------------------------------------------------------------------------------------- for one-shot masks


def dense_ranks(values: Tensor) -> Tensor:
    """Return the dense rank of each value in the matrix: 0 for the smallest value, 1 for the next larger one."""
    return values.unique(return_inverse=True)[1]


def storage_layout(module: Any, values: Tensor) -> Tensor:
    """Return values (N, K) or (E, N, K) in the layout in which the masked layer holds its scores."""
    return values.mT if is_transposed(module) else values


# ---------------------------------------------------------------------------------------------- private


def _scale(values: Tensor) -> Tensor:
    """Scale values to root mean square 0.02; fp32 and positive, as a score of 0 never learns: sign(0) = 0."""
    scores = (values * (_SCALE / values.square().mean((-2, -1), keepdim=True).sqrt())).float()
    return scores.clamp_(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _begin(module: Any, scores: Tensor) -> None:
    """Set the masked layer's scores to scores (N, K) or (E, N, K)."""
    set_scores(module, storage_layout(module, scores))


def _select(model: nn.Module, masked: Mapping[str, Any]) -> None:
    """With a budget, select the masks of the new scores."""
    budget = budget_of(model)
    if budget is not None and budget.quota:
        budget.select(list(masked.values()))


def _last_kept(values: Tensor, keep_ratio: float) -> Tensor:
    """Return the smallest kept value of each row, (..., N, 1); the largest value if none is kept."""
    columns = values.shape[-1]
    kept = max(1, columns - int((1 - keep_ratio) * columns))
    return values.kthvalue(columns - kept + 1, dim=-1, keepdim=True).values


def _masked_layers(model: nn.Module) -> dict[str, Any]:
    masked = masked_modules(model)
    if not masked:
        raise ValueError("model must hold masked layers, found none: call mask_model(model, config) first")
    return masked
