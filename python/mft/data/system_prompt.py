"""Find the system prompt that all chats of the training data share."""

import contextlib
import itertools
from collections.abc import Iterator

from mft.data.formats import PREFERENCE, Chat, find_form, read_example, read_pair
from mft.data.sources import Source

_FIRST = 1000  # records of a stream that are read


def shared_system(source: Source) -> str | None:
    """Return the text of the system turn with which every training chat begins; None if they differ or have none.

    Records that cannot be read do not count. Of a stream, only the first 1000 records are read.
    """
    found = None
    for system in itertools.chain.from_iterable(map(_systems, source.parts.values() or [source])):
        if system is None or found not in (None, system):
            return None
        found = system
    return found


def _systems(source: Source) -> Iterator[str | None]:
    """Yield the system prompt of each training example, or None."""
    reader = source.open_streams()["train"](None)
    for row, place in itertools.islice(reader, _FIRST if source.streams else None):
        form = find_form(reader.columns)
        if form in (None, "text"):
            yield None
            continue
        with contextlib.suppress(ValueError):
            example = read_pair(row, place)[0] if form == PREFERENCE else read_example(form, row, place, templated=True)
            if not isinstance(example, Chat):
                yield None
            elif example.messages:  # empty if it has nothing to score; such a chat is not trained on
                first = example.messages[0]
                yield first["content"] if first["role"] == "system" else None
