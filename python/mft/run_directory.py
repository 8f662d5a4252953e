"""One run, one directory: configuration, metrics as they come, tables, plot, models; never overwritten unasked."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from mft.config import RunConfig, save_config
from mft.run_lock import LOCK

CONFIG, METRICS, PLOT = "config.yaml", "metrics.jsonl", "plot.png"
TABLE_MARKDOWN, TABLE_JSON = "table.md", "table.json"
ABLATION, FLIPS = "ablation.png", "flips.png"
MASKS, MODEL, CHECKPOINTS = "masks", "model", "checkpoints"
BASE = "base"  # what the demo's masks are for: its full fine-tune
_OURS = {BASE, CONFIG, METRICS, PLOT, FLIPS, TABLE_MARKDOWN, TABLE_JSON, MASKS, MODEL, CHECKPOINTS}


def check_run_directory(directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise ValueError if directory holds a run and overwrite is False, or anything that is not a run's even then."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {path}")
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK) if path.exists() else []
    foreign = [name for name in entries if name not in _OURS]
    if foreign:
        raise ValueError(
            f"output_dir must be new, empty or a run's, got {path} with {', '.join(foreign[:3])}: name another one"
        )
    if entries and not overwrite:
        resumed = f"go on with --resume {path}, " if CHECKPOINTS in entries else ""
        raise ValueError(
            f"output_dir {path} already holds a run ({', '.join(entries)}): {resumed}name another one, or pass "
            "--overwrite to delete it"
        )


def open_run(directory: str | os.PathLike, config: RunConfig, *, overwrite: bool = False) -> Path:
    """The directory, made if need be and emptied of an earlier run, with its config.yaml. Raises as the check does."""
    check_run_directory(directory, overwrite=overwrite)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    save_config(config, path / CONFIG)
    return path


def masks_directory(path: Path) -> Path:
    """masks/ of a run, or the directory itself."""
    return path / MASKS if (path / MASKS).is_dir() else path


def next_steps(directory: Path) -> list[str]:
    """What is done with the masks of a finished run, as commands that work as they stand."""
    run, merged = shlex.quote(str(directory)), shlex.quote(f"{directory}-merged")
    return [f"mft inspect {run}", f"mft evaluate --masks {run} --split test", f"mft merge {run} {merged}"]


class MetricsFile:
    """A line of JSON an event, on disk as soon as it is written."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def write(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was written after this step, of which a run that was stopped repeats all."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = []
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:  # the last one, which was being written
                break
            if values.get("step", 0) > step:
                break
            kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
