"""Backends measured in one run: ours, and the one that MFT_KERNELS asks for or that "auto" takes from another package.

A competitor that runs on a backend begins with the backend's name: "ours, module", "mine, module".
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from mft_kernels import backend_report
from mft_kernels.backends.table import PREFERENCE, asked_for, choose, registered

OURS = "ours"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SideBySide:
    """``asked``: what MFT_KERNELS has to say while a backend is measured, by the name of the backend; ours first."""

    asked: dict[str, str]

    @classmethod
    def here(cls) -> "SideBySide":
        """On the CPU of this machine. Raises: ValueError or RuntimeError if what is asked for cannot serve it."""
        own, automatic, asked = own_backend(), backend_report()["auto"]["cpu"], asked_for()
        if asked != "auto":
            choose("product", CPU, (), op="masked_linear")
        found = {OURS: "auto" if automatic == own else own}
        for name in (automatic, asked):
            if name not in ("auto", own):
                found[name] = "auto" if name == automatic else name
        return cls(found)

    def competitors(self, names: Iterable[str]) -> list[str]:
        """``names``, and after each of ours the same one of every other backend."""
        found = []
        for name in names:
            found.append(name)
            if backend_of(name) == OURS:
                found += [backend + name.removeprefix(OURS) for backend in self.asked if backend != OURS]
        return found

    def calls(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """``calls`` by the names of competitors(): the same call, to be made in around()."""
        return {name: calls[self.as_ours(name)] for name in self.competitors(calls)}

    def runs(self, competitor: str) -> bool:
        """Whether a competitor runs on one of the backends; else it is torch's or another library's."""
        return backend_of(competitor) in self.asked

    def as_ours(self, competitor: str) -> str:
        """Our competitor that does the same: "ours, module" for "mine, module"; others stay as they are."""
        backend = backend_of(competitor)
        return OURS + competitor.removeprefix(backend) if backend in self.asked else competitor

    @contextmanager
    def around(self, competitor: str) -> Iterator[None]:
        """While it lasts, MFT_KERNELS asks for the competitor's backend."""
        if not self.runs(competitor):
            yield
            return
        with mock.patch.dict(os.environ, MFT_KERNELS=self.asked[backend_of(competitor)]):
            yield

    def record(self) -> dict[str, str]:
        """What stands behind each name: the backend's own, and what it says of itself."""
        known = backend_report()["backends"]
        names = {name: own_backend() if name == OURS else name for name in self.asked}
        return {name: f"{backend}: {known[backend]['detail']}" for name, backend in names.items()}


def backend_of(competitor: str) -> str:
    """ "ours" of "ours, module"."""
    return competitor.partition(",")[0]


def own_backend() -> str:
    """The backend of this package that "auto" asks first, of those that serve the CPU."""
    found = (registered(name) for name in PREFERENCE)
    return next(b.name for b in found if b.on_request is None and b.refusal("product", CPU, ()) is None)
