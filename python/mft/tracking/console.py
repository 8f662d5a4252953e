"""The one console of the verbs: what is printed on it is shown as it is, since a path may hold [brackets] or :colons:.

Styles are given as arguments; rich's markup is read nowhere.
"""

from typing import TextIO

from rich.console import Console, ConsoleDimensions

_UNBROKEN = 10_000  # columns of what is no terminal: wider than any table of ours


class _Console(Console):
    """In a pipe or a file every row of a table is one line; rich would break its cells to fit 80 columns."""

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


def new_console(file: TextIO | None = None, *, width: int | None = None) -> Console:
    """One that reads no markup and no emoji codes, in tables too.

    Args:
        file: where it prints; None for standard output.
        width: in columns; None for the terminal's width, and for no limit where file is no terminal.
    """
    return _Console(file, width)


console = new_console()


def say(line: str, style: str | None = None) -> None:
    """Unbroken: paths can be copied from it."""
    console.print(line, style=style, soft_wrap=True)
