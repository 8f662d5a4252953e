"""A unit and the files that it needs; what a unit's arm says of it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mft.config import MaskConfig
from mft.study.config import ArmConfig
from mft.study.outcome import Unit
from mft.study.workspace import Workspace

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A unit and the files that it needs."""

    unit: Unit
    starts: tuple[Path, ...]  # the trained weights that lead from the base model to where the unit begins, in order
    trained: Path  # where the unit's own are, or go
    parts: tuple[tuple[Unit, Path], ...] = ()  # of an average: what its mean is of
    source: tuple[Unit, Path] | None = None  # of other derived arms: what they are made of
    teacher: tuple[Path, ...] | None = None  # as starts, to the model whose words are learned; None: the text's are
    on_test: bool = False


def arm_of(workspace: Workspace, unit: Unit) -> ArmConfig:
    """The unit's arm; a part of an average is a run of the arm that the average is of."""
    arm = workspace.study.arms[unit.arm]
    return workspace.study.arms[str(arm.of)] if unit.part else arm


def rank_of(workspace: Workspace, unit: Unit) -> int:
    """Of the adapters of a unit of kind lora."""
    return unit.setting.rank or arm_of(workspace, unit).lora_rank


def mask_of(workspace: Workspace, unit: Unit, **changes: Any) -> MaskConfig:
    """The masks of a unit's arm, in its setting and from its seed."""
    mask, keep_ratio = workspace.study.mask_of(arm_of(workspace, unit)), unit.setting.keep_ratio
    if mask.threshold is None:
        assert keep_ratio is not None  # of an arm with a mask
        changes["keep_ratio"] = keep_ratio
    return replace(mask, seed=unit.seed, **changes)
