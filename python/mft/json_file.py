"""A JSON object from a file that a stranger may have written: whatever its bytes, an object or one clear error."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a file of at most so many bytes. Raises: ValueError that names the file; OSError."""
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path}: expected at most {most} bytes, got {size}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.start}, which is not") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON, got a file with: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON of few levels, got one nested too deeply") from None
    except ValueError as error:  # of a number too long to be one
        raise ValueError(f"{path}: expected JSON, got a file with: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object, got {type(values).__name__}")
    return values
