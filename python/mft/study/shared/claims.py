"""What a process of a study may do: all of it where it works alone; beside others what it has claimed, told once."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mft.files.atomic import place, publish, write_whole
from mft.study.shared.leases import Leases


class Claims(Protocol):
    """Names stand for pieces of work; a result is told under a path, which nobody writes twice."""

    shares: bool  # whether results may come from others, and files may go

    def take(self, name: str, done: Callable[[], bool]) -> bool:
        """Whether this process is to do the work: nobody else does, and it is not done."""
        ...

    def release(self, name: str) -> None: ...

    def own(self, trained: Path) -> Path:
        """Where this process writes weights that are to become trained."""
        ...

    def tell(self, path: Path, result: str, own: Path | None = None, trained: Path | None = None) -> None:
        """Write a result, and put the weights that belong to it in their place."""
        ...

    def once(self, name: str, done: Callable[[], bool], make: Callable[[], None]) -> bool:
        """Make what is not done; whether it was this process."""
        ...

    def wait(self) -> None:
        """For others, which hold all that could be done."""
        ...

    @property
    def look(self) -> float | None:
        """Seconds after which to see what others did; None: there are none."""
        ...


class Alone:
    """One process has the directory."""

    shares = False
    look = None

    def take(self, name: str, done: Callable[[], bool]) -> bool:
        return True

    def release(self, name: str) -> None:
        pass

    def own(self, trained: Path) -> Path:
        return trained

    def tell(self, path: Path, result: str, own: Path | None = None, trained: Path | None = None) -> None:
        write_whole(path, result)

    def once(self, name: str, done: Callable[[], bool], make: Callable[[], None]) -> bool:
        if done():
            return False
        make()
        return True

    def wait(self) -> None:
        raise AssertionError("alone, a process does what is ready")


class Joined:
    """One of several. Where two did the same work, since one was thought to be dead, the first to tell it counts."""

    shares = True

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self.once, self.wait, self.release = leases.once, leases.wait, leases.release
        self.look: float | None = leases.pace.look

    def take(self, name: str, done: Callable[[], bool]) -> bool:
        if not self._leases.take(name):
            return False
        if done():  # it was told between the last look and the claim
            self._leases.release(name)
            return False
        return True

    def own(self, trained: Path) -> Path:
        return trained.with_name(f".{trained.name}.{secrets.token_hex(4)}.tmp")

    def tell(self, path: Path, result: str, own: Path | None = None, trained: Path | None = None) -> None:
        """Weights go where they belong only after their result was told, or if it had been and they were lost."""
        known = path.exists()
        first = publish(path, result)
        if own is None or trained is None or not own.exists():
            return
        if first or known:
            place(own, trained)
        else:
            own.unlink(missing_ok=True)
