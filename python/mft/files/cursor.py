"""Read a binary header from an untrusted file, from its start and never past the file's end."""

import mmap
import struct
from typing import Any


class Damaged(Exception):
    """The file is damaged; the message says how."""


class Cursor:
    """A reading position in a mapped file. Methods raise Damaged if the file claims more bytes than it has."""

    def __init__(self, content: mmap.mmap, place: int = 0) -> None:
        self.content, self.place = content, place

    def skip(self, count: int) -> int:
        """Move past the next count bytes and return the place where they begin."""
        start, left = self.place, len(self.content) - self.place
        if count > left:
            raise Damaged(f"{count} bytes claimed at byte {start}, where {left} are left")
        self.place += count
        return start

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack_from(form, self.content, self.skip(struct.calcsize(form)))

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def text(self) -> str:
        start = self.skip(self.number("Q"))
        try:
            return self.content[start : self.place].decode("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"a text at byte {start} that is not UTF-8") from None

    def skip_texts(self, count: int) -> None:
        """Move past count texts. A tokenizer has 100,000 of them, so no method is called for each text."""
        unpack, place, size = struct.Struct("<Q").unpack_from, self.place, len(self.content)
        for _ in range(count):
            if place > size - 8:
                raise Damaged(f"8 bytes claimed at byte {place}, where {size - place} are left")
            length = unpack(self.content, place)[0]
            place += 8
            if length > size - place:
                raise Damaged(f"{length} bytes claimed at byte {place}, where {size - place} are left")
            place += length
        self.place = place
