"""Schedule generations: they wait in a queue, join the running batch between two tokens, and leave as soon as they end.

One thread runs the model. What waits joins if there are a row and memory for it; the longest-waiting of a key is first.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from mft.serving.batch.fair_queue import FairQueue
from mft.serving.batch.generation import Generation, advance_all
from mft.serving.batch.running_batch import Logits, RunningBatch
from mft.serving.batch.slabs import Row
from mft.serving.refusal import Refused

logger = logging.getLogger(__name__)


class Scheduler:
    """Runs the batch. rows, waiting: most generations at once, and most others. timeout: seconds, or None."""

    def __init__(self, batch: RunningBatch, *, rows: int, waiting: int, timeout: float | None = None) -> None:
        self._batch, self._rows, self._most_waiting, self._timeout = batch, rows, waiting, timeout
        self.on_end: Callable[[], None] = lambda: None  # called when the thread ends
        self.on_step: Callable[[int], None] = lambda rows: None  # called on the thread with each step's number of rows
        self.on_turn: Callable[[], None] = lambda: None  # called on the thread when generations may have made pieces
        self._waiting = FairQueue()
        self._running: dict[Row, Generation] = {}  # the oldest first
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
        return self._batch.slabs.bytes

    @property
    def most(self) -> int:
        """The most generations at once, running or waiting."""
        return self._rows + self._most_waiting

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue the generations of one request, all or none.

        Raises: Refused if there is no place, the server is stopping or the task was unloaded.
        """
        first = generations[0]
        with self._changed:
            if self.is_closing:
                raise Refused("the server must be running, got one that is stopping: ask another", status=503)
            share, waiting = self._waiting.share(first.key, self._most_waiting)
            free = self._rows - len(self._running) + share  # those that wait for a free row take no share
            if waiting + len(generations) > free:
                raise self._too_many(share, len(generations))
            if first.task in self._retiring or first.task not in (None, *self._batch.bank.tasks):  # since it was read
                raise Refused(
                    f"model must be loaded, got {first.task!r}, which has just been unloaded: ask for another",
                    status=404,
                    param="model",
                    code="model_not_found",
                )
            for generation in generations:
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

    def _too_many(self, share: int, asked: int) -> Refused:
        rule = (
            f"requests must be at most {self._rows + share} at once, {self._rows} answered (--rows) and "
            f"{share} waiting (--waiting)"
        )
        if share < self._most_waiting:
            rule = (
                f"requests that wait must be at most {share} for each key, its equal share of {self._most_waiting} "
                "places (--waiting)"
            )
        return Refused(f"{rule}, got {asked} more: try again later", status=429, code="rate_limit_exceeded")

    # ---------------------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        is_done = False
        try:
            while self._work():
                self.on_turn()
            is_done = True
        finally:  # threading prints what was raised
            self.has_failed = not is_done
            self.close()
            self._refuse_all(Refused("the server must be running, got one that failed", status=500))
            self.on_turn()
            with self._changed:
                self._running = {}
                self._tell_unused()
            self.on_end()

    def _work(self) -> bool:
        """Admit what there is room for, and let each row read what is new of it. Returns: whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self.is_closing)
            if self.is_cut:
                self._refuse_all(Refused("the server must be running, got one that is stopping", status=503))
            self._refuse_late()
            self._leave()
            for row in self._batch.make_room():
                self._waiting.appendleft(self._running.pop(row))
            self._admit()
            if not self._running:
                return not self.is_closing
        found = self._step()
        self.on_step(len(self._running))
        ready = []
        for row, first, logits in found:
            if first < row.wants:
                self._running[row].see_prompt(first, logits)
            if first + len(logits) == len(row.tokens):
                ready.append((row, self._running[row], logits[-1]))
        if ready:
            advance_all([each for _, each, _ in ready], torch.stack([logits for *_, logits in ready]))
        for row, generation, _ in ready:
            if not generation.is_over:
                row.tokens.append(generation.chosen[-1])
        return True

    def _admit(self) -> None:
        """Let those that wait join, in their order, as long as there are rows and memory."""
        while self._waiting and len(self._running) < self._rows:
            generation = self._waiting.peek()
            wants = len(generation.prompt) if generation.reads_prompt and not generation.chosen else 0
            row = Row(generation.task, [*generation.prompt, *generation.chosen], wants)
            if not self._batch.join(row):
                return
            self._running[row] = self._waiting.popleft()
            generation.joined = generation.joined or time.monotonic()

    def _step(self) -> list[Logits]:
        """Let all rows read. If this fails, let each do so alone, so that only those fail that cause it."""
        try:
            return self._batch.step()
        except Exception:
            logger.exception("a step of %d rows failed, each is tried alone", len(self._running))
        found = []
        for row, generation in self._running.items():
            with generation.isolating_errors():
                found += self._batch.step([row])
        return found

    def _leave(self) -> None:
        """Remove the rows that are over or cancelled."""
        for row, each in reversed([*self._running.items()]):  # so that rows that end together are not moved
            if each.is_over or each.is_cancelled:
                self._batch.leave(row)
                del self._running[row]
        self._tell_unused()

    def _tell_unused(self) -> None:
        if not self._retiring:
            return
        used = {each.task for each in (*self._running.values(), *self._waiting)}
        for task in [task for task in self._retiring if task not in used]:
            self._retiring[task]()
            del self._retiring[task]

    def _refuse_late(self) -> None:
        """Refuse generations that have exceeded the timeout. They leave the batch and the queue."""
        if self._timeout is None:
            return
        began_before = time.monotonic() - self._timeout
        for each in (*self._running.values(), *self._waiting):
            if each.began < began_before and not each.is_over:
                each.refuse(
                    Refused(
                        f"a request must be answered within {self._timeout:g} s (--timeout), got {each.tokens} tokens "
                        "by then: ask for fewer by max_tokens, or try again when fewer requests wait",
                        status=504,
                        code="timeout",
                    )
                )
        for each in [each for each in self._waiting if each.is_over]:
            self._waiting.remove(each)

    def _refuse_all(self, refused: Refused) -> None:
        with self._changed:
            for each in (*self._running.values(), *self._waiting):
                if not each.is_over:
                    each.refuse(refused)
            self._waiting = FairQueue()
