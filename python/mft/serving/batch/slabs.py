"""Memory for the keys and values of rows of any length: slabs of equal places, within a limit of bytes.

A slab has places for rows of up to its capacity, next to each other, so that one call of attention serves its rows. A
row that outgrows its place moves to a slab of twice the capacity. A place holds position p of its row at index p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

LEAST = 128  # tokens of the smallest place
TOGETHER = 4096  # tokens of a slab of several places


Layers = Mapping[int, Sequence[Tensor]]  # keys and values, by the number of their layer


@dataclass(eq=False)
class Row:
    """A sequence of tokens under one task. read: the number of tokens that have keys and values, at place in slab.

    wants: of its first tokens, the number whose logits are wanted too.
    """

    task: str | None
    tokens: list[int]
    wants: int = 0
    read: int = 0
    slab: "Slab | None" = None
    place: int = -1


@dataclass(eq=False)
class Slab:
    """layers: keys and values (places, heads, capacity, size). rows: those of places 0, 1, ..."""

    capacity: int
    places: int
    layers: Layers
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        row.slab, row.place = self, len(self.rows)
        self.rows.append(row)

    def copy(self, row: Row, place: int) -> None:
        """Copy what a row of this or another slab has stored to a place of this one."""
        assert row.slab is not None
        for layer, stored in self.layers.items():
            for to, of in zip(stored, row.slab.layers[layer], strict=True):
                to[place, :, : row.read] = of[row.place, :, : row.read]

    def remove(self, row: Row) -> None:
        """Free a row's place; the last row moves there, so that rows stay next to each other."""
        last = self.rows.pop()
        if last is not row:
            self.copy(last, row.place)
            self.rows[row.place], last.place = last, row.place
        for stored in self.layers.values():  # attention adds to and multiplies what it does not see: NaN would stay NaN
            for each in stored:
                each[len(self.rows)].zero_()
        row.slab, row.place = None, -1


class Slabs:
    """Slabs of at most this many bytes in total. token: keys and values (1, heads, 1, size) of any token."""

    def __init__(self, token: Layers, most: int) -> None:
        self._token, self._most = token, most
        self.token_bytes = sum(each.nbytes for stored in token.values() for each in stored)
        self.longest = most // self.token_bytes  # tokens of a row
        self._together = min(TOGETHER, self.longest // 8)
        self._slabs: list[Slab] = []

    @property
    def bytes(self) -> int:
        """Those of slabs in use."""
        return self._tokens(self._filled()) * self.token_bytes

    def put(self, row: Row, length: int) -> bool:
        """Give a row a place for length tokens, at most longest, with what it has stored.

        Returns: whether there is memory for it.
        """
        capacity = min(max(LEAST, 1 << (length - 1).bit_length()), self.longest)
        slab = next((s for s in self._slabs if s.capacity == capacity and len(s.rows) < s.places), None)
        slab = slab or self._new(capacity)
        if slab is None:
            return False
        if row.slab is not None:
            slab.copy(row, len(slab.rows))
            self.remove(row)
        slab.add(row)
        return True

    def remove(self, row: Row) -> None:
        if row.slab is not None:
            row.slab.remove(row)

    def _new(self, capacity: int) -> Slab | None:
        """Return a new slab, or None if there is no memory for it. Empty ones of other capacities make room."""
        places = max(1, self._together // capacity)
        if self.bytes + places * capacity * self.token_bytes > self._most:
            return None
        while (self._tokens(self._slabs) + places * capacity) * self.token_bytes > self._most:
            self._slabs.remove(next(slab for slab in self._slabs if not slab.rows))
        layers = {
            layer: [each.new_zeros(places, each.shape[1], capacity, each.shape[3]) for each in stored]
            for layer, stored in self._token.items()
        }  # zeros, as what no row wrote is multiplied by 0
        slab = Slab(capacity, places, layers)
        self._slabs.append(slab)
        return slab

    def _filled(self) -> list[Slab]:
        return [slab for slab in self._slabs if slab.rows]

    def _tokens(self, slabs: list[Slab]) -> int:
        return sum(slab.places * slab.capacity for slab in slabs)
