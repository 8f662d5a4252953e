"""A queue in which API keys take turns, so that a client who sends many requests does not hold up the others."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import zip_longest

from mft.serving.batch.generation import Generation


class FairQueue:
    """Waiting generations: first come, first served within a key, and keys in turns."""

    def __init__(self) -> None:
        self._of_keys: OrderedDict[str, deque[Generation]] = OrderedDict()  # in the order of turns, none empty

    def __len__(self) -> int:
        return sum(map(len, self._of_keys.values()))

    def __iter__(self) -> Iterator[Generation]:
        """Yield the generations in the order in which popleft returns them."""
        for turns in zip_longest(*self._of_keys.values()):
            yield from (each for each in turns if each is not None)

    def __contains__(self, generation: Generation) -> bool:
        return generation in self._of_keys.get(generation.key, ())

    def append(self, generation: Generation) -> None:
        """Add a generation behind those of its key. A key without any gets the last turn."""
        self._of_keys.setdefault(generation.key, deque()).append(generation)

    def appendleft(self, generation: Generation) -> None:
        """Add a generation that had to give its place back: the next one."""
        self._of_keys.setdefault(generation.key, deque()).appendleft(generation)
        self._of_keys.move_to_end(generation.key, last=False)

    def peek(self) -> Generation:
        """Return what popleft would return. Raises: IndexError if the queue is empty."""
        return next(iter(self._of_keys.values()), deque())[0]

    def popleft(self) -> Generation:
        """Remove and return the next generation; the turn passes to the next key."""
        generation = self.peek()
        self.remove(generation)
        if generation.key in self._of_keys:
            self._of_keys.move_to_end(generation.key)
        return generation

    def remove(self, generation: Generation) -> None:
        """Remove a generation. Raises: KeyError or ValueError if it does not wait."""
        waiting = self._of_keys[generation.key]
        waiting.remove(generation)
        if not waiting:
            del self._of_keys[generation.key]

    def share(self, key: str, places: int) -> tuple[int, int]:
        """Return (how many of the places key may take, how many it has). Keys that wait, and key, get equal shares."""
        keys = len(self._of_keys.keys() | {key})
        return -(-places // keys), len(self._of_keys.get(key, ()))
