"""Which work a process of a study may do: all of it if it works alone; together with others, what it has claimed."""

import secrets
from collections.abc import Callable
from pathlib import Path

from mft.files.atomic import NotWritten, place, publish, write_whole
from mft_study.shared.leases import Leases


class Alone:
    """One process has the directory."""

    shares = False  # whether other processes may add results and delete files
    look = None  # seconds after which to look at what others did

    def take(self, name: str, done: Callable[[], bool]) -> bool:
        """Return whether this process is to do the work: nobody else does, and it is not done."""
        return True

    def release(self, name: str) -> None:
        pass

    def holds(self, name: str) -> bool:
        """Return whether no other process has taken over what take() claimed."""
        return True

    def scratch_path(self, trained: Path) -> Path:
        """Return where this process writes weights that will later be at trained."""
        return trained

    def tell(self, path: Path, result: str, own: Path | None = None, trained: Path | None = None) -> None:
        """Write a result, and move the weights that belong to it from own to trained."""
        write_whole(path, result)

    def call_once(self, name: str, done: Callable[[], bool], make: Callable[[], None]) -> bool:
        """Call make unless it is done. Returns: whether this process called it."""
        if done():
            return False
        make()
        return True

    def wait(self) -> None:
        """Wait for other processes, which hold all work that could be done."""
        raise AssertionError("alone, a process does what is ready")


class Joined:
    """One of several processes. If two did the same work, because one seemed dead, the first result written counts."""

    shares = True

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self.call_once, self.wait = leases.call_once, leases.wait
        self.release, self.holds = leases.release, leases.holds
        self.look: float | None = leases.pace.look

    def take(self, name: str, done: Callable[[], bool]) -> bool:
        if not self._leases.take(name):
            return False
        if done():  # its result was written between the last look and the claim
            self._leases.release(name)
            return False
        return True

    def scratch_path(self, trained: Path) -> Path:
        return trained.with_name(f".{trained.name}.{secrets.token_hex(4)}.tmp")

    def tell(self, path: Path, result: str, own: Path | None = None, trained: Path | None = None) -> None:
        """Write a result; move its weights only if this write won, or if they replace lost ones of an older result."""
        known = path.exists()
        first = publish(path, result)
        if own is None or trained is None or not own.exists():
            return
        try:
            if first or known:
                place(own, trained)
            else:
                own.unlink(missing_ok=True)
        except NotWritten:
            if own.exists():  # otherwise this process had stopped, and another one has deleted them
                raise


Claims = Alone | Joined  # on pieces of work, by name; a result is written under its path once
