"""Record which binaries the timed launches of Triton's kernels came from, and compare them with the record's.

A call without a cubin is compiled by the installed Triton, perhaps in another form. Its time is then right for what ran
and wrong for what ships.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mft_kernels.backends.triton import cubins, planned
from mft_kernels.backends.triton.cubins import Launched
from mft_kernels.backends.triton.target import Target


@dataclass(frozen=True)
class Form:
    """What a record names: cubins or the installed Triton's binaries, in the swapped form or the plain one."""

    by_cubins: bool = False
    swapped: bool = False

    @classmethod
    def of(cls, target: Target) -> "Form":
        """Return the form for a device with this target."""
        ahead = target.backend == "cuda" and cubins.asked() != cubins.JIT
        return cls(ahead and cubins.bundle(str(target))[0] is not None, target.swapped)

    def __str__(self) -> str:
        return _named(self.by_cubins, self.swapped)


@dataclass
class Launches:
    """A competitor's launches, as far as Python makes them: all of a graph, the first of others."""

    seen: Sequence[Launched] = field(default_factory=list)

    def names(self) -> list[str]:
        """Return each kernel once, with its origin."""
        return sorted({f"{one.kernel}: {_named(one.cubin is not None, one.swapped)}" for one in self.seen})

    def stray(self, form: Form, *, ahead: bool = True) -> str:
        """Return in words the first launch that does not match the record, "" if all match.

        ``ahead``: whether there are cubins of these kernels. If not, the installed Triton compiles them in its own
        form, which their names tell.
        """
        for one in self.seen if ahead else ():
            if (one.cubin is not None) != form.by_cubins or (one.swapped and not form.swapped):
                came = _named(one.cubin is not None, one.swapped)
                return f"not what the record names: {one.kernel} came from {came}, and the record says {form}"
        return ""


@contextmanager
def watched() -> Iterator[Launches]:
    """Yield the launches within the context. All plans are forgotten first: C++ would launch from them unseen."""
    planned.forget()
    with cubins.watching() as seen:
        yield Launches(seen)


def _named(by_cubins: bool, swapped: bool) -> str:
    return f"{'cubins' if by_cubins else 'the installed Triton'}, {'swapped' if swapped else 'plain'} form"
