"""The targets of kernels: architecture, multiprocessors, shared memory, and the form that is safe there."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton

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
    l2_rate: float = 0  # bytes per cycle and multiprocessor, if measured (make gpu); 0: as in cards.py
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


def _is_safe(compiler: tuple[int, int], assembler: tuple[int, int]) -> bool:
    return compiler >= _SAFE_TRITON and assembler >= _SAFE_ASSEMBLER


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU.

    They do if TRITON_INTERPRET=1 was set before they were imported.
    """
    return triton.knobs.runtime.interpret


def target_of(device: torch.device) -> Target:
    """Return the target of a tensor's device."""
    if _assumed is not None:
        return _assumed
    if interpreting():
        return INTERPRETER
    return _ask(device.index if device.index is not None else torch.cuda.current_device())


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Treat every device as ``target`` within the context: to record launches, or to interpret those of a GPU."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


@functools.cache
def _ask(index: int) -> Target:
    from triton.runtime import driver

    with torch.cuda.device(index):
        gpu = driver.active.get_current_target()
    found = driver.active.utils.get_device_properties(index)
    assembler = installed_assembler(gpu.arch) if isinstance(gpu.arch, int) else (0, 0)
    sizes = found["multiprocessor_count"], found["max_shared_mem"]
    # Two transfers per clock. The clock is in kHz, the bus width in bits. A driver that does not know them says 0.
    bandwidth = 2e3 * found["mem_clock_rate"] * found["mem_bus_width"] / 8
    return replace(make_target(gpu.backend, gpu.arch, *sizes, installed_triton(), assembler), bandwidth=bandwidth)


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
INTERPRETER = Target("interpreter", 0, 3, 65536, compiler=installed_triton())

_assumed: Target | None = None
