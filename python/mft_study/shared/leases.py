"""Leases say which process works on what in a directory that machines share, without a server or a common clock.

A lease on NAME is a file leases/NAME.GENERATION. The process that creates it holds NAME, and increases a counter in the
file every few seconds. A process that sees the file unchanged for long, by its own monotonic clock, takes over: it
creates the next generation.

A lease saves work, but guarantees nothing: a holder that was stopped may wake up and go on. Files that two processes
may write at once must therefore be written by atomic.publish(), which lets one of them win.
"""

import contextlib
import errno
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

from mft.files.atomic import NotWritten, convert_disk_errors
from mft.training.run_lock import ONE_OF_SEVERAL, WORKS_ALONE

FOLDER = "leases"
_MOST = 4096  # bytes of a lease that are read
_DIGITS = 20  # of a lease's counter
_UNKNOWN = "a process that the file does not name"


@dataclass(frozen=True)
class Pace:
    """Seconds between two beats of a holder, until an unchanged lease is dead, and between two looks of a waiter.

    All processes of a study must use the same pace. A lease is dead after 12 missed beats.
    """

    beat: float = 5.0
    expiry: float = 60.0
    look: float = 2.0


@dataclass
class _Seen:
    """The content of a lease since its last change. Times are from this process's monotonic clock."""

    content: bytes
    since: float  # just after this content was first read
    looked: float


class Leases:
    """The leases of one process on a study's directory, as a context manager."""

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda words: None, pace: Pace | None = None):
        self.folder, self.pace, self.nonce = directory / FOLDER, pace or Pace(), secrets.token_hex(4)
        self._say = say
        owner = {"host": socket.gethostname(), "process": os.getpid(), "nonce": self.nonce, **_process(os.getpid())[0]}
        self._head = json.dumps(owner).encode() + b"\n"
        self._held: dict[str, Path] = {}
        self._seen: dict[Path, _Seen] = {}
        self._listed: tuple[float, list[Path]] = (float("-inf"), [])
        self._count = 0
        self._lock = threading.Lock()  # guards what the beating thread shares with the main thread
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            with contextlib.suppress(OSError):  # a lease that is left behind expires
                self.release(name)
        with contextlib.suppress(OSError):
            for path in self._others((ALONE, JOINED)):
                if self._is_dead(path):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()  # fails if it still holds leases of others

    def take(self, name: str) -> bool:
        """Take the lease on name unless a live process holds it; return whether it was taken. Raises: NotWritten."""
        before = self._latest(name)
        if before is not None and not self._is_dead(before):
            return False
        generation = 1 if before is None else _generation(before) + 1
        path = self.folder / f"{name}.{generation}"
        with convert_disk_errors(path):
            if not self._create(path):
                return False  # another was faster
        for _ in os.walk(self.folder.parent):
            pass  # NFS remembers for 30 to 60 s that a file was absent, unless its folder is opened
        if before is not None:
            self._say(f"{name}: taken over from {self._owner(before)}, which is gone")
        with self._lock:
            self._held[name] = path
        return True

    def release(self, name: str) -> None:
        """Give up the lease on name. Raises: NotWritten."""
        with self._lock:
            path = self._held.pop(name, None)
        if path is None or not (_read(path) or b"").startswith(self._head):
            return
        with convert_disk_errors(path, "deleted"):
            for older in range(1, _generation(path)):
                (self.folder / f"{name}.{older}").unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Return whether this process took name and no other one has taken over, as far as the disk can say."""
        with self._lock:
            path = self._held.get(name)
        try:
            return path is not None and self._beat(path)
        except OSError:
            return True

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Wait until nobody else holds name, then hold it while the block runs."""
        while not self.take(name):
            self.wait()
        try:
            yield
        finally:
            self.release(name)

    def call_once(self, name: str, done: Callable[[], bool], make: Callable[[], None]) -> bool:
        """Call make in one of the processes unless it is done; the others wait. Returns: whether it was this one."""
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
        """Sleep for about pace.look seconds; at random, so that waiting processes do not all wake at once."""
        time.sleep(self.pace.look * random.uniform(0.5, 1.5))
        os.listdir(self.folder.parent)  # as in take(): a look then finds new folders

    def enter(self, *, joins: bool) -> None:
        """Hold a lease of this process's own while it works in the directory, alone or with others that join.

        Raises: RuntimeError if a live process works there that does not share the directory.
        """
        self.take(f"{JOINED if joins else ALONE}{self.nonce}")
        if (alive := self._alive((ALONE,) if joins else (ALONE, JOINED))) is not None:
            what = ONE_OF_SEVERAL if alive.name.startswith(JOINED) else WORKS_ALONE
            raise RuntimeError(f"output_dir {self.folder.parent} is in use by {self._owner(alive)}, {what}")
        if not joins:
            self._clear()

    def has_others(self, prefix: str) -> bool:
        """Return whether another live process holds a lease with the prefix. This can take pace.expiry seconds."""
        return self._alive((prefix,)) is not None

    # ---------------------------------------------------------------------------------------------- private

    def _clear(self) -> None:
        """Delete all leases but this process's own: nobody else works here. Raises: NotWritten."""
        for path in self._others(("",)):
            with convert_disk_errors(path, "deleted"):
                path.unlink(missing_ok=True)

    def _alive(self, prefixes: tuple[str, ...]) -> Path | None:
        """Return a lease with one of the prefixes whose holder is alive, or None. Delete leases of dead holders."""
        others, said = self._others(prefixes), False
        while others:
            for path in others:
                if self._is_dead(path):
                    with convert_disk_errors(path, "deleted"):
                        path.unlink(missing_ok=True)
                elif path in self._seen and self._has_changed(path):
                    return path
            others = self._others(prefixes)
            if others and not said:
                said = True
                who, seconds = self._owner(others[0]), f"{self.pace.expiry:g} s"
                self._say(f"{self.folder}: checking for up to {seconds} whether {who} is alive")
            if others:
                time.sleep(min(self.pace.beat, self.pace.look) / 4)
        return None

    def _others(self, prefixes: tuple[str, ...]) -> list[Path]:
        with self._lock:
            own = list(self._held.values())
        found = (path for path in self._files() if path.name.startswith(prefixes))
        return [path for path in found if path not in own]

    def _files(self, age: float = 0.0) -> list[Path]:
        """Return the paths of all leases, from a listing of the folder at most age seconds old."""
        if time.monotonic() - self._listed[0] >= age:
            try:
                names = sorted(os.listdir(self.folder))
            except FileNotFoundError:
                names = []
            except OSError as error:
                raise NotWritten(
                    f"{self.folder} must be a folder of leases that can be read ({error.strerror}): remove it if no "
                    "process of this study runs"
                ) from error
            paths = [self.folder / name for name in names if name.rpartition(".")[2].isdecimal()]
            self._listed = time.monotonic(), paths
        return self._listed[1]

    def _latest(self, name: str) -> Path | None:
        files = self._files(self.pace.look / 4)  # _create() fails if a lease was made since
        generations = [path for path in files if path.name.rpartition(".")[0] == name]
        return max(generations, key=_generation, default=None)

    def _create(self, path: Path) -> bool:
        while True:
            with contextlib.suppress(FileExistsError):  # exist_ok fails if it vanishes meanwhile
                self.folder.mkdir(parents=True)
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
                except OSError:  # a full disk, say: the next write of a result reports it; until then others may wait
                    continue
                if not alive:
                    with self._lock:
                        self._held.pop(name, None)

    def _beat(self, path: Path) -> bool:
        """Increase the counter; False if another process has taken over, or the file is gone. Never create it."""
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

    def _is_dead(self, path: Path) -> bool:
        """Return whether a lease's holder has ended or not beaten for pace.expiry seconds; read only now and then."""
        now, seen = time.monotonic(), self._seen.get(path)
        if seen is not None and now - seen.looked < min(self.pace.expiry / 4, self.pace.beat):
            return False
        content = _read(path)  # read after now was taken, so it lasted at least until then
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
        """Return whether the lease has changed since _is_dead() noted its content."""
        content = _read(path)
        return content is not None and content != self._seen[path].content

    def _owner(self, path: Path) -> str:
        owner = _owner_of(_read(path) or b"")
        return f"process {owner['process']} on {owner['host']}" if owner else _UNKNOWN


ALONE, JOINED = "alone-", "joined-"  # prefixes of the lease of a process that works alone, or of one of several


@contextlib.contextmanager
def open_leases(
    directory: Path, say: Callable[[str], None] = lambda words: None, *, joins: bool, pace: Pace | None = None
) -> Iterator[Leases]:
    """Open the leases of a process that works in directory, alone or together with others that join.

    Raises: RuntimeError that names a process which works there and does not share the directory. NotWritten.
    """
    with Leases(directory, say, pace) as leases:
        leases.enter(joins=joins)
        yield leases


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # deleted on NFS
            return None
        raise NotWritten(
            f"{path} must be a lease that can be read ({error.strerror}): remove it if no process of this study runs"
        ) from error


def _generation(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _owner_of(content: bytes) -> dict[str, Any]:
    """Return who holds a lease, from its content; {} if it does not say."""
    try:
        owner = json.loads(content.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and {"host", "process"} <= owner.keys() else {}


def _process(process: int) -> tuple[dict[str, str], str]:
    """Return what identifies a process of this machine among all that ever ran, and its state; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "began": fields[18]}, state
    except (OSError, IndexError):
        return {}, ""


def _is_gone(owner: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended; False if that cannot be known."""
    here, _ = _process(os.getpid())
    if not here or owner.get("machine") != here["machine"] or not isinstance(owner["process"], int):
        return False
    now, state = _process(owner["process"])
    return not now or now["began"] != owner.get("began") or state in ("Z", "X")
