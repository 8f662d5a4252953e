"""Build the bindings of csrc/cuda for CPU tensors: their ops as torch.ops.NAME, over kernels that run on the host."""

from pathlib import Path

import emulated
import torch

from building.compile import TORCH_TARGET, Link, Unit

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
    link = Link(str(library.absolute()), compiler, linked)
    emulated.build(emulated.ROOT / "build" / name / torch.__version__, [Unit(BINDINGS, compiler, [*flags, *own])], link)


def emulated_kernels() -> list[str]:
    """Return the linker arguments for the kernels in the emulator."""
    kernels = Path(emulated.library()._name)
    return [str(kernels), f"-Wl,-rpath,{kernels.parent}"]
