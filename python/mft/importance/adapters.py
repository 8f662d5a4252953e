"""Scores of a mask in PEFT that begin where data say: get_peft_model has no data, so they are drawn first."""

from typing import Any

import torch
from torch import nn

from mft.checks import check_one_of
from mft.config import DATA_INITS, MaskConfig
from mft.importance.importance import input_norms, linear_modules, matrix_of
from mft.importance.scores import as_stored, wanda_scores
from mft.masks.peft_layers.layer import MaskExperts, MaskTunerLayer


@torch.no_grad()
def init_adapter_from_data(model: Any, mask: MaskConfig, dataset, *, batch_size: int = 4) -> Any:
    """Set the active mask of a PeftModel to begin as mask.init says, by mask.calibration_rows rows of dataset.

    As init_from_data on a model of mask_model, but for rounding: the base runs by its own products. Call it after
    get_peft_model and before training.

    Args: as of init_from_data; mask: what the adapter's configuration was made of, with an init that takes data.
    Returns: the same model. Raises: ValueError as init_from_data, or for another init.
    """
    check_one_of("init", mask.init, DATA_INITS)
    (active,) = model.active_adapters
    base = model.get_base_model()
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, MaskTunerLayer)}
    scores: dict[str, nn.Parameter] = {}  # by the name of what lies below
    modules: dict[str, Any] = {}
    for path, layer in layers.items():
        if active not in layer.mft_scores:
            continue
        found = layer.scores_of(active)
        if isinstance(layer, MaskExperts):
            below = {f"{path}.base_layer.{part}": learned for part, learned in found.items()}
            modules |= linear_modules(base, below)
        else:
            below = {path: found["weight"]}
            modules[path] = layer.base_layer
        scores |= below
    rows, seed = mask.calibration_rows, mask.seed
    with model.disable_adapter():  # every weight kept
        norms = input_norms(base, modules, dataset, rows=rows, batch_size=batch_size, seed=seed)
    for name, module in modules.items():
        begun = wanda_scores(name, matrix_of(module), norms[name], mask)
        scores[name].copy_(begun if name in layers else as_stored(module, begun))  # of a Conv1D they lie as (N, K)
    return model
