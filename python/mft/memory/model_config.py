"""Read a model's config.json as a dictionary, from any source and without the weights."""

import re
from pathlib import Path
from typing import Any

from mft.checks import nearest, nearest_path
from mft.files.json_file import read_object
from mft.memory.shapes import known_config, known_models

_MOST_CONFIG = 1 << 24  # bytes: a thousand times the longest of published models


def read_model_config(name: str) -> dict[str, Any]:
    """Return the config of a shipped name, a config.json, a model directory or a hub id. Raises: ValueError."""
    path = Path(name)
    if name in known_models():
        return known_config(name)
    if path.is_dir():
        return _read(path / "config.json", name)
    if path.exists():
        return _read(path, name)
    hint = nearest(name.rpartition("/")[2], known_models())
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json"):
        raise ValueError(
            f"model must exist, got {name!r}: no such file or directory{nearest_path(path)}; shipped configs: "
            f"{', '.join(known_models())}"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"model must be {', '.join(known_models())}, a config.json, a model directory or a hub id, got {name!r}"
            f"{hint}"
        )
    return _read_from_hub(name, hint)


# ---------------------------------------------------------------------------------------------- private


def _read(path: Path, name: str) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"model must be a directory with a config.json, got {name} without one")
    return read_object(path, _MOST_CONFIG)


def _read_from_hub(name: str, hint: str) -> dict[str, Any]:
    from transformers import AutoConfig  # imported here because it takes seconds; the other sources do not need it

    from mft.files.hub import hub_is_reachable

    online = hub_is_reachable()
    try:
        return AutoConfig.from_pretrained(name, local_files_only=not online, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        where = "" if online else ", the hub cannot be reached, and it is not in the hub's local cache"
        raise ValueError(
            f"model must be {', '.join(known_models())}, a config.json, a model directory or a hub id, got {name!r}"
            f"{where}{hint} ({' '.join(str(error).split())[:200]})"
        ) from error
