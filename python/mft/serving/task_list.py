"""Tasks by name, each with the directory of its masks: name=DIRECTORY, as an option."""

from collections.abc import Sequence
from pathlib import Path

from mft.checks import nearest_path


def parse_masks(given: Sequence[str]) -> dict[str, str]:
    """{task: directory} of --masks task=directory, each there, or with the form of a repository on the hub."""
    from mft.files.hub import split_hub_id

    if not given:
        raise ValueError("--masks must be given for each task, as name=DIRECTORY, got none")
    directories: dict[str, str] = {}
    for each in given:
        task, equals, directory = each.partition("=")
        if not (task and equals and directory):
            raise ValueError(f"--masks must be name=DIRECTORY, got {each!r}")
        if task in directories:
            raise ValueError(f"--masks must name each task once, got {task!r} twice")
        path = Path(directory).expanduser()
        if not path.is_dir() and split_hub_id(directory) is None:
            raise ValueError(f"--masks must name a directory, {task!r} is {path}{nearest_path(path)}")
        directories[task] = str(path) if path.is_dir() else directory
    return directories
