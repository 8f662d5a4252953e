"""The model at which the runs of a seed begin: one for all seeds, or with ``vary: [base]`` one of each seed."""

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mft.config import ModelConfig
from mft.files.atomic import place_directory
from mft.study.config import VARY_BASE, StudyConfig
from mft.study.from_scratch import train_from_scratch
from mft.study.store import BASE_MODEL, BASES
from mft.training.loop import StepReport


@dataclass(frozen=True)
class Bases:
    """Where they lie; directory: the study's."""

    study: StudyConfig
    directory: Path

    def of(self, seed: int) -> ModelConfig:
        """The declared model, or that from scratch, which make() has trained."""
        if self.study.scratch is None:
            return self.study.model
        return ModelConfig(name=str(self.path(seed)), dtype="float32")

    def is_made(self, seed: int) -> bool:
        return self.study.scratch is None or self.path(seed).exists()

    def make(self, seed: int, progress: Callable[[StepReport], None]) -> None:
        """Train the model of a seed from scratch, unless it is there. All have one tokenizer.

        If two processes do so, the first one's stays.
        """
        scratch = self.study.scratch
        if scratch is None or self.is_made(seed):
            return
        if self._varies:
            train = dataclasses.replace(scratch.train, seed=scratch.train.seed + seed)
            data = dataclasses.replace(scratch.data, seed=scratch.data.seed + seed)
            scratch = dataclasses.replace(scratch, train=train, data=data)
        path, threads = self.path(seed), torch.get_num_threads()
        torch.set_num_threads(1)  # as all that follows
        try:
            ours = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            train_from_scratch(scratch, ours, progress=progress)
            place_directory(ours, path)
        finally:
            torch.set_num_threads(threads)

    def path(self, seed: int) -> Path:
        """Where the model from scratch of a seed lies, or will."""
        return self.directory / BASES / str(seed) if self._varies else self.directory / BASE_MODEL

    @property
    def _varies(self) -> bool:
        return VARY_BASE in self.study.vary
