"""The targets of kernels: architecture, multiprocessors, shared memory, and the form that is safe there."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import cubins
from .language import INSTALLED, triton

#: Older versions let the sm_90 code overwrite registers that a matrix instruction still reads (Triton issue 9433).
#: Triton 3.6 waits too late. ptxas 12.9 removes the copies that make the code of Triton 3.9 safe.
_SAFE_TRITON = (3, 9)
_SAFE_ASSEMBLER = (13, 3)


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    ``arch``: compute capability times ten ("cuda": 80, 90, 100) or a name ("hip": "gfx942").
    """

    backend: str
    arch: int | str
    multiprocessors: int
    shared_memory: int  # bytes that one block may use
    swapped: bool = False  # the product is transposed, so that the masked weight is its first operand
    descriptors: bool = False  # tiles are read through TMA descriptors if alignment allows
    bandwidth: float = 0  # of its memory, bytes per second; 0: not known
    compiler: tuple[int, int] = (0, 0)  # version of the Triton that compiles for it

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch or self.backend)

    @property
    def hopper_or_newer(self) -> bool:
        """Whether it has the matrix instructions of sm_90 or sm_100 that read shared memory."""
        return self.backend == "cuda" and self.arch in (90, 100, 103)


def make_target(
    backend: str,
    arch: int | str,
    multiprocessors: int,
    shared_memory: int,
    compiler: tuple[int, int],
    assembler: tuple[int, int],
) -> Target:
    """Return the target with the form that Triton ``compiler`` and ptxas ``assembler`` (versions) compile safely.

    sm_90 can read the first operand of a product from registers, where the masked weight is made. If that is not safe,
    the masked weight is the second operand, which goes through shared memory.
    """
    target = Target(backend, arch, multiprocessors, shared_memory, compiler=compiler)
    if not target.hopper_or_newer:
        return target
    return replace(target, swapped=arch != 90 or _is_safe(compiler, assembler), descriptors=True)


@functools.cache
def compiles_safely(target: Target) -> bool:
    """Return whether the installed Triton and its ptxas compile the swapped form for the target without a hazard."""
    return target.arch != 90 or _is_safe(installed_triton(), installed_assembler(90))


def _is_safe(compiler: tuple[int, int], assembler: tuple[int, int]) -> bool:
    return compiler >= _SAFE_TRITON and assembler >= _SAFE_ASSEMBLER


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU.

    They do if TRITON_INTERPRET=1 was set before they were imported.
    """
    return INSTALLED and triton.knobs.runtime.interpret


def target_of(device: torch.device) -> Target:
    """Return the target of a tensor's device."""
    if _assumed is not None:
        return _assumed
    if interpreting():
        return INTERPRETER
    return _ask(device.index if device.index is not None else torch.cuda.current_device())[0]


def compiled_here(device: torch.device) -> Target | None:
    """Return the target in the installed Triton's form, if the cubins in use have another form; otherwise None."""
    if _assumed is not None or interpreting():
        return None
    return _ask(device.index if device.index is not None else torch.cuda.current_device())[1]


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Treat every device as ``target`` within the context: to record launches, or to interpret those of a GPU."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


def is_assumed() -> bool:
    """Return whether devices are treated as another target; see assume."""
    return _assumed is not None


@functools.cache
def _ask(index: int) -> tuple[Target, Target | None]:
    """Return (the target in use, the installed Triton's target or None).

    The target in use has the form of the cubins if there are any, otherwise that of the installed Triton. The second is
    None if it has the same form.
    """
    card = _card_by_triton(index) if INSTALLED else _card_by_torch(index)
    backend, arch, multiprocessors, shared_memory, bandwidth = card

    def target(compiler: tuple[int, int], assembler: tuple[int, int]) -> Target:
        made = make_target(backend, arch, multiprocessors, shared_memory, compiler, assembler)
        return replace(made, bandwidth=bandwidth)

    here = None
    if INSTALLED:
        here = target(installed_triton(), installed_assembler(arch) if isinstance(arch, int) else (0, 0))
    ahead = cubins.bundle(f"sm_{arch}")[0] if backend == "cuda" and cubins.asked() != cubins.JIT else None
    if ahead is None:
        assert here is not None, "the backend needs Triton or cubins"
        return here, None
    by_cubins = target(ahead.compiler, ahead.assembler)
    other = here if here is not None and here.swapped != by_cubins.swapped else None
    return by_cubins, other


def _card_by_triton(index: int) -> tuple[str, Any, int, int, float]:
    from triton.runtime import driver

    with torch.cuda.device(index):
        gpu = driver.active.get_current_target()
    found = driver.active.utils.get_device_properties(index)
    # Two transfers per clock. The clock is in kHz, the bus width in bits. A driver that does not know them says 0.
    bandwidth = 2e3 * found["mem_clock_rate"] * found["mem_bus_width"] / 8
    return gpu.backend, gpu.arch, found["multiprocessor_count"], found["max_shared_mem"], bandwidth


def _card_by_torch(index: int) -> tuple[str, Any, int, int, float]:
    found = torch.cuda.get_device_properties(index)
    shared = found.shared_memory_per_multiprocessor - 1024  # the driver takes 1024 bytes from each block
    bandwidth = 2e3 * found.memory_clock_rate * found.memory_bus_width / 8
    return "cuda", 10 * found.major + found.minor, found.multi_processor_count, shared, bandwidth


def installed_triton() -> tuple[int, int]:
    """Return (major, minor) of the installed Triton."""
    return _version(triton.__version__)


def installed_assembler(arch: int) -> tuple[int, int]:
    """Return (major, minor) of the ptxas that Triton runs for an architecture.

    TRITON_PTXAS_PATH and similar variables change it.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    return _version(get_ptxas(arch).version)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


#: Cards that stand for the targets that tests compile for and interpret. H100_OLD_TRITON is an H100 with Triton 3.6.
A100 = make_target("cuda", 80, 108, 166912, (3, 9), (13, 4))
H100 = make_target("cuda", 90, 132, 232448, (3, 9), (13, 4))
H100_OLD_TRITON = make_target("cuda", 90, 132, 232448, (3, 6), (12, 8))
B200 = make_target("cuda", 100, 148, 232448, (3, 9), (13, 4))
RTX_4090 = make_target("cuda", 89, 128, 101376, (3, 9), (13, 4))
RTX_5090 = make_target("cuda", 120, 170, 101376, (3, 9), (13, 4))
MI300X = make_target("hip", "gfx942", 304, 65536, (3, 9), (0, 0))
#: The interpreter runs one program after another. There are few of them, so that each loops over several tiles.
INTERPRETER = Target("interpreter", 0, 3, 65536, compiler=installed_triton() if INSTALLED else (0, 0))

_assumed: Target | None = None
