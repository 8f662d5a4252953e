"""Copies of a model that share the memory of every weight but those that the copy will change."""

import copy
from collections.abc import Iterable

from torch import nn


def clone_with_own_weights(model: nn.Module, names: Iterable[str] = ()) -> nn.Module:
    """A copy of model that shares all parameters with it, except those of the named modules, which it owns.

    Masking a clone needs no weight of its own. Do not train a shared parameter.
    """
    own = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
