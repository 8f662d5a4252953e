"""Carry a worker's errors to the caller: vLLM passes on the text of an exception without its type, and adds its own."""

import contextlib
import re
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from typing import Any

from mft.checks import nearest

DEAD = (
    "vLLM's engine must run, got a dead one (its log says why): start it again; base and masks on disk are as they were"
)
PER_REQUEST = (
    "task must come with each request, as its model or as lora_request=mft.vllm.request_of(llm, task), because this "
    "vLLM has masks per request: start it without --per-request (per_request=True) to switch or update"
)
SECONDS = 0.5  # between two checks that the engine lives; a dead engine leaves a call unanswered
_MARK = "mft: "
_SAID = re.compile(rf"{_MARK}(.*?)(?:', please check the stack trace above for the root cause)?\Z", re.DOTALL)


@contextlib.contextmanager
def mark_errors() -> Iterator[None]:
    """Mark errors in the block that the worker's caller can fix. Used in a worker."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{_MARK}{error}") from error


@contextlib.contextmanager
def unmark_errors() -> Iterator[None]:
    """Turn the marked errors of a worker into plain ones. Raises: ValueError; RuntimeError if it is dead."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise RuntimeError(DEAD) from error
        said = sentence_of(error)
        if said is None:
            raise
        raise ValueError(said) from None


def call_while_alive(call: Callable[[], None], is_dead: Callable[[], bool]) -> None:
    """Run call in a daemon thread. Raises: as call; RuntimeError if the engine dies meanwhile."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001  # done.result() raises it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([done], SECONDS).done:
        if is_dead():
            raise RuntimeError(DEAD)
    done.result()


def check_known(task: Any, tasks: Collection[str], base: str = "") -> None:
    """Raise ValueError unless task is one of tasks; base: words for what else it may be."""
    if task not in tasks:
        known = ", ".join(tasks) or "none"
        raise ValueError(f"task must be one of the server's ({known}){base}, got {task!r}{nearest(str(task), tasks)}")


def sentence_of(error: BaseException) -> str | None:
    """Return the message that mark_errors() marked, or None for any other error."""
    found = _SAID.search(str(error))
    return found.group(1) if found else None
