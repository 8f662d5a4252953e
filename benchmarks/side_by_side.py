"""Measure several backends in one run: ours, and the one that MFT_KERNELS or "auto" takes from another package.

The name of a competitor that runs on a backend begins with the backend's name: "ours, module", "mine, module".
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
    """``asked``: by backend name, the value of MFT_KERNELS while that backend is measured; ours first."""

    asked: dict[str, str]

    @classmethod
    def here(cls) -> "SideBySide":
        """Return the backends on this machine's CPU.

        Raises: ValueError or RuntimeError if the backend in MFT_KERNELS cannot serve it.
        """
        own, automatic, asked = own_backend(), backend_report()["auto"]["cpu"], asked_for()
        if asked != "auto":
            choose("product", CPU, (), op="masked_linear")
        found = {OURS: "auto" if automatic == own else own}
        for name in (automatic, asked):
            if name not in ("auto", own):
                found[name] = "auto" if name == automatic else name
        return cls(found)

    def competitors(self, names: Iterable[str]) -> list[str]:
        """Return ``names``; after each of ours come the same competitors on the other backends."""
        found = []
        for name in names:
            found.append(name)
            if backend_of(name) == OURS:
                found += [backend + name.removeprefix(OURS) for backend in self.asked if backend != OURS]
        return found

    def calls(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """Return the calls under the names of competitors(); each must run in around() of its name."""
        return {name: calls[self.our_name(name)] for name in self.competitors(calls)}

    def runs(self, competitor: str) -> bool:
        """Whether a competitor runs on one of the backends; if not, it is torch's or another library's."""
        return backend_of(competitor) in self.asked

    def our_name(self, competitor: str) -> str:
        """Return our competitor that does the same: "ours, module" for "mine, module"; others stay as they are."""
        backend = backend_of(competitor)
        return OURS + competitor.removeprefix(backend) if backend in self.asked else competitor

    @contextmanager
    def around(self, competitor: str) -> Iterator[None]:
        """Set MFT_KERNELS to the competitor's backend within the context."""
        if not self.runs(competitor):
            yield
            return
        with mock.patch.dict(os.environ, MFT_KERNELS=self.asked[backend_of(competitor)]):
            yield

    def record(self) -> dict[str, str]:
        """Return the backend of each name, and its own description."""
        known = backend_report()["backends"]
        names = {name: own_backend() if name == OURS else name for name in self.asked}
        return {name: f"{backend}: {known[backend]['detail']}" for name, backend in names.items()}


def backend_of(competitor: str) -> str:
    """Return "ours" for "ours, module"."""
    return competitor.partition(",")[0]


def serving(names: Iterable[str] | None = None) -> list[str]:
    """Return the backends, of those named or of all, that can run a product on this machine's CPU."""
    known = backend_report()["backends"] if names is None else names
    return [name for name in known if registered(name).refusal("product", CPU, ()) is None]


def own_backend() -> str:
    """Return this package's backend that "auto" tries first on the CPU."""
    return next(name for name in serving(PREFERENCE) if registered(name).on_request is None)
