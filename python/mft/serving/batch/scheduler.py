"""Schedule generations: they wait in a queue, join the running batch between two tokens, and leave as soon as they end.

One thread runs the model. Between two tokens of the running rows, it reads at most one prompt.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from mft.serving.batch.generation import Generation
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.refusal import Refused


class Scheduler:
    """Runs the batch. rows, waiting: most generations at once, and most others. timeout: seconds, or None."""

    def __init__(self, batch: RunningBatch, *, rows: int, waiting: int, timeout: float | None = None) -> None:
        self._batch, self._rows, self._most_waiting, self._timeout = batch, rows, waiting, timeout
        self.on_end: Callable[[], None] = lambda: None  # called when the thread ends
        self.on_step: Callable[[int], None] = lambda rows: None  # called on the thread with each step's number of rows
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # row i of the batch
        self._retiring: dict[str, Callable[[], None]] = {}
        self.is_closing = self.is_cut = self.has_failed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mft serve", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of running and of waiting generations."""
        with self._changed:
            return len(self._running), len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """The bytes of the batch's keys and values."""
        return self._batch.cache_bytes

    def submit(self, generation: Generation) -> None:
        """Queue a generation. Raises: Refused if there is no place, the server is stopping or the task was unloaded."""
        with self._changed:
            if self.is_closing:
                raise Refused("the server must be running, got one that is stopping: ask another", status=503)
            if len(self._running) + len(self._waiting) >= self._rows + self._most_waiting:
                most = self._rows + self._most_waiting
                raise Refused(
                    f"requests must be at most {most} at once, {self._rows} answered (--rows) and "
                    f"{self._most_waiting} waiting (--waiting), got one more: try again later",
                    status=429,
                    code="rate_limit_exceeded",
                )
            if generation.task in self._retiring or not self._batch.knows(generation.task):  # since it was read
                raise Refused(
                    f"model must be loaded, got {generation.task!r}, which has just been unloaded: ask for another",
                    status=404,
                    param="model",
                    code="model_not_found",
                )
            self._waiting.append(generation)
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Free a generation's place before the next token. This does nothing if the generation is over."""
        with self._changed:
            generation.is_cancelled = True
            if generation in self._waiting:
                self._waiting.remove(generation)
                self._tell_unused()

    def retire(self, task: str, unused: Callable[[], None]) -> None:
        """Accept no more requests of this task. unused: called once, on any thread, when it has no requests left."""
        with self._changed:
            self._retiring[task] = unused
            self._tell_unused()

    def is_retiring(self, task: str) -> bool:
        return task in self._retiring

    def close(self) -> None:
        """Accept no more generations. Those that were accepted are answered, and then the thread ends."""
        with self._changed:
            self.is_closing = True
            self._changed.notify()

    def cut(self) -> None:
        """Close, and refuse all unfinished generations before the next token."""
        with self._changed:
            self.is_closing = self.is_cut = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout)

    # ---------------------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        is_done = False
        try:
            while self._work():
                pass
            is_done = True
        finally:  # threading prints what was raised
            self.has_failed = not is_done
            self.close()
            self._refuse_all(Refused("the server must be running, got one that failed", status=500))
            with self._changed:
                self._running = []
                self._tell_unused()
            self.on_end()

    def _work(self) -> bool:
        """Read a prompt if there is a place for it, and generate a token for each row. Returns: whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self.is_closing)
            if self.is_cut:
                self._refuse_all(Refused("the server must be running, got one that is stopping", status=503))
            self._refuse_late()
            self._leave()
            joining = self._waiting.popleft() if self._waiting and len(self._running) < self._rows else None
            if joining is not None:
                joining.joined = time.monotonic()
                self._running.append(joining)
            elif not self._running:
                return not self.is_closing
        if joining is not None:
            with joining.isolating_errors():
                read = self._batch.read(joining.task, joining.prompt)
            if not joining.is_over:
                joining.advance(self._batch.add(joining.task, joining.prompt, *read))
            with self._changed:
                self._leave()
        if self._running:
            logits = self._batch.step([each.last for each in self._running])
            self.on_step(len(self._running))
            for each, row in zip(self._running, logits, strict=True):
                each.advance(row)
        return True

    def _leave(self) -> None:
        """Remove the rows that are over or cancelled."""
        stay = [row for row, each in enumerate(self._running) if not (each.is_over or each.is_cancelled)]
        if len(stay) < len(self._running):
            self._batch.keep(stay)
            self._running = [self._running[row] for row in stay]
        self._tell_unused()

    def _tell_unused(self) -> None:
        if not self._retiring:
            return
        used = {each.task for each in (*self._running, *self._waiting)}
        for task in [task for task in self._retiring if task not in used]:
            self._retiring[task]()
            del self._retiring[task]

    def _refuse_late(self) -> None:
        """Refuse generations that have exceeded the timeout. They leave the batch and the queue."""
        if self._timeout is None:
            return
        began_before = time.monotonic() - self._timeout
        for each in (*self._running, *self._waiting):
            if each.began < began_before and not each.is_over:
                each.refuse(
                    Refused(
                        f"a request must be answered within {self._timeout:g} s (--timeout), got {each.tokens} tokens "
                        "by then: ask for fewer by max_tokens, or try again when fewer requests wait",
                        status=504,
                        code="timeout",
                    )
                )
        self._waiting = deque(each for each in self._waiting if not each.is_over)

    def _refuse_all(self, refused: Refused) -> None:
        with self._changed:
            for each in (*self._running, *self._waiting):
                if not each.is_over:
                    each.refuse(refused)
            self._waiting.clear()
