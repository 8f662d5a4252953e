"""Turn tokenised documents into rows of one length, packed or one document per row, within a budget of rows.

A text continues from row to row, and text that follows it in a row sees it. Examples (chats, completions, and the two
of a pair, next to each other) stay whole. A row's `starts` keep them apart: none may see another.
"""

import bisect
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from mft.data.tokenization import IGNORED, Documents, Encoded


@dataclass
class Rows:
    """Rows: input_ids and labels (R, L) int32; document (R,): the document of a row, or the first one of a packed row.

    members (R,): all documents with tokens in a row. starts (R,): where examples that must not see each other begin in
    a row; the first is 0. sizes (R,): tokens without padding. source (R,): source names, only for rows of a mix. cut
    counts the examples that were longer than a row and lost their end. left_out counts the pairs that were too long:
    without its end, an answer is a different one.
    """

    length: int
    pad: int
    input_ids: list[numpy.ndarray] = field(default_factory=list)
    labels: list[numpy.ndarray] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    starts: list[list[int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    cut: int = 0
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.document)

    @property
    def padding(self) -> float:
        """Share of padding in all tokens."""
        return 1 - sum(self.sizes) / max(1, len(self) * self.length)

    def add(
        self, ids: numpy.ndarray, labels: numpy.ndarray, members: Sequence[int], starts: Sequence[int] = (0,)
    ) -> None:
        """Append one row, padded on the right, where causal attention hides the padding from real tokens."""
        missing = self.length - len(ids)
        self.input_ids.append(numpy.pad(ids, (0, missing), constant_values=self.pad))
        self.labels.append(numpy.pad(labels, (0, missing), constant_values=IGNORED))
        self.document.append(members[0])
        self.members.append(list(members))
        self.starts.append(list(starts))
        self.sizes.append(len(ids))

    def take(self, other: "Rows", row: int, *, document: int, source: str) -> None:
        """Append a row of another Rows, which is padded already, with its source and its document number in the mix."""
        for name in ("input_ids", "labels", "starts", "sizes"):
            getattr(self, name).append(getattr(other, name)[row])
        self.document.append(document)
        self.members.append([document])
        self.source.append(source)

    def scored(self) -> list[int]:
        """Return the scored tokens of each row. A row's first token cannot be scored: no token predicts it."""
        return [int((labels[1:] != IGNORED).sum()) for labels in self.labels]

    def reorder(self, order: Sequence[int]) -> None:
        for name in ("input_ids", "labels", "document", "members", "starts", "sizes"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in order])


def build_rows(
    documents: Documents,
    length: int,
    pad: int,
    *,
    budget: int | None,
    packing: bool,
    seed: int,
    tokens: int | None = None,
) -> Rows:
    """Return at most budget rows (None: all), drawn from as many documents as the budget allows.

    tokens: only for examples without packing, with budget None: at most this many tokens without padding, but at least
    one row. With packing, several texts or several whole examples share a row. Order: shuffled with packing, else by
    document. The result depends only on the arguments.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    if documents.is_text:
        rows = _text_rows(documents, order, length, pad, budget, packing, seed)
    elif packing:
        rows = _packed_examples(documents, order, length, pad, budget)
    else:
        rows = _single_examples(documents, order, length, pad, budget, tokens)
    numbers = list(range(len(rows)))
    if packing:
        random.Random(seed).shuffle(numbers)
    else:
        numbers.sort(key=lambda row: rows.document[row])  # stable: a document's rows stay in order
    rows.reorder(numbers)
    return rows


def _text_rows(
    documents: Documents, order: list[int], length: int, pad: int, budget: int | None, packing: bool, seed: int
) -> Rows:
    """Fill rows with texts. With a budget a document gives ``share`` rows from a random place: 1, or more if needed."""
    share = None if budget is None else 1
    while True:
        rows, shortened = Rows(length, pad), False
        stream = _Stream(rows)
        for i, example in documents.encoded(order):
            full = len(example.ids) // length
            if share is not None and full > share:
                shortened = True
                first = random.Random(f"{seed} {i}").randrange(len(example.ids) - share * length + 1)
                _add_full_rows(rows, example, first, share, i)
            else:
                _add_full_rows(rows, example, 0, full, i)
                ids, labels = example.ids[full * length :], example.labels[full * length :]
                if packing:
                    stream.append(ids, labels, i)
                elif not full:  # a tail after full rows would be mostly padding
                    rows.add(ids, labels, [i])
            if share == 1 and budget is not None and len(rows) >= budget:
                break
        stream.flush()
        if budget is None or share is None or len(rows) >= budget or not shortened:
            seen: Counter[int] = Counter()
            occurrence = []
            for document in rows.document:
                occurrence.append(seen[document])
                seen[document] += 1
            # The first row of each document, then the second ones, and so on.
            rows.reorder(sorted(range(len(rows)), key=occurrence.__getitem__)[:budget])
            return rows
        share *= 2


def _add_full_rows(rows: Rows, example: Encoded, first: int, count: int, document: int) -> None:
    for start in range(first, first + count * rows.length, rows.length):
        rows.add(example.ids[start : start + rows.length], example.labels[start : start + rows.length], [document])


class _Stream:
    """Short documents and tails, concatenated and cut into rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.clear()

    def clear(self) -> None:
        self.pieces: list[Encoded] = []
        self.documents: list[int] = []
        self.size = 0

    def append(self, ids: numpy.ndarray, labels: numpy.ndarray, document: int) -> None:
        while len(ids):
            room = self.rows.length - self.size
            self.pieces.append(Encoded(ids[:room], labels[:room]))
            self.documents.append(document)
            self.size += len(ids[:room])
            ids, labels = ids[room:], labels[room:]
            if self.size == self.rows.length:
                self.flush()

    def flush(self) -> None:
        """Finish the current row."""
        if self.size > 1:
            self.rows.add(
                numpy.concatenate([piece.ids for piece in self.pieces]),
                numpy.concatenate([piece.labels for piece in self.pieces]),
                self.documents,
            )
        self.clear()


def _shorten(rows: Rows, example: Encoded) -> Encoded | None:
    """Return the example cut to a row; None if no scored token is left, or if it is a pair that is too long."""
    if len(example.ids) <= rows.length:
        return example
    if len(example.starts) > 1:
        rows.left_out += 1
        return None
    rows.cut += 1
    ids, labels = example.ids[: rows.length], example.labels[: rows.length]
    return Encoded(ids, labels) if (labels[1:] != IGNORED).any() else None


def _single_examples(
    documents: Documents, order: list[int], length: int, pad: int, budget: int | None, tokens: int | None
) -> Rows:
    rows = Rows(length, pad)
    room = math.inf if tokens is None else tokens
    for i, example in documents.encoded(order):
        short = _shorten(rows, example)
        if short is not None:
            room -= len(short.ids)
        if room < 0 and len(rows):
            break
        if short is not None and len(short.starts) > 1:
            _add_packed(rows, [(i, short)])
        elif short is not None:
            rows.add(short.ids, short.labels, [i])
        if budget is not None and len(rows) >= budget:
            break
    return rows


def _packed_examples(documents: Documents, order: list[int], length: int, pad: int, budget: int | None) -> Rows:
    """Pack whole examples by best fit decreasing: as many from the start of the order as fill the budget."""
    rows = Rows(length, pad)
    taken: list[tuple[int, Encoded]] = []
    room = None if budget is None else budget * length
    for i, example in documents.encoded(order):
        short = _shorten(rows, example)
        if short is None:
            continue
        taken.append((i, short))
        if room is not None:
            room -= len(short.ids)
            if room <= 0:
                break
    sizes = [len(example.ids) for _, example in taken]
    if budget is not None:  # leave out the last examples of the order, not the shortest
        fitting = range(len(sizes) + 1)
        count = bisect.bisect_right(fitting, budget, key=lambda n: len(best_fit_decreasing(sizes[:n], length))) - 1
        sizes = sizes[:count]
    for group in best_fit_decreasing(sizes, length):
        _add_packed(rows, [taken[j] for j in group])
    return rows


def _add_packed(rows: Rows, examples: Sequence[tuple[int, Encoded]]) -> None:
    """Add a row of these examples. The first token of each is not scored, because no token predicts it."""
    ids = numpy.concatenate([example.ids for _, example in examples])
    labels = numpy.concatenate([example.labels for _, example in examples])
    ends = numpy.cumsum([0, *(len(example.ids) for _, example in examples)]).tolist()
    starts = [end + start for end, (_, example) in zip(ends, examples) for start in example.starts]
    labels[starts] = IGNORED
    rows.add(ids, labels, [i for i, _ in examples], starts)


def best_fit_decreasing(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Group the indices of sizes, at most ``length`` in sum: largest first, into the group with least room left."""
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> groups with exactly this room
    rooms: list[int] = []  # keys of with_room, ascending
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(rooms, sizes[number])
        if place < len(rooms):
            room = rooms[place]
            group = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, group = length, len(groups)
            groups.append([])
        groups[group].append(number)
        left = room - sizes[number]
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(group)
    return groups
