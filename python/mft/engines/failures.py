"""Report the failure of one process to the others, with its error message.

    process 1 fails          it puts its error message in the store, and leaves
    the others               their collectives end when its sockets close, and they read the message;
                             a process that has not left after GRACE seconds, whatever it is doing, is ended

A process that was killed leaves no message. Each process increments a counter in the store twice per second (a beat),
so the others see whose counter has stopped.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch.distributed as dist

BEAT = 0.5  # seconds between two looks at the store
GRACE = 8.0  # seconds after a failure became known, so that a checkpoint can be finished
SILENCE = 3.0  # seconds without a beat, after a collective has failed: six beats
_FAREWELL = 3.0  # seconds that the first process waits for the others
_FIRST = "first failure"
_EXIT_CODE = 2  # as for an error of the command line


class OtherFailed(RuntimeError):
    """Another process has failed, so this one ends too.

    Args: ranks: those that failed, empty if torchrun failed; count: of all processes; words: the error message, or None
        if the processes were killed.
    """

    def __init__(self, ranks: Sequence[int], count: int, words: str | None) -> None:
        numbers = " and ".join(map(str, ranks))
        who = f"process{'es' if len(ranks) > 1 else ''} {numbers} of {count}" if ranks else "torchrun"
        super().__init__(
            f"{who} ended without an error message (killed? out of memory?), so all processes end: look at the "
            "system's log (dmesg), then go on with --resume"
            if words is None
            else f"{who} has stopped, so all processes stop: {words}"
        )
        self.ranks, self.words = tuple(ranks), words


class Failures:
    """Tells the other processes about a failure of this one, and ends this one some time after a failure of theirs.

    store: of the process group's rendezvous; count: number of all processes.
    """

    def __init__(self, store: dist.Store, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        own = store.clone()  # type: ignore[attr-defined]  # (not in torch's stubs) the first connection may be blocked
        self._store = dist.PrefixStore("mft", own)
        self._first: OtherFailed | None = None  # set as soon as this process knows it
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mft failures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the others: from now on no failure of theirs ends this process."""
        self._left.set()
        self._thread.join()

    def report(self, error: BaseException) -> None:
        """Tell the others of the error that ends this process. Raises: OtherFailed if another failed first."""
        follows = isinstance(error, OtherFailed) or _is_of_a_collective(error)
        with _deaf_to_torchrun():
            try:
                if self._first is None:
                    self._first = self._first_after(error, follows)
                self._bid_farewell()
            except dist.DistError:
                if follows and self._first is None:
                    self._first = self._failure_of_store()
        self.close()
        if follows and self._first is not None and self._rank not in self._first.ranks:
            raise self._first from error
        if isinstance(error, Exception) and "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)  # torchrun shows it as the cause of the run's end

    # ---------------------------------------------------------------------------------------------- private

    def _first_after(self, error: BaseException, follows: bool) -> OtherFailed:
        """Return the first failure: this error, unless another process has failed before."""
        if isinstance(error, OtherFailed):
            return self._store_failure(error.ranks, error.words)
        words = f"{type(error).__name__}: {error}"
        return (self._wait_for_words() if follows else None) or self._store_failure([self._rank], words)

    def _wait_for_words(self) -> OtherFailed | None:
        """Return the first failure; if none is reported, that of the processes without a beat; None if all beat."""
        until, before = time.monotonic() + SILENCE, self._beats()
        while time.monotonic() < until:
            if (first := self._stored_failure()) is not None:
                return first
            time.sleep(BEAT / 10)
        gone = [rank for rank, (old, new) in enumerate(zip(before, self._beats())) if old == new]
        return self._store_failure(gone, None) if gone else None

    def _store_failure(self, ranks: Sequence[int], words: str | None) -> OtherFailed:
        """Store this failure unless the store already has one; return the one in the store."""
        self._store.compare_set(_FIRST, "", json.dumps([ranks, words]))
        first = self._stored_failure()
        assert first is not None, "it has just been put there"
        return first

    def _stored_failure(self) -> OtherFailed | None:
        """Return the first failure, or None if the store has none."""
        if not self._store.check([_FIRST]):
            return None
        ranks, words = json.loads(self._store.get(_FIRST))
        return OtherFailed(ranks, self._count, words)

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat {rank}", 0) for rank in range(self._count)]

    def _failure_of_store(self) -> OtherFailed:
        """Return the failure of the process that held the store: torchrun or rank 0."""
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return OtherFailed([] if of_torchrun else [0], self._count, None)

    def _watch(self) -> None:
        """Beat until this process leaves. End it if it has not left GRACE seconds after the first failure."""
        while self._first is None and not self._left.wait(BEAT):
            try:
                self._store.add(f"beat {self._rank}", 1)
                if (first := self._stored_failure()) is not None:
                    self._first = first
                    self._store.set(f"heard {self._rank}", "")
            except dist.DistNetworkError:
                self._first = self._failure_of_store()
        if self._first is not None and not self._left.wait(GRACE):
            _end(self._first)

    def _bid_farewell(self) -> None:
        """Let the first process, which may hold the store, wait until the others have read it: at most _FAREWELL."""
        self._store.set(f"heard {self._rank}", "")
        if self._rank > 0 or self._first is None:
            return
        others = [f"heard {rank}" for rank in range(1, self._count) if rank not in self._first.ranks]
        until = time.monotonic() + _FAREWELL
        while others and not self._store.check(others) and time.monotonic() < until:
            time.sleep(BEAT / 10)


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised the error. gloo has no error class of its own, but names its source file."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))


@contextlib.contextmanager
def _deaf_to_torchrun() -> Iterator[None]:
    """Ignore the SIGTERM that torchrun sends once one process has ended: this one ends by itself, and says why."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(first: OtherFailed) -> NoReturn:
    """End the process from a thread: the main thread waits in C++ or computes, and cannot be interrupted."""
    sys.stderr.write(f"error: {first}\n")
    sys.stderr.flush()
    os._exit(_EXIT_CODE)
