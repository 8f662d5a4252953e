"""Which binaries the timed launches of Triton's kernels came from, and whether they are those that the record names.

A call for which there is no cubin is compiled by the installed Triton, perhaps in another form: its time is right for
what ran, and wrong for what ships.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mft_kernels.backends.triton import cubins, planned
from mft_kernels.backends.triton.cubins import Launched
from mft_kernels.backends.triton.target import Target


@dataclass(frozen=True)
class Form:
    """What a record names: cubins, or what the installed Triton compiles; the swapped form or the plain one."""

    by_cubins: bool = False
    swapped: bool = False

    @classmethod
    def of(cls, target: Target) -> "Form":
        """Of a device that is such a target."""
        ahead = target.backend == "cuda" and cubins.asked() != cubins.JIT
        return cls(ahead and cubins.bundle(str(target))[0] is not None, target.swapped)

    def __str__(self) -> str:
        return _named(self.by_cubins, self.swapped)


@dataclass
class Launches:
    """Those of one competitor, as far as Python makes them: a graph's all, of others the first."""

    seen: Sequence[Launched] = field(default_factory=list)

    def names(self) -> list[str]:
        """Each kernel once, and what it came from."""
        return sorted({f"{one.kernel}: {_named(one.cubin is not None, one.swapped)}" for one in self.seen})

    def stray(self, form: Form, *, ahead: bool = True) -> str:
        """The first that did not come from what the record names, in words; "" if none. ``ahead``: whether cubins are
        made of these kernels; else the installed Triton compiles them, in its own form, which their names tell.
        """
        for one in self.seen if ahead else ():
            if (one.cubin is not None) != form.by_cubins or (one.swapped and not form.swapped):
                came = _named(one.cubin is not None, one.swapped)
                return f"not what the record names: {one.kernel} came from {came}, and the record says {form}"
        return ""


@contextmanager
def watched() -> Iterator[Launches]:
    """Within the context, what is launched; first all plans are forgotten, by which C++ would launch unseen."""
    planned.forget()
    with cubins.watching() as seen:
        yield Launches(seen)


def _named(by_cubins: bool, swapped: bool) -> str:
    return f"{'cubins' if by_cubins else 'the installed Triton'}, {'swapped' if swapped else 'plain'} form"
