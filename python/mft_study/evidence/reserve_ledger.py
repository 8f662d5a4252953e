"""The ledger of the reserve: all openings of the reserve, by all studies.

In a checkout it is benchmarks/reserve.json, to be committed with the results; otherwise reserve.json in the cache. An
entry has the study (the name of its output_dir), what was opened, a digest of the models, date and commit.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from mft.data.reserve import RESERVE
from mft.files.atomic import write_whole
from mft.files.cache import cache_root
from mft.files.json_file import parse_value
from mft_study.config import StudyConfig
from mft_study.evidence.environment import environment

NAME = "reserve.json"
_ROOT = Path(__file__).parents[3]  # of a checkout


def reserve_texts(study: StudyConfig) -> list[str]:
    """Return the domains and general texts whose test split a study has declared to be the reserve."""
    texts = [*study.domains.items(), *study.general.items()]
    return list(dict.fromkeys(name for name, data in texts if data.subset == RESERVE))


def open_reserve(study: StudyConfig, directory: Path, models: str, *, again: bool) -> list[dict[str, Any]]:
    """Record that a study opens the reserve, in output_dir directory; return all openings so far.

    models: a digest of those that will see the reserve; the same ones may continue an interrupted opening.
    Raises: ValueError if the study has opened the reserve with other models, unless again.
    """
    path = ledger_path()
    with FileLock(cache_root() / "reserve.lock"):
        openings = parse_value(path.read_bytes(), path) if path.is_file() else []
        own = [entry for entry in openings if entry["study"] == directory.name]
        if any(entry["models"] == models for entry in own):
            return openings
        if own and not again:
            raise ValueError(
                f"the reserve must be opened only once per study, {directory.name} has opened it on "
                f"{own[-1]['date']} with other models: choices made since then may depend on it. Pass --again to "
                f"open it anyway, which is recorded in {path}"
            )
        entry = {"study": directory.name, "opened": reserve_texts(study), "models": models}
        entry |= {"date": datetime.date.today().isoformat(), "commit": environment()["commit"]}
        openings.append(entry)
        write_whole(path, json.dumps(openings, indent=2) + "\n")
    return openings


def ledger_path() -> Path:
    """Return the path of the ledger."""
    benchmarks = _ROOT / "benchmarks"
    is_checkout = (benchmarks / "results").is_dir() and (_ROOT / ".git").exists()
    return (benchmarks if is_checkout else cache_root()) / NAME
