"""What a worker refuses, told to whoever asked.

vLLM hands on the text of an exception without its type, and puts text of its own around it.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

DEAD = (
    "vLLM's engine must run, got a dead one (its log says why): start it again; base and masks on disk are as they were"
)
SECONDS = 0.5  # between two looks at an engine, which leaves a call unanswered if it dies meanwhile
_MARK = "mft: "
_SAID = re.compile(rf"{_MARK}(.*?)(?:', please check the stack trace above for the root cause)?\Z", re.DOTALL)


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """In a worker: what its caller can mend is marked."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{_MARK}{error}") from error


@contextlib.contextmanager
def unmarked() -> Iterator[None]:
    """Around a call of a worker. Raises: ValueError with the worker's sentence; RuntimeError if its process is dead."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise RuntimeError(DEAD) from error
        said = sentence_of(error)
        if said is None:
            raise
        raise ValueError(said) from None


def while_alive(call: Callable[[], None], is_dead: Callable[[], bool]) -> None:
    """Do call, in a thread that nobody has to wait for. Raises: as call; RuntimeError if the engine dies meanwhile."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001  # whoever waits gets it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([done], SECONDS).done:
        if is_dead():
            raise RuntimeError(DEAD)
    done.result()


def sentence_of(error: BaseException) -> str | None:
    """What marked() marked; None of any other error."""
    found = _SAID.search(str(error))
    return found.group(1) if found else None
