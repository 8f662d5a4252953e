"""How a bad input is listed: its name is its title, its file its group, its body what the user wrote.

A function may ask for tmp, a new directory, and for patch, a pytest.MonkeyPatch that is undone afterwards.
"""

import contextlib
import functools
import inspect
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Case:
    function: Callable[..., None]

    @property
    def title(self) -> str:
        return self.function.__name__.replace("_", " ")

    @property
    def group(self) -> str:
        return self.function.__module__.rpartition(".")[2]

    @property
    def source(self) -> str:
        """The function's body."""
        _, _, body = inspect.getsource(self.function).partition("\ndef ")
        return textwrap.dedent(body.partition(":\n")[2]).strip()


@dataclass(frozen=True)
class Refused(Case):
    """The parts that its message has to have; remedy None where the rule is one. other: texts of other software."""

    error: type[Exception]
    where: str
    got: str
    rule: str
    remedy: str | None
    other: str | None

    def lacks(self, message: str) -> list[str]:
        """Which of the parts a message has not."""
        parts = {"where": self.where, "got": self.got, "rule": self.rule, "remedy": self.remedy or self.rule}
        return [name for name, part in parts.items() if part not in message]


@dataclass(frozen=True)
class Accepted(Case):
    """What happens, which the function asserts."""

    happens: str


REFUSED: list[Refused] = []
ACCEPTED: list[Accepted] = []


def refused(
    error: type[Exception], *, where: str, got: str, rule: str, remedy: str | None = None, other: str | None = None
) -> Callable:
    """List a function that raises ``error``; ``other`` is a pattern for what differs from machine to machine."""

    def add(function: Callable) -> Callable:
        REFUSED.append(Refused(function, error, where, got, rule, remedy, other))
        return function

    return add


def accepted(happens: str) -> Callable:
    """List a function that returns."""

    def add(function: Callable) -> Callable:
        ACCEPTED.append(Accepted(function, happens))
        return function

    return add


@contextlib.contextmanager
def running(case: Case) -> Iterator[tuple[Callable[[], None], Path]]:
    """(the case, ready to be called; its directory)."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        given = {"tmp": Path(directory), "patch": patch}
        asked = {name: given[name] for name in inspect.signature(case.function).parameters}
        yield lambda: case.function(**asked), given["tmp"]


@dataclass(frozen=True)
class Told:
    """What a case raised; shown is its message without what differs from run to run."""

    error: type[Exception]
    message: str
    shown: str


@functools.cache
def told(case: Refused) -> Told:
    """Run the case, once in a process."""
    with running(case) as (run, directory):
        try:
            run()
        except case.error as error:
            message = str(error).replace(str(directory), "/tmp/dir")
            return Told(type(error), message, re.sub(case.other, "...", message) if case.other else message)
    raise AssertionError(f"{case.title}: expected {case.error.__name__}, nothing was raised")
