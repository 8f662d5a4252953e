"""A unit with the files that it needs, its arm, and the Ground on which the arm works."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from mft_study.arms.arm import Arm, Ground, Source
from mft_study.outcome import Unit
from mft_study.workspace import Workspace


@dataclass(frozen=True)
class Job:
    """A unit and the files that it needs."""

    unit: Unit
    starts: tuple[Path, ...]  # trained weights that lead from the base model to the unit's start, in order
    trained: Path  # where the unit's own weights are, or go
    parts: tuple[tuple[Unit, Path], ...] = ()  # for an average: the runs that it averages
    source: tuple[Unit, Path] | None = None  # for other derived arms: the run that they are made of
    teacher: tuple[Path, ...] | None = None  # like starts, but to the teacher's model; None: no teacher
    on_test: bool = False
    reads: tuple[Path, ...] = ()  # all files of weights that it reads; on test also its own, if its arm leaves any

    def with_paths(self, moved: Callable[[Path], Path]) -> "Job":
        """Return the same job with its files elsewhere."""
        return replace(
            self,
            starts=tuple(map(moved, self.starts)),
            trained=moved(self.trained),
            parts=tuple((unit, moved(path)) for unit, path in self.parts),
            source=None if self.source is None else (self.source[0], moved(self.source[1])),
            teacher=None if self.teacher is None else tuple(map(moved, self.teacher)),
        )


def arm_of(workspace: Workspace, unit: Unit) -> Arm:
    """Return the unit's arm. A part of an average is a run of the average's source arm."""
    arm = workspace.study.arms[unit.arm]
    return workspace.study.arms[str(arm.of)] if unit.part else arm


def ground_of(workspace: Workspace, job: Job) -> Ground:
    """Return the ground of a job's arm; call it after workspace.begin."""
    unit, arm = job.unit, arm_of(workspace, job.unit)
    mask, keep_ratio = replace(arm.mask_config(workspace.study.mask), seed=unit.seed), unit.setting.keep_ratio
    codes = workspace.study.codes_under(unit.arm)
    runs = job.parts or (() if job.source is None else (job.source,))
    return Ground(
        workspace.model,
        workspace.base,
        workspace.layers_of(arm, unit.setting)[0],
        mask if keep_ratio is None else replace(mask, keep_ratio=keep_ratio),
        unit.setting,
        unit.seed,
        lambda: workspace.splits(unit.domain).train,
        tuple(Source(arm_of(workspace, run), run.setting, path) for run, path in runs),
        None if codes is None else workspace.study.arms[codes].quantization,
    )


def model_of(workspace: Workspace, job: Job) -> nn.Module:
    """Return the unit's model from its files, in eval mode; call it after workspace.begin."""
    return arm_of(workspace, job.unit).model(ground_of(workspace, job), job.trained)
