"""The cache of fetched and derived files: $MFT_CACHE, else ~/.cache/mft. All of it may be deleted."""

import hashlib
import os
from pathlib import Path

from mft.files.regular_file import open_regular


def cache_root(directory: str | os.PathLike | None = None) -> Path:
    """Return the cache directory; it is created if it does not exist."""
    root = Path(directory or os.environ.get("MFT_CACHE") or Path.home() / ".cache" / "mft").expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"the cache directory {root} cannot be made ({error.strerror}): "
            "set MFT_CACHE to a directory that you may write"
        ) from error
    if not os.access(root, os.W_OK):
        raise RuntimeError(f"the cache directory {root} is not writable: set MFT_CACHE to one that is")
    return root


def sha256_of(path: str | os.PathLike) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes. Raises: as open_regular."""
    with open_regular(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
