"""Work on a second core while the first one reads: hashes, and the next layer's weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Made = TypeVar("Made")


class Digest:
    """The SHA-256 of bytes that come in pieces, computed in a thread of its own. A piece must not change afterwards."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def update(self, piece: np.ndarray) -> None:
        self._wait()  # at most one pending piece, since pending pieces take memory
        self._pending = self._pool.submit(self._digest.update, piece.data)

    def hexdigest(self) -> str:
        """Return the digest of all pieces, and end the thread."""
        self._wait()
        self._pool.shutdown()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def make_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield map(make, items). Each result is made while the caller uses the one before it."""
    with ThreadPoolExecutor(1) as pool:
        before: Future | None = None
        for item in items:
            now = pool.submit(make, item)
            if before is not None:
                yield before.result()
            before = now
        if before is not None:
            yield before.result()
