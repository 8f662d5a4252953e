"""Read a file that an option of `mft serve` names."""

from pathlib import Path

_MOST_BYTES = 1 << 20


def read_option_file(option: str, path: Path) -> bytes:
    """Return the first MiB of the file. Raises: OSError that names the option."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise type(error)(
            f"{option} must name a file that can be read, got {path}: {error.strerror or error}"
        ) from None
