"""Compute the digest of the sources that a library was built from, which setup.py writes into _build.json."""

import hashlib
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc"


def digest(folder: Path = SOURCES) -> str:
    """Return the SHA-256 of the names and contents of all files under folder, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()
