"""Measure how much new masks raise the loss before training; warn if training is unlikely to regain it."""

import dataclasses

from torch import nn

from mft.config import MaskConfig
from mft.engines.mode import place
from mft.engines.placed import Placed
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import keep_all_weights, masked_modules

ROWS = 4  # very cheap compared with a validation
# Nats per token; 10 % in perplexity. On SmolLM2-135M, magnitude masks begin within 0.01 nats per token of the unmasked
# model at a keep_ratio of 0.9 to 0.99; random ones begin 0.25 above it at 0.99 and 7.3 at 0.9 (docs/how-to/recipe.md).
WELL_ABOVE = 0.1
_HARMLESS = 0.99  # a keep ratio


def mask_cost_warning(model: nn.Module | Placed, config: MaskConfig, dataset, batch_size: int = 2) -> str | None:
    """Return a warning if the initial masks of config raise the loss well above the unmasked model's, else None.

    The loss is that of the first rows of dataset in eval mode. The warning names a setting that would not raise it.
    """
    rows, placed = dataset.select(range(min(ROWS, len(dataset)))), place(model)
    masked = evaluate(placed, rows, batch_size=batch_size).loss
    with keep_all_weights(placed.model):
        unmasked = evaluate(placed, rows, batch_size=batch_size).loss
    if not masked > unmasked + WELL_ABOVE:  # if the loss is NaN, the first step reports it
        return None
    return (
        f"the masks alone cost {masked - unmasked:.2f} nats per token: the loss is {masked:.2f} before the first step, "
        f"{unmasked:.2f} without them (on {len(rows)} rows). mask.init={config.init} {config.rule} on "
        f"{len(masked_modules(placed.model))} layers drops what the model needs; {_remedy(config)}"
    )


def _remedy(config: MaskConfig) -> str:
    ours = ("init", "budget_ramp", "fill_budget", "threshold", "pattern", "sharpness", "deletion_penalty")
    keep_ratio = None if config.keep_ratio is None else max(config.keep_ratio, _HARMLESS)
    defaults = {name: getattr(MaskConfig(), name) for name in ours}
    harmless = dataclasses.replace(config, keep_ratio=keep_ratio, **defaults)
    was, better = (dataclasses.asdict(value) for value in (config, harmless))
    changes = [
        f"mask.{name}={'null' if value is None else value}" for name, value in better.items() if was[name] != value
    ]
    if changes:
        return f"{' '.join(changes)} begins near the model as it is"
    return "mask fewer layers with mask.layers_to_transform"
