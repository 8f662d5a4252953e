"""One run, one directory: configuration, metrics as they come, tables, plot, models; never overwritten unasked."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mft.config import RunConfig, save_config

CONFIG, METRICS, PLOT = "config.yaml", "metrics.jsonl", "plot.png"
TABLE_MARKDOWN, TABLE_JSON = "table.md", "table.json"
ABLATION = "ablation.png"
MASKS, MODEL = "masks", "model"
_OURS = {CONFIG, METRICS, PLOT, TABLE_MARKDOWN, TABLE_JSON, MASKS, MODEL}


def check_run_directory(directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise ValueError if directory holds a run and overwrite is False, or anything that is not a run's even then."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {path}")
    entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in entries if name not in _OURS]
    if foreign:
        raise ValueError(
            f"output_dir must be new, empty or a run's, got {path} with {', '.join(foreign[:3])}: name another one"
        )
    if entries and not overwrite:
        raise ValueError(
            f"output_dir {path} already holds a run ({', '.join(entries)}): name another one, or pass --overwrite to "
            "delete it"
        )


def open_run(directory: str | os.PathLike, config: RunConfig, *, overwrite: bool = False) -> Path:
    """The directory, made if need be and emptied of an earlier run, with its config.yaml. Raises as the check does."""
    check_run_directory(directory, overwrite=overwrite)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    save_config(config, path / CONFIG)
    return path


class MetricsFile:
    """A line of JSON an event, on disk as soon as it is written."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def write(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
