"""Initialise the scores of a PEFT mask from data. get_peft_model has no data, so the scores start from another init."""

from typing import Any

import torch
from torch import nn

from mft.checks import check_one_of
from mft.config import DATA_INITS, MaskConfig
from mft.engines.mode import place
from mft.importance.importance import input_norms, linear_modules, matrix_of
from mft.importance.initial_scores import storage_layout, wanda_scores
from mft.masks.peft_layers.layer import MaskExperts, MaskTunerLayer


@torch.no_grad()
def init_adapter_from_data(model: Any, mask: MaskConfig, dataset, *, batch_size: int = 4) -> Any:
    """Initialise the active mask of a PeftModel as mask.init says, from mask.calibration_rows rows of dataset.

    Call this after get_peft_model and before training. mask: the configuration from which the adapter's was made.
    Returns: the same model. Raises: ValueError as init_from_data, also for another init.
    """
    check_one_of("init", mask.init, DATA_INITS)
    (active,) = model.active_adapters
    base = model.get_base_model()
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, MaskTunerLayer)}
    scores: dict[str, nn.Parameter] = {}  # by the name of the module or parameter in the base
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
    with model.disable_adapter():  # keep every weight
        norms = input_norms(place(base), modules, dataset, rows=rows, batch_size=batch_size, seed=seed)
    for name, module in modules.items():
        wanted = wanda_scores(name, matrix_of(module), norms[name], mask)
        scores[name].copy_(wanted if name in layers else storage_layout(module, wanted))  # (N, K) also for a Conv1D
    return model
