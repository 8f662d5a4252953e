"""A JSON object that a stranger may have written: whatever its bytes, an object or one clear error."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mft.files.regular_file import read_regular

_SHOWN = 80  # characters of a key in a message


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a file of at most so many bytes. Raises: ValueError that names the file; OSError."""
    return parse_object(read_regular(path, most), path)


def parse_object(content: bytes, origin: Path) -> dict[str, Any]:
    """The object that UTF-8 text is. Raises: ValueError that names its origin."""
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: expected UTF-8 text, got byte {error.start}, which is not") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}:{error.lineno}: expected JSON, got a file with: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{origin}: expected JSON of few levels, got one nested too deeply") from None
    except ValueError as error:  # of a number too long to be one, or of _unique
        raise ValueError(f"{origin}: expected JSON, got a file with: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: expected an object, got {'null' if values is None else type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. json alone would take the last of two equal keys, and other readers the first."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:_SHOWN]!r} twice: leave one out")
    return values
