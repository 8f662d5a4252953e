"""What tests of the ways to run a step share: how near each comes to plain, and what they compare."""

import torch
from tiny import make_rows
from tiny_architectures import MIXTURES

import mft.config
from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules

BY_LAYERS = ["resident", "layerwise"]
WAYS = ["in_place", *BY_LAYERS]
EXACT = 1e-6  # for scores at 0.02 after steps at 1e-3; only the order of sums differs
# Dense products sum in an order of their own. Adam's first steps enlarge the last bits of a gradient near 0.
TOLERANCE = dict.fromkeys(mft.config.WAYS, EXACT) | {"in_place": 2e-5}


def masked_mixture(kind="gpt_oss", dtype=torch.float32, changes=None, **mask):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIXTURES[kind](**changes or {}).to(dtype).eval()
    return mask_model(model, MaskConfig.paper(**mask))


def rows_with_few_labels(count=10):
    """Return rows of which some have few labels and every fifth none."""
    found = make_rows(count)
    labels = [[-100] * (i % 5 * 3) + row["labels"][i % 5 * 3 :] for i, row in enumerate(found)]
    return found.remove_columns("labels").add_column("labels", labels)


def scores_of(model):
    return {name: module.scores.detach().float().clone() for name, module in masked_modules(model).items()}


def masks_of(model):
    return {name: module.packed_mask() for name, module in masked_modules(model).items()}
