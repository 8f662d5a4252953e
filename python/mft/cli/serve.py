"""What mft serve is given: tasks by name, and the packages that it alone needs."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mft.checks import nearest_path

_NEEDED = ("openai", "starlette", "uvicorn")


def run_serve(masks: Sequence[str], model_name: str | None, dtype: str | None, **options: Any) -> None:
    """mft serve"""
    directories = parse_masks(masks)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"mft serve needs {', '.join(missing)}, not installed here: pip install 'mft_kernels[serve]'"
        )
    from mft.serving.run import serve

    serve(directories, model_name, dtype, **options)


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
