"""What ends a training step: numbers that are not finite, and a lack of memory, told by where it was."""

import contextlib
from collections.abc import Callable, Iterator

import torch


class NonFiniteLoss(RuntimeError):
    """The loss, or what was learned from it, became NaN or infinite."""


@contextlib.contextmanager
def naming_lack_of_memory(place: str, words: Callable[[], str]) -> Iterator[None]:
    """Turn torch's lack of memory, on a GPU or the host, into a RuntimeError that says where, and ``words()``."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RuntimeError(f"out of memory at {place}; {words()} ({error})") from error
