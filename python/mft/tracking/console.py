"""The one console of the verbs: what is printed on it is shown as it is, since a path may hold [brackets] or :colons:.

Styles are given as arguments; rich's markup is read nowhere.
"""

from typing import TextIO

from rich.console import Console


def new_console(file: TextIO | None = None, *, width: int | None = None) -> Console:
    """One that reads no markup and no emoji codes, in tables too; None is standard output."""
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


console = new_console()


def say(line: str, style: str | None = None) -> None:
    """Unbroken: paths can be copied from it."""
    console.print(line, style=style, soft_wrap=True)
