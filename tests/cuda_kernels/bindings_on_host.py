"""Build the bindings of csrc/cuda for CPU tensors: their ops as torch.ops.NAME, over kernels that run on the host."""

import fcntl
from pathlib import Path

import emulated
import torch

from building.compile import TORCH_TARGET, CannotBuild, Link, Unit
from building.compile import build as build_units

BINDINGS = emulated.ROOT / "csrc/cuda/bindings.cpp"


def build(library: Path, name: str, *kernels: str) -> None:
    """Compile and link ``library``. ``kernels``: sources, shared objects and linker flags.

    Compiled files stay in build/, separately for each name and torch version, and are used again if nothing has
    changed.

    Raises: RuntimeError with the compiler's output.
    """
    torch_folder, compiler = Path(torch.__file__).parent, emulated.compiler()
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{BINDINGS.parent}"]
    own = [TORCH_TARGET, "-DMFT_CUDA_ON_HOST", "-DMFT_CUDA_PRODUCT_SM90", "-isystem", f"{torch_folder}/include"]
    linked = [*flags, *kernels, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-Wl,-Bsymbolic"]
    directory = emulated.ROOT / "build" / name / torch.__version__
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs build one after the other
        try:
            build_units(
                directory, [Unit(BINDINGS, compiler, [*flags, *own])], Link(str(library.absolute()), compiler, linked)
            )
        except CannotBuild as error:
            said = "".join(log.read_text() for log in sorted(directory.glob("*.log")))
            raise RuntimeError(f"csrc/cuda/bindings.cpp does not compile for the host: {error}\n{said}") from None


def emulated_kernels() -> list[str]:
    """Return the linker arguments for the kernels in the emulator."""
    kernels = Path(emulated.library()._name)
    return [str(kernels), f"-Wl,-rpath,{kernels.parent}"]
