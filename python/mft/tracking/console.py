"""The one console of all commands. It prints text as it is, since a path may hold [brackets] or :colons:.

Styles are given as arguments. rich's markup is never interpreted. Control characters in strings and cells are escaped,
since names and texts may come from files of strangers.
"""

from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions
from rich.text import Text

from mft.escaping import escaped

_UNBROKEN = 10_000  # columns if the output is not a terminal: wider than any of our tables


class _Console(Console):
    """A console that prints each table row as one line in a pipe or a file; rich would wrap cells to fit 80 columns."""

    def __init__(self, file: TextIO | None, width: int | None) -> None:
        super().__init__(file=file, width=width, markup=False, emoji=False, highlight=False)
        self._is_fixed = width is not None

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        if self._is_fixed or self.is_terminal or self.is_jupyter:
            return found
        return ConsoleDimensions(_UNBROKEN, found.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self.width, self.height = new_size

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)


def new_console(file: TextIO | None = None, *, width: int | None = None) -> Console:
    """Return a console without markup and emoji codes. file: None for standard output. width: None for its own."""
    return _Console(file, width)


console = new_console()


def say(line: str, style: str | None = None) -> None:
    """Print a line without wrapping it, so that paths can be copied from it."""
    console.print(line, style=style, soft_wrap=True)
