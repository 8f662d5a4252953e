"""Which known name a mistyped one was probably meant to be."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

_LONGEST = 200  # characters of a name that somebody typed


def nearest(name: str, known: Iterable[str], *, prefix: str = "", paths: Mapping[str, str] | None = None) -> str:
    """ "; did you mean X?" for the closest of known, or "" when none is close.

    prefix stands before the name in the answer; paths maps an answer's full path to its name.
    """
    if len(name) > _LONGEST:
        return ""
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if not close:
        return ""
    answer = folded[close[0]]
    if paths is not None:
        answer = " or ".join(path for path, last in paths.items() if last == answer)
    return f"; did you mean {prefix}{answer}?"


def nearest_path(path: Path) -> str:
    """The same for a file or directory that is not there, among its neighbours."""
    if not path.parent.is_dir():
        return f" (nor {path.parent})"
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()], prefix=f"{path.parent}/")
