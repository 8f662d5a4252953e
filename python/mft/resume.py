"""Going on with a run of the command line that was stopped: its configuration, which may not change, its checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.checkpoint import Checkpoint, newest_checkpoint
from mft.config import RunConfig, load_config
from mft.run_directory import CHECKPOINTS, CONFIG, MASKS, MODEL


@dataclass(frozen=True)
class Start:
    """How a run begins: in a new directory, over an old run (overwrite), or where one was stopped (resume)."""

    overwrite: bool = False
    resume: bool = False
    force: bool = False  # with resume: although configuration, data or base have changed


_FREE = ("output_dir", "checkpoint_minutes", "train.log_every")  # change nothing of what is learned


def resumed_config(directory: Path, path: Path | None, overrides: Sequence[str], *, force: bool) -> RunConfig:
    """The configuration of the run in directory, or the one at path, with overrides.

    Raises: ValueError, if directory holds no run that can go on; or if the configuration is not the run's own, with
    what differs, unless force is True.
    """
    if not (directory / CONFIG).is_file():
        raise ValueError(f"--resume must name the output_dir of a run, {directory} has no {CONFIG}")
    finished = [name for name in (MASKS, MODEL) if (directory / name).exists()]
    if finished:
        raise ValueError(f"--resume must name a run that is not finished, {directory} has its {finished[0]}/ already")
    own = load_config(directory / CONFIG)
    asked = load_config(path or directory / CONFIG, list(overrides))
    asked.output_dir = str(directory)
    if asked.model.quantization is None:  # memory: quantized has chosen it
        asked.model.quantization = own.model.quantization
    was, now = flat(own), flat(asked)
    changed = [f"{key} was {was[key]}, now {now[key]}" for key in was if was[key] != now[key] and key not in _FREE]
    if changed and not force:
        raise ValueError(
            f"the configuration must be the run's own, or what is learned is neither run's; {'; '.join(changed)}: take "
            "the changes back, or pass --force"
        )
    return asked


def find_checkpoint(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies, or None if it has none at all; what was passed over is said.

    Raises: ValueError, if none of those that are there verifies.
    """
    found, skipped = newest_checkpoint(directory / CHECKPOINTS)
    if found is None and skipped:
        raise ValueError(f"{skipped[0]}; no other checkpoint verifies: --overwrite begins anew")
    for reason in skipped:
        say(f"passed over: {reason}")
    say(f"{directory} has no checkpoint yet: begins anew" if found is None else f"goes on after step {found.step}")
    return found


def flat(config: RunConfig) -> dict[str, Any]:
    """ "section.key" -> value, as an override names it."""
    values = dataclasses.asdict(config)
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in sections}
    return flat | {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
