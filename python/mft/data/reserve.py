"""The reserve: documents of a built-in source that no study has read, kept for one last test.

reserve.txt lists them by a hash of their text. They are header files of torch 2.13.0 from validation and test, beyond
those that the largest study used. Other runs never read them: load_splits leaves their rows out of validation and test.
``data.subset: reserve`` makes them the test split instead; training and validation stay the same. The library source
has no reserve, because studies have read every held-out file. A mix or a stream of headers leaves nothing out.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

RESERVE = "reserve"  # value of data.subset
RESERVED_SOURCE = "headers"
_LIST = Path(__file__).with_name("reserve.txt")
_DIGITS = 32


def find_reserved(texts: Sequence[str]) -> frozenset[int]:
    """Return the indices of the texts that are in the reserve."""
    known, digests = _hashes(), (hashlib.sha256(text.encode("utf-8")).hexdigest() for text in texts)
    return frozenset(number for number, digest in enumerate(digests) if digest[:_DIGITS] in known)


@functools.cache
def _hashes() -> frozenset[str]:
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line.split()[0] for line in lines if not line.startswith("#"))
