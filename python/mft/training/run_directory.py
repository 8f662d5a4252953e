"""The directory of a run: configuration, metrics, tables, plot, models. It is never overwritten unless asked for.

A run is finished when its directory has the result, masks/ or model/. The result is written last, and a single rename
puts it there. Until then the run can be resumed from checkpoints/. A process that inspects or changes the directory
must hold the lock (run_lock.py).
"""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from mft.config import CONFIG, RunConfig
from mft.config_file import load_saved, save_config
from mft.files.atomic import remove, sweep, target_of
from mft.masks.export_format import CONFIG_FILE, MODEL, read_config
from mft.masks.location import MASKS
from mft.tracking.curves import PLOT
from mft.tracking.metrics import METRICS
from mft.tracking.trackers import IDENTITY, TENSORBOARD, WANDB
from mft.training.checkpoint import newest_checkpoint
from mft.training.run_lock import LOCK, hold

TABLE_MARKDOWN, TABLE_JSON = "table.md", "table.json"
ABLATION, FLIPS = "ablation.png", "flips.png"
CHECKPOINTS, BEST = "checkpoints", "best"
# In the order of deletion: a run without its configuration cannot start again, whatever else is left.
_OURS = (
    *(CONFIG, METRICS, PLOT, FLIPS, TABLE_MARKDOWN, TABLE_JSON, MASKS, MODEL, CHECKPOINTS, BEST),
    *(TENSORBOARD, WANDB, IDENTITY),
)


def check_run_directory(directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise ValueError if directory holds a run and overwrite is False; or, in both cases, if it has foreign files."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {path}")
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    entries = [name for name in names if name != LOCK and target_of(name) not in _OURS]
    foreign = [name for name in entries if name not in _OURS]
    if foreign:
        raise ValueError(
            f"output_dir must be new, empty or a run's, got {path} with {', '.join(foreign[:3])}: name another one"
        )
    if entries and not overwrite:
        resumed = f"go on with --resume {path}, " if CHECKPOINTS in entries and result_of(path) is None else ""
        raise ValueError(
            f"output_dir {path} already holds a run ({', '.join(entries)}): {resumed}name another one, or pass "
            "--overwrite to delete it; from Python, Begin(config, overwrite=True)"
        )


def result_of(path: Path) -> Path | None:
    """Return masks/ or model/ of a finished run, or None if the run is not finished."""
    return next((path / name for name in (MASKS, MODEL) if (path / name).exists()), None)


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold the lock of a run's directory, and delete what a killed run left. Raises: as run_lock.hold; NotWritten."""
    with hold(path):
        sweep(path, _OURS.__contains__)
        if result_of(path) is not None:
            if newest_checkpoint(path / CHECKPOINTS)[0] is not None:
                remove(path / CHECKPOINTS)
            if (path / BEST).exists():
                remove(path / BEST)
        yield


def open_run(directory: str | os.PathLike, config: RunConfig, *, overwrite: bool = False) -> Path:
    """Make the directory or delete the run in it, write config.yaml, and return it. Raises: as check_run_directory."""
    check_run_directory(directory, overwrite=overwrite)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for name in _OURS:
        if (path / name).exists():
            remove(path / name)
    save_config(config, path / CONFIG)
    return path


def next_steps(directory: Path) -> list[str]:
    """Return commands for the next steps with a run's masks; mft generate only if nothing else was trained."""
    run, merged = shlex.quote(str(directory)), shlex.quote(f"{directory}-merged")
    masks_alone = not read_config(directory / MASKS / CONFIG_FILE).modules_to_save
    data = load_saved(directory / CONFIG).data
    asked = "--held-out 3" if data.validation_share else '"Hello"'
    answers = [f"mft generate {run} {asked}"] if masks_alone else []
    tested = [f"mft evaluate --masks {run} --split test"] if data.test_share else []
    return [*answers, f"mft inspect {run}", *tested, f"mft merge {run} {merged}"]
