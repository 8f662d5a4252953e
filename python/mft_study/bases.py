"""The base models at which runs start: one for all seeds, or with ``vary: [base]`` one per seed."""

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mft.config import ModelConfig
from mft.files.atomic import place_directory
from mft.training.loop import StepReport
from mft_study.config import VARY_BASE, StudyConfig
from mft_study.from_scratch import train_from_scratch
from mft_study.store import BASE_MODEL, BASES


@dataclass(frozen=True)
class Bases:
    """The base models of a study. directory: the study's."""

    study: StudyConfig
    directory: Path

    def model_config(self, seed: int) -> ModelConfig:
        """Return the declared model, or the model from scratch that make() has trained."""
        if self.study.scratch is None:
            return self.study.model
        return ModelConfig(name=str(self.path(seed)), dtype="float32")

    def is_made(self, seed: int) -> bool:
        return self.study.scratch is None or self.path(seed).exists()

    def make(self, seed: int, progress: Callable[[StepReport], None]) -> None:
        """Train the model of a seed from scratch, unless it exists. Of two processes, the first to finish wins."""
        scratch = self.study.scratch
        if scratch is None or self.is_made(seed):
            return
        if self._varies:
            train = dataclasses.replace(scratch.train, seed=scratch.train.seed + seed)
            data = dataclasses.replace(scratch.data, seed=scratch.data.seed + seed)
            scratch = dataclasses.replace(scratch, train=train, data=data)
        path, threads = self.path(seed), torch.get_num_threads()
        torch.set_num_threads(1)  # as for all units
        try:
            ours = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            train_from_scratch(scratch, ours, progress=progress)
            place_directory(ours, path)
        finally:
            torch.set_num_threads(threads)

    def path(self, seed: int) -> Path:
        """Return where a seed's model from scratch lies, or will lie."""
        return self.directory / BASES / str(seed) if self._varies else self.directory / BASE_MODEL

    @property
    def _varies(self) -> bool:
        return VARY_BASE in self.study.vary
