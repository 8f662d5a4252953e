"""A model of the Hub as a local directory: its files in the Hub's cache, fetched if needed."""

import glob
from pathlib import Path

from huggingface_hub import snapshot_download

from mft.files.hub import translate_hub_errors
from mft.files.json_file import read_object
from mft.models.weight_files import INDEX, MOST_INDEX, WEIGHTS

# Files of tokenizers and configurations. Folders hold other forms of the model, except templates.
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.vocab"]
_FOLDERS = "[!a]*/*"  # all but additional_chat_templates


def fetch_model(repository: str, revision: str | None, *, weights: bool, online: bool) -> Path:
    """Return the snapshot's directory, with ``weights`` the weights too. Raises: HubError; ValueError if damaged."""
    directory = _fetch(repository, revision, _SMALL, online=online)
    if weights:
        commit = directory.name  # fixed, even if revision moves meanwhile
        _fetch(repository, commit, [WEIGHTS], online=online)
        if not (directory / WEIGHTS).exists() and (directory / INDEX).exists():
            places = read_object(directory / INDEX, MOST_INDEX).get("weight_map")
            names = {name for name in places.values() if isinstance(name, str)} if isinstance(places, dict) else set()
            _fetch(repository, commit, [glob.escape(name) for name in sorted(names)], online=online)
    return directory


def _fetch(repository: str, revision: str | None, patterns: list[str], *, online: bool) -> Path:
    with translate_hub_errors(repository, revision):
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_FOLDERS,
            local_files_only=not online,
        )
    return Path(str(found))
