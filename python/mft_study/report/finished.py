"""The models of a finished study, made again from its files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mft.checks import nearest
from mft_study.arms.arm import Arm
from mft_study.arms.kinds import name_of
from mft_study.arms.masks import Mask
from mft_study.arms.setting import Setting
from mft_study.arms.weights import clone_with_weights, load_weights
from mft_study.bases import Bases
from mft_study.load import load_study
from mft_study.outcome import Unit
from mft_study.report.table import reference_of
from mft_study.store import STUDY, Store, open_store
from mft_study.study_plan import chosen_settings, starts_of
from mft_study.units.job import Job
from mft_study.workspace import Workspace


@contextmanager
def open_finished(directory: Path) -> Iterator["Finished"]:
    """Open the finished study in directory, which nobody else may have open. Raises: ValueError if there is none."""
    if not (directory / STUDY).is_file():
        raise ValueError(f"directory must be a study's (with a {STUDY}), got {directory}")
    study = load_study(directory / STUDY)
    with open_store(study, directory) as store, torch.no_grad():
        yield Finished(store)


class Finished:
    """A study's models, made from its files."""

    def __init__(self, store: Store) -> None:
        self.study, self._store = store.study, store
        self.workspace = Workspace(self.study, Bases(self.study, store.directory))
        self.outcomes = store.outcomes()
        self._chosen = chosen_settings(self.study, self.outcomes)

    def arm(self, kind: type[Arm]) -> str:
        name = self.study.first_of_kind(kind)
        if name is None:
            known = ", ".join(self.study.arms)
            raise ValueError(f"the study must hold an arm of kind {name_of(kind)}, got {known}")
        return name

    def masked_arm(self, name: str | None) -> str:
        """Return the name of an MFT arm, after checking it; None: the first mask."""
        known = [arm for arm, config in self.study.arms.items() if config.is_mft]
        if name is None:
            return self.arm(Mask)
        self.check("arm", name, known)
        return name

    def control_of(self, arm: str) -> str:
        """Return the control of the same layers."""
        name = reference_of(self.study, arm)
        if name is None:
            raise ValueError(f"the study must hold a control of {arm}'s layers, got {', '.join(self.study.arms)}")
        return name

    def model(self, domain: str, arm: str, seed: int):
        job = self.job(domain, arm, seed)
        self.workspace.begin(domain, job.starts or (job.trained,), seed)
        return (
            clone_with_weights(self.workspace.model, load_weights(job.trained)) if job.starts else self.workspace.model
        )

    def dropped(self, domain: str, arm: str, seed: int) -> dict[str, Tensor]:
        job = self.job(domain, arm, seed)
        if not job.starts:
            self.workspace.begin(domain, (), seed)
        before = load_weights(job.starts[-1]) if job.starts else dict(self.workspace.base.named_parameters())
        return {name: (weight == 0) & (before[name] != 0) for name, weight in load_weights(job.trained).items()}

    def job(self, domain: str, arm: str, seed: int) -> Job:
        """Return the chosen run of a trained arm, with its files."""
        unit = Unit(domain, arm, seed, self.chosen(domain, arm))
        starts = starts_of(self.study, self._chosen, unit)
        return Job(unit, tuple(self._file(start) for start in starts), self._file(unit))

    def check(self, name: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")

    def chosen(self, domain: str, arm: str) -> Setting:
        """Return the setting that validation chose."""
        if arm not in self._chosen.get(domain, {}):
            raise ValueError(f"the study must be finished, {arm} on {domain} is not: run mft compare to its end")
        return self._chosen[domain][arm]

    def _file(self, unit: Unit) -> Path:
        path = self._store.trained_path(unit, self._chosen)
        if not path.is_file():
            raise ValueError(f"the study must be finished, {unit} is not: run mft compare to its end; no file {path}")
        return path
