"""Leases: which process works on what in a directory that machines share, without a server and without a common clock.

A lease on NAME is a file leases/NAME.GENERATION. Whoever creates it holds NAME, and counts up in it every few seconds.
Who sees it unchanged for long by its own monotonic clock takes over: it creates the next generation.

A lease saves work, and promises nothing: a holder that was stopped may wake up and go on. So what two may write at once
has to be written by atomic.publish(), of which one wins.
"""

import contextlib
import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.files.atomic import NotWritten, naming

FOLDER = "leases"
_MOST = 4096  # bytes of a lease that are read
_DIGITS = 20  # of its counter
_UNKNOWN = "somebody whom the file does not name"


@dataclass(frozen=True)
class Pace:
    """Seconds: between two beats of a holder, until an unchanged lease is dead, between two looks of who waits.

    All processes of a study must have the same ones. 12 beats may be late, which a busy machine or disk does to some.
    """

    beat: float = 5.0
    expiry: float = 60.0
    look: float = 2.0


@dataclass
class _Seen:
    """A lease as it was when it last changed; times are this process's own, of its monotonic clock."""

    content: bytes
    since: float  # after it was first read so
    looked: float


class Leases:
    """Those of one process on a study's directory, while it is entered."""

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda words: None, pace: Pace | None = None):
        self.folder, self.pace, self.nonce = directory / FOLDER, pace or Pace(), secrets.token_hex(4)
        self._say = say
        owner = {"host": socket.gethostname(), "process": os.getpid(), "nonce": self.nonce, **_process(os.getpid())[0]}
        self._head = json.dumps(owner).encode() + b"\n"
        self._held: dict[str, Path] = {}
        self._seen: dict[Path, _Seen] = {}
        self._listed: tuple[float, list[Path]] = (float("-inf"), [])
        self._count = 0
        self._lock = threading.Lock()  # of what the thread that beats shares with the process's own
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            with contextlib.suppress(OSError):  # left behind, it expires
                self.release(name)
        with contextlib.suppress(OSError):  # others' are in it
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Hold name from now on, if nobody who is alive does. Raises: NotWritten."""
        before = self._latest(name)
        if before is not None and not self._is_dead(before):
            return False
        generation = 1 if before is None else _generation(before) + 1
        path = self.folder / f"{name}.{generation}"
        with naming(path):
            if not self._create(path):
                return False  # another was faster
        if before is not None:
            self._say(f"{name}: taken over from {self._owner(before)}, which is gone")
        with self._lock:
            self._held[name] = path
        return True

    def release(self, name: str) -> None:
        """Hold name no more. Raises: NotWritten."""
        with self._lock:
            path = self._held.pop(name, None)
        if path is None or not self._is_ours(path):
            return
        with naming(path, "deleted"):
            for older in range(1, _generation(path)):
                (self.folder / f"{name}.{older}").unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Hold name while the block runs, from when nobody else does."""
        while not self.take(name):
            self.wait()
        try:
            yield
        finally:
            self.release(name)

    def once(self, name: str, done: Callable[[], bool], make: Callable[[], None]) -> bool:
        """Make what is not done, in one process of all; others wait for it. Whether it was this one."""
        while not done():
            if self.take(name):
                try:
                    if not done():
                        make()
                        return True
                finally:
                    self.release(name)
            else:
                self.wait()
        return False

    def wait(self) -> None:
        """For as long as another may need; random, so that those who wait do not all come at once."""
        time.sleep(self.pace.look * random.uniform(0.5, 1.5))

    def enter(self, prefix: str, against: tuple[str, ...]) -> None:
        """Hold a lease of this process's own that begins with prefix, as long as this process works in the directory.

        Raises: RuntimeError if a process that is alive holds one of a prefix in against. To learn that it is dead can
            take pace.expiry seconds.
        """
        self.take(f"{prefix}{self.nonce}")
        alive = self._alive(against)
        if alive is not None:
            raise RuntimeError(self._refusal(alive))

    def has_others(self, prefix: str) -> bool:
        """Whether another process that is alive holds one of the prefix. It can take pace.expiry seconds to learn."""
        return self._alive((prefix,)) is not None

    def clear(self) -> None:
        """Delete what is not this process's own, when nobody else works here. Raises: NotWritten."""
        for path in self._others(("",)):
            with naming(path, "deleted"):
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------- private

    def _alive(self, prefixes: tuple[str, ...]) -> Path | None:
        """A lease of one of the prefixes whose holder is alive; those of the dead are deleted."""
        others, said = self._others(prefixes), False
        while others:
            for path in others:
                if self._is_dead(path):
                    with naming(path, "deleted"):
                        path.unlink(missing_ok=True)
                elif path in self._seen and self._has_changed(path):
                    return path
            others = self._others(prefixes)
            if others and not said:
                said = True
                who, seconds = self._owner(others[0]), f"{self.pace.expiry:g} s"
                self._say(f"{self.folder}: seeing for up to {seconds} whether {who} is alive")
            if others:
                time.sleep(min(self.pace.beat, self.pace.look) / 4)
        return None

    def _others(self, prefixes: tuple[str, ...]) -> list[Path]:
        with self._lock:
            own = list(self._held.values())
        found = (path for path in self._files() if path.name.startswith(prefixes))
        return [path for path in found if path not in own]

    def _refusal(self, path: Path) -> str:
        joins = path.name.startswith(JOINED)
        remedy = "pass --join too, or wait for it" if joins else "wait for it, or stop it and pass --join to each"
        return (
            f"output_dir {self.folder.parent} is in use by {self._owner(path)}, "
            f"{'one of several' if joins else 'which works alone'}: {remedy}"
        )

    def _files(self, age: float = 0.0) -> list[Path]:
        """All leases, as the folder was at most age seconds ago."""
        if time.monotonic() - self._listed[0] >= age:
            try:
                names = sorted(os.listdir(self.folder))
            except FileNotFoundError:
                names = []
            paths = [self.folder / name for name in names if name.rpartition(".")[2].isdigit()]
            self._listed = time.monotonic(), paths
        return self._listed[1]

    def _latest(self, name: str) -> Path | None:
        files = self._files(self.pace.look / 4)  # creation decides: what was made since is met there
        generations = [path for path in files if path.name.rpartition(".")[0] == name]
        return max(generations, key=_generation, default=None)

    def _create(self, path: Path) -> bool:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:  # another process has just removed the empty folder
                continue
            break
        try:
            os.write(descriptor, self._head + self._counter())
            os.fsync(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _counter(self) -> bytes:
        self._count += 1
        return b"%0*d\n" % (_DIGITS, self._count)

    def _beat_on(self) -> None:
        while not self._ended.wait(self.pace.beat):
            with self._lock:
                held = list(self._held.items())
            for name, path in held:
                try:
                    alive = self._beat(path)
                except OSError:  # of a full disk, say: what is to be written next tells it; until then others may wait
                    continue
                if not alive:
                    with self._lock:
                        self._held.pop(name, None)

    def _beat(self, path: Path) -> bool:
        """Count up; False if another has taken over. Never makes the file: it may have been removed in good order."""
        if path.with_name(f"{path.name.rpartition('.')[0]}.{_generation(path) + 1}").exists():
            return False
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not os.read(descriptor, _MOST).startswith(self._head):
                return False
            os.pwrite(descriptor, self._counter(), len(self._head))
        finally:
            os.close(descriptor)
        return True

    def _is_ours(self, path: Path) -> bool:
        return (_read(path) or b"").startswith(self._head)

    def _is_dead(self, path: Path) -> bool:
        """Whether a lease has not changed for long; it is read but now and then."""
        now, seen = time.monotonic(), self._seen.get(path)
        if seen is not None and now - seen.looked < min(self.pace.expiry / 4, self.pace.beat):
            return False
        content = _read(path)  # after now: it was so at least that long
        if content is None:
            self._seen.pop(path, None)
            return False
        if _is_gone(_owner_of(content)):
            return True
        if seen is None or seen.content != content:
            if not _owner_of(content) and seen is None:
                self._say(
                    f"{path} must say who holds it, got {content[:40]!r}: if it stays so for {self.pace.expiry:g} s, "
                    "another takes over"
                )
            after = time.monotonic()
            self._seen[path] = _Seen(content, after, after)
            return False
        seen.looked = now
        return now - seen.since >= self.pace.expiry

    def _has_changed(self, path: Path) -> bool:
        """Since the content that _is_dead() first saw, which stays there until this was asked."""
        content = _read(path)
        return content is not None and content != self._seen[path].content

    def _owner(self, path: Path) -> str:
        owner = _owner_of(_read(path) or b"")
        return f"process {owner['process']} on {owner['host']}" if owner else _UNKNOWN


ALONE, JOINED = "alone-", "joined-"  # prefixes, of a process that works alone and of one of several


@contextlib.contextmanager
def open_leases(
    directory: Path, say: Callable[[str], None] = lambda words: None, *, joins: bool, pace: Pace | None = None
) -> Iterator[Leases]:
    """The leases of a process that works in directory alone, or beside others that join.

    Raises: RuntimeError that names a process which works there and does not let this one. NotWritten.
    """
    with Leases(directory, say, pace) as leases:
        leases.enter(JOINED if joins else ALONE, (ALONE,) if joins else (ALONE, JOINED))
        if not joins:
            leases.clear()
        yield leases


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotWritten(
            f"{path} must be a lease that can be read ({error.strerror}): remove it if no process of this study runs"
        ) from error


def _generation(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _owner_of(content: bytes) -> dict[str, Any]:
    """Who holds it; nothing if it does not say."""
    try:
        owner = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and {"host", "process"} <= owner.keys() else {}


def _process(process: int) -> tuple[dict[str, str], str]:
    """What tells a process of this machine from every other there ever was, and its state; nothing without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "began": fields[18]}, state
    except (OSError, IndexError):
        return {}, ""


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended; False where that cannot be known."""
    here, _ = _process(os.getpid())
    if not here or owner.get("machine") != here["machine"] or not isinstance(owner["process"], int):
        return False
    now, state = _process(owner["process"])
    return not now or now["began"] != owner.get("began") or state in ("Z", "X")
