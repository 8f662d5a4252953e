"""What mft attaches to a model, a masked layer or an adapter's configuration in PEFT: one attribute, ``_mft``."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attached:
    """The values of one object; the module that attaches a value says what it means."""

    budget: Any = None  # of a model or a configuration: Budget
    surrogate: Any = None  # of a model or a configuration: Surrogate
    files: Any = None  # of a model whose weights stay in files: WeightFiles
    score_rows: Any = None  # of such a model: ScoreRows, of its masks
    in_place: Any = None  # of a model: MasksInPlace, which holds its masks in its weights
    modules_to_save: tuple[str, ...] = ()  # of a model: names of the modules that are trained whole
    trainable_before: frozenset[str] | None = None  # of a model: parameters that were trainable before it was masked
    exact_base: tuple[set[str], str] | None = None  # of a quantised model: its masked layers, and their exact hash
    shares_memory: bool = False  # of a model: whether another model uses the memory of its weights
    replaced: Any = None  # of a masked layer that replaced no nn.Linear: that module without its weights
    chosen: Any = None  # of a configuration: the chosen modules, and which of their parameters
    export: Any = None  # of a configuration that came from an export: its directory and description


_NOTHING = Attached()


def attached(holder: Any) -> Attached:
    """Return what is attached to holder; the defaults if nothing is."""
    return getattr(holder, "_mft", _NOTHING)


def attach(holder: Any, **values: Any) -> None:
    """Set these values. The attribute goes if no value is left."""
    found = dataclasses.replace(attached(holder), **values)
    if found != _NOTHING:
        holder._mft = found
    elif hasattr(holder, "_mft"):
        del holder._mft
