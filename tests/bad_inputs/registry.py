"""A bad input is a row of a table: its title, what the user writes, and the answer.

Each module of GROUPS has its rows in TABLE, and above it the code that they use. A row that is refused:

    a threshold for each column
        masked_linear(x, weight, scores, torch.ones(5))
        -> ValueError: threshold | must be () or one per row (4,) | (5,) | see kept_threshold

Its last line has the error and parts of the message: the argument, its rule, the received value and the remedy. The
remedy is left out if the rule says it. `...` in a part stands for what differs between machines. An odd input that is
right ends in `-> accepted: what happens`, and asserts it. Both kinds of line may continue on the next lines.

What the user writes may use the names of its module, `tmp`, a new directory, and `patch`, a pytest.MonkeyPatch that is
undone afterwards. Empty lines and lines that begin with # are for the reader of the table.
"""

import contextlib
import functools
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # must be set before transformers is imported

import pytest

from . import (
    budgets,
    data,
    deletion,
    environment,
    experts,
    files,
    gguf_files,
    hub,
    objectives,
    rewards,
    serving,
    sharding,
    studies,
    tensors,
    training,
    vllm,
)

GROUPS = (
    *(tensors, experts, files, gguf_files, hub, data, training, deletion, budgets),
    *(objectives, rewards, studies, environment, serving, vllm, sharding),
)


@dataclass(frozen=True)
class Case:
    module: ModuleType
    title: str
    source: str

    @property
    def group(self) -> str:
        return self.module.__name__.rpartition(".")[2]


@dataclass(frozen=True)
class Refused(Case):
    """The parts that its message must have; remedy is None if the rule states it."""

    error: type[Exception]
    where: str
    rule: str
    got: str
    remedy: str | None = None

    @property
    def parts(self) -> dict[str, str]:
        return {"where": self.where, "got": self.got, "rule": self.rule, "remedy": self.remedy or self.rule}

    def lacks(self, message: str) -> list[str]:
        """Return the names of the parts that a message lacks."""
        return [name for name, part in self.parts.items() if not _pattern(part).search(message)]

    def shown(self, message: str) -> str:
        """Return a message without what differs between machines."""
        for part in self.parts.values():
            message = _pattern(part).sub(lambda _, part=part: part, message)
        return message


@dataclass(frozen=True)
class Accepted(Case):
    """An odd input that is right. ``happens`` describes the result, which its source asserts."""

    happens: str


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(".*?".join(map(re.escape, part.split("..."))))


def read_table(module: ModuleType) -> Iterator[Case]:
    """Yield the rows of a module."""
    text = re.sub(r"^(#.*)?\n", "", module.TABLE, flags=re.MULTILINE)
    for row in filter(None, re.split(r"^(?=\S)", text, flags=re.MULTILINE)):
        title, _, rest = row.partition("\n")
        source, _, result = rest.rpartition("    -> ")
        kind, _, said = " ".join(result.split()).partition(": ")
        given, parts = (module, title, textwrap.dedent(source).strip()), said.split(" | ")
        if not source or (kind != "accepted" and len(parts) not in (3, 4)):
            raise ValueError(f"{module.__name__}, {title}: must end in '-> Error: where | rule | got | remedy'")
        yield Accepted(*given, said) if kind == "accepted" else Refused(*given, eval(kind, vars(module)), *parts)


CASES = [case for module in GROUPS for case in read_table(module)]
REFUSED = [case for case in CASES if isinstance(case, Refused)]
ACCEPTED = [case for case in CASES if isinstance(case, Accepted)]


@contextlib.contextmanager
def running(case: Case) -> Iterator[tuple[Callable[[], None], Path]]:
    """Yield (the case as a function, its directory)."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        tmp = Path(directory)
        code = compile(case.source, case.title, "exec")
        yield lambda: exec(code, vars(case.module) | {"tmp": tmp, "patch": patch}), tmp


@dataclass(frozen=True)
class Told:
    """The error of a case; ``shown`` is its message without parts that differ between runs."""

    error: type[Exception]
    message: str
    shown: str


@functools.cache
def told(case: Refused) -> Told:
    """Run the case, once per process."""
    with running(case) as (run, directory):
        try:
            run()
        except case.error as error:
            message = re.sub("[0-9a-f]{64}", "...", str(error).replace(str(directory), "/tmp/dir"))
            return Told(type(error), message, case.shown(message))
    raise AssertionError(f"{case.title}: expected {case.error.__name__}, nothing was raised")
