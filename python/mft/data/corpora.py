"""The running interpreter's own library source: a real code corpus on every machine.

Left out: tests (their text repeats), installed packages, and generated files, whose near-duplicates would stand on both
sides of the split (the tables of encodings, pydoc_data, build settings).
"""

import os
import platform
import sysconfig
import tokenize
from pathlib import Path

EXCLUDED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")  # one machine's build settings
MINIMUM_CHARACTERS = 200  # an empty __init__.py teaches nothing


def stdlib_files(directory: str | os.PathLike | None = None) -> dict[str, str]:
    """{relative path: source} in order of path."""
    root = Path(directory or sysconfig.get_path("stdlib"))
    sources = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if _wanted(name)]
        for name in names:
            if name.endswith(".py") and _wanted(name):
                path = Path(folder) / name
                source = _read_source(path)
                if len(source) >= MINIMUM_CHARACTERS:
                    sources[path.relative_to(root).as_posix()] = source
    return dict(sorted(sources.items()))


def describe_stdlib() -> str:
    """Which library, and what of it was left out."""
    left_out = ", ".join(sorted(EXCLUDED_DIRECTORIES - {"__pycache__"}))
    return f"the library source of Python {platform.python_version()}, without {left_out} and generated build settings"


def _wanted(name: str) -> bool:
    return name not in EXCLUDED_DIRECTORIES and not name.startswith(EXCLUDED_PREFIXES)


def _read_source(path: Path) -> str:
    """The text in the encoding that the file declares; "" if it is not text, as some files of lib2to3 are."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
