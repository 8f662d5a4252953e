"""Start a command-line run under the lock of its directory: a new one, over an old one, or a stopped one again."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mft.config import CONFIG, RunConfig
from mft.config_file import config_from, config_from_saved, config_values, load_config, load_saved
from mft.engines.distributed import Processes
from mft.number_formats import AUTO
from mft.tracking.console import say
from mft.training.checkpoint import Checkpoint, newest_checkpoint
from mft.training.run_directory import CHECKPOINTS, check_run_directory, holding, result_of

# Keys that may change when a run is resumed: they do not affect what is learned.
_FREE = {"output_dir", "checkpoint_minutes", "train.log_every", "train.batches_at_once"}
_FREE |= {"coding", "report_to", "project"}


@dataclass(frozen=True)
class Begin:
    """A run in a new directory, or over an old run."""

    config: RunConfig
    overwrite: bool = False
    force: ClassVar[bool] = False  # a new run has no earlier settings to differ from

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    def check(self) -> None:
        """Raise ValueError if directory holds files of something else. Then not even a lock is written there."""
        check_run_directory(self.directory, overwrite=True)

    def look(self) -> tuple[RunConfig, Checkpoint | None]:
        """Return the configuration and no checkpoint. Raises: ValueError if a run is there and overwrite is False."""
        check_run_directory(self.directory, overwrite=self.overwrite)
        return self.config, None


@dataclass(frozen=True)
class Resume:
    """Resume the run in directory, with its own configuration or an equal one from path or config, and overrides.

    force: Resume even if configuration, data or base have changed. config: Replaces path and overrides.
    """

    directory: Path
    path: Path | None = None
    overrides: Sequence[str] = ()
    force: bool = False
    config: RunConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))  # text from Python callers

    def check(self) -> None:
        """Raise ValueError if directory does not hold a run."""
        if not _is_run(self.directory):
            raise ValueError(f"--resume must name the output_dir of a run, {self.directory} has no {CONFIG}")

    def look(self) -> tuple[RunConfig, Checkpoint | None]:
        """Return the configuration, and the newest checkpoint that verifies, or None if there is no checkpoint.

        Raises: ValueError if no run here can be resumed, or (without force) if its configuration differs.
        """
        if (result := result_of(self.directory)) is not None:
            raise ValueError(
                f"--resume must name a run that is not finished, {self.directory} has its {result.name}/ already"
            )
        found = find_checkpoint(self.directory)
        own = self._own_config(found)
        asked = self._asked_config(own)
        asked.output_dir = str(self.directory)
        if asked.model.quantization is None:  # the run's plan chose it, for memory: quantized
            asked.model.quantization = own.model.quantization
        if asked.train.batches_at_once is None:  # the run's plan chose this and the next two
            asked.train.batches_at_once = own.train.batches_at_once
        if asked.mask.scores_dtype == AUTO:
            asked.mask.scores_dtype = own.mask.scores_dtype
        if asked.train.moments == AUTO:
            asked.train.moments = own.train.moments
        was, now = flat(own), flat(asked)
        changed = [f"{key} was {was[key]}, now {now[key]}" for key in was if was[key] != now[key] and key not in _FREE]
        if changed and not self.force:
            raise ValueError(
                "the configuration must be that of the run, because a mixture would match neither configuration; "
                f"{'; '.join(changed)}: undo the changes, or pass --force"
            )
        say(
            f"{self.directory} has no checkpoint yet: starts from the beginning"
            if found is None
            else f"goes on after step {found.step}"
        )
        return asked, found

    def _own_config(self, found: Checkpoint | None) -> RunConfig:
        """Return the run's configuration when the checkpoint was written; without a checkpoint, its config file."""
        if found is not None:
            return config_from_saved(found.run()["config"], found.path)
        if not self._has_config():
            raise ValueError(f"--resume must name the output_dir of a run, {self.directory} has no {CONFIG}")
        return load_saved(self.directory / CONFIG)

    def _asked_config(self, own: RunConfig) -> RunConfig:
        """Return the configuration that the config file has now; if the file is lost, the checkpoint's."""
        if self.config is not None:
            return copy.deepcopy(self.config)
        if self.path is None and not self._has_config():
            return config_from(config_values(own), None, list(self.overrides))
        if self.path is not None:
            return load_config(self.path, list(self.overrides))
        return load_saved(self.directory / CONFIG, list(self.overrides))

    def _has_config(self) -> bool:
        path = self.directory / CONFIG
        return path.is_file() and path.stat().st_size > 0


Start = Begin | Resume


@dataclass(frozen=True)
class Run:
    """A run. found: the checkpoint from which it resumes. Of several processes only the first one writes files."""

    command: str
    config: RunConfig
    start: Start
    found: Checkpoint | None
    processes: Processes

    @property
    def directory(self) -> Path:
        return self.start.directory


def resume_if_restarted(start: Start) -> Start:
    """Return start; but if torchrun --max-restarts repeats a command, resume the run that the command has begun."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if isinstance(start, Begin) and restarted and _is_run(start.directory):
        return Resume(start.directory, config=start.config)
    return start


@contextlib.contextmanager
def open_start(
    start: Start, processes: Processes, facts: Mapping[str, Any]
) -> Iterator[tuple[RunConfig, Checkpoint | None]]:
    """Lock the run's directory until the block ends; yield the configuration and the checkpoint to resume from, if any.

    Nothing is loaded yet. Args: facts: further values that all processes must agree on.
    Raises: as look(); RuntimeError if another process holds the lock; ValueError if the processes do not agree.
    """
    start.check()
    with holding(start.directory) if processes.first else contextlib.nullcontext():
        processes.wait()  # no process may look before the lock is held
        config, found = start.look()
        processes.agree({**facts, **flat(config), "the checkpoint's step": None if found is None else found.step})
        yield config, found


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in (CONFIG, CHECKPOINTS))


def find_checkpoint(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None if the run has none. Prints which ones it skipped.

    Raises: ValueError if the run has checkpoints and none of them verifies.
    """
    found, skipped = newest_checkpoint(directory / CHECKPOINTS)
    if found is None and skipped:
        raise ValueError(f"{skipped[0]}; no other checkpoint verifies: --overwrite starts the run again")
    for reason in skipped:
        say(f"skipped: {reason}")
    return found


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as {"section.key": value}, with the names that overrides use."""
    values = dataclasses.asdict(config)
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in sections}
    return flat | {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
