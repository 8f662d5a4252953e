"""Tokenised documents become rows of one length, packed or each document by itself, within a budget of rows.

A text goes on from row to row, and what follows it in a row sees it. Examples (chats, completions, and
the two of a pair, side by side) stay whole, and a row's `starts` keep them apart: none is to see another.
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
    """input_ids and labels (R, L) int32, document (R,): whose tokens a row holds, or whose come first in a packed row.

    members (R,): all documents that a row has tokens of. starts (R,): where in a row examples begin that do not see
    each other, the first at 0. sizes (R,): tokens that are not padding. source (R,): names, of rows of a mix alone. cut
    counts the examples that were longer than a row and lost their end; left_out the pairs that were: without its end an
    answer is another one.
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
        """Share of all tokens."""
        return 1 - sum(self.sizes) / max(1, len(self) * self.length)

    def add(
        self, ids: numpy.ndarray, labels: numpy.ndarray, members: Sequence[int], starts: Sequence[int] = (0,)
    ) -> None:
        """Append one row, padded on the right, where causal attention never looks back from a real token."""
        missing = self.length - len(ids)
        self.input_ids.append(numpy.pad(ids, (0, missing), constant_values=self.pad))
        self.labels.append(numpy.pad(labels, (0, missing), constant_values=IGNORED))
        self.document.append(members[0])
        self.members.append(list(members))
        self.starts.append(list(starts))
        self.sizes.append(len(ids))

    def take(self, other: "Rows", row: int, *, document: int, source: str) -> None:
        """Append a row of another one's, padded already, as that of a source whose documents have other numbers."""
        for name in ("input_ids", "labels", "starts", "sizes"):
            getattr(self, name).append(getattr(other, name)[row])
        self.document.append(document)
        self.members.append([document])
        self.source.append(source)

    def scored(self) -> list[int]:
        """Of each row, the tokens that are scored: the first has nothing before it to be predicted from."""
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
    """At most budget rows (None: all there are), drawn over as many documents as the budget allows.

    tokens: of examples that are not packed, at most so many that are not padding, but one row at least; no budget then.
    packing fills rows with the ends and beginnings of several texts, or with several whole examples; without it no row
    mixes documents.
    The result is a function of the arguments alone. Order: shuffled if packing, else by document.
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
    """With a budget a document gives at most `share` rows, from a place drawn at random: 1, or as many as it takes."""
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
            rows.reorder(_first_of_each(rows.document)[:budget])
            return rows
        share *= 2


def _first_of_each(numbers: list[int]) -> list[int]:
    """Indices of numbers: first where each occurs for the first time, then for the second time, and so on."""
    seen: Counter[int] = Counter()
    occurrence = []
    for number in numbers:
        occurrence.append(seen[number])
        seen[number] += 1
    return sorted(range(len(numbers)), key=occurrence.__getitem__)


def _add_full_rows(rows: Rows, example: Encoded, first: int, count: int, document: int) -> None:
    for start in range(first, first + count * rows.length, rows.length):
        rows.add(example.ids[start : start + rows.length], example.labels[start : start + rows.length], [document])


class _Stream:
    """Short documents and tails laid end to end, and cut into rows."""

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
        """Close the row that is being filled."""
        if self.size > 1:
            self.rows.add(
                numpy.concatenate([piece.ids for piece in self.pieces]),
                numpy.concatenate([piece.labels for piece in self.pieces]),
                self.documents,
            )
        self.clear()


def _shorten(rows: Rows, example: Encoded) -> Encoded | None:
    """The example's beginning; None if that scores nothing."""
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
    """Whole examples by best fit decreasing: as many of the order's first as fill the budget."""
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
    if budget is not None:  # the last of the order go, not the shortest
        fitting = range(len(sizes) + 1)
        count = bisect.bisect_right(fitting, budget, key=lambda n: len(best_fit_decreasing(sizes[:n], length))) - 1
        sizes = sizes[:count]
    for group in best_fit_decreasing(sizes, length):
        _add_packed(rows, [taken[j] for j in group])
    return rows


def _add_packed(rows: Rows, examples: Sequence[tuple[int, Encoded]]) -> None:
    """A row of these, the first token of each unscored: nothing that it sees could tell it."""
    ids = numpy.concatenate([example.ids for _, example in examples])
    labels = numpy.concatenate([example.labels for _, example in examples])
    ends = numpy.cumsum([0, *(len(example.ids) for _, example in examples)]).tolist()
    starts = [end + start for end, (_, example) in zip(ends, examples) for start in example.starts]
    labels[starts] = IGNORED
    rows.add(ids, labels, [i for i, _ in examples], starts)


def best_fit_decreasing(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of sizes in groups of at most ``length`` together: the largest first, each where least room is left.

    Needs at most 11/9 of the fewest groups there can be, and four more (Johnson, 1973).
    """
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> the groups that have just so much
    rooms: list[int] = []  # those of with_room, ascending
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
