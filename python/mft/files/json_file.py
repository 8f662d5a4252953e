"""Read JSON from untrusted files: any bytes give either a value or one clear error."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft.checks import nearest
from mft.files.regular_file import read_regular

_SHOWN = 80  # characters of a key or a value in a message


def read_object(path: Path, most: int) -> dict[str, Any]:
    """Return the object in a file of at most `most` bytes. Raises: ValueError that names the file; OSError."""
    return parse_object(read_regular(path, most), path)


def parse_object(content: bytes, origin: Path) -> dict[str, Any]:
    """Return the object in UTF-8 text. Raises: ValueError that names its origin."""
    values = parse_value(content, origin)
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: expected an object, got {'null' if values is None else type(values).__name__}")
    return values


def parse_value(content: bytes, origin: Path) -> Any:
    """Return the value in UTF-8 text. Raises: ValueError that names its origin."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: expected UTF-8 text, got an invalid byte at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}:{error.lineno}: expected JSON, got a file with: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{origin}: expected JSON of few levels, got one nested too deeply") from None
    except ValueError as error:  # from a number with too many digits, or from _unique
        raise ValueError(f"{origin}: expected JSON, got a file with: {error}") from None


def check_keys(path: Path, values: dict, known: list[str], where: str = "", optional: Sequence[str] = ()) -> None:
    """Raise ValueError unless values (at ``where``) have all the known keys, except optional ones, and no others."""
    place = f" in {where}" if where else ""
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {short(key)}{place}{nearest(key, known)}")
    missing = [key for key in known if key not in values and key not in optional]
    if missing:
        raise ValueError(f"{path}: missing key {missing[0]!r}{place}")


def expect(path: Path, key: str, value: Any, holds: bool, rule: str) -> None:
    """Raise ValueError, with the key, its rule and its value, unless holds is true."""
    if not holds:
        raise ValueError(f"{path}: {key} must be {rule}, got {short(value)}")


def short(value: Any) -> str:
    """Return the repr of a value, cut to fit a message."""
    text = repr(value)
    return text if len(text) < _SHOWN else text[: _SHOWN - 3] + "..."


def finite(value: Any) -> Any:
    """Return value for JSON: NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_list_of(value: Any, kind: type) -> bool:
    """Return whether value is a list of kind. A bool does not count as an int."""
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def is_number(value: Any) -> bool:
    """Return whether value is an int or a float. A bool does not count as one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; refuse equal keys, of which json takes the last and other readers the first."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:_SHOWN]!r} twice: leave one out")
    return values
