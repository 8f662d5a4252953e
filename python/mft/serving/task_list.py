"""Read tasks and the directories of their masks: name=DIRECTORY, as options or as the lines of a file."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mft.checks import check_rule, nearest_path

_MOST_BYTES = 1 << 20  # most bytes of a file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")  # names are used in logs, in metrics and in paths of URLs


def check_name(option: str, name: str, got: str | None = None) -> None:
    """Raise ValueError unless a task may have this name. got: what the message shows instead of it."""
    check_rule(
        _NAME.fullmatch(name) is not None,
        option,
        "name a task by 1 to 128 letters, digits and . _ : / -, the first a letter or a digit",
        got or repr(name[:200]),
    )


def parse_masks(given: Sequence[str]) -> dict[str, str]:
    """Return {task: directory} from --masks task=directory. A directory exists or has the form of a hub repository."""
    if not given:
        raise ValueError("--masks must be given for each task, as name=DIRECTORY, got none")
    return _parse("--masks", ((each, "") for each in given))


def read_masks_file(path: Path) -> dict[str, str]:
    """Return {task: directory} from a file with one per line. Raises: ValueError that names the line; OSError."""
    try:
        lines = read_listed("--masks-file", "name=DIRECTORY", path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--masks-file must be UTF-8 text, got byte {error.start} of {path}") from None
    numbered = ((line.strip(), f" in line {number} of {path}") for number, line in enumerate(lines, 1))
    found = _parse("--masks-file", (each for each in numbered if each[0] and not each[0].startswith("#")))
    check_rule(bool(found), "--masks-file", "hold name=DIRECTORY in a line for each task", f"none in {path}")
    return found


def read_listed(option: str, content: str, path: Path) -> bytes:
    """Return the bytes of an option's file of lines. Raises: OSError; ValueError if it is larger than 1 MiB."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        close = nearest_path(path) if isinstance(error, FileNotFoundError) else ""
        raise type(error)(
            f"{option} must be a file with {content} in each line, got {path}, which cannot be read "
            f"({error.strerror}): name another one, or write it{close}"
        ) from None
    check_rule(len(data) <= _MOST_BYTES, option, f"be at most {_MOST_BYTES} bytes", f"more in {path}: remove lines")
    return data


def _parse(option: str, entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {task: directory} from pairs (entry, its place in a message)."""
    from mft.files.hub import split_hub_id

    directories: dict[str, str] = {}
    for entry, where in entries:
        task, equals, directory = (part.strip() for part in entry.partition("="))
        if not (task and equals and directory):
            raise ValueError(f"{option} must be name=DIRECTORY, got {entry!r}{where}")
        check_name(option, task)
        if task in directories:
            raise ValueError(f"{option} must name each task once, got {task!r} twice{where}")
        path = Path(directory).expanduser()
        if not path.is_dir() and split_hub_id(directory) is None:
            raise ValueError(f"{option} must name a directory, {task!r} is {path}{nearest_path(path)}{where}")
        directories[task] = str(path) if path.is_dir() else directory
    return directories
