"""The bindings of csrc/cuda for CPU tensors: their ops as torch.ops.NAME, over kernels that run on the host."""

import subprocess
from pathlib import Path

import emulated
import torch

BINDINGS = [
    emulated.ROOT / "csrc/cuda" / name
    for name in ("bindings.cpp", "many_bindings.cpp", "quantized_bindings.cpp", "grouped_bindings.cpp")
]


def build(library: Path, name: str, *kernels: str) -> None:
    """Compile and link ``library``. ``kernels``: sources, shared objects and flags of the linker.

    Raises: RuntimeError with the compiler's words.
    """
    torch_folder = Path(torch.__file__).parent
    # fmt: off
    command = [
        emulated.compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DMFT_CUDA_ON_HOST={name}", "-DMFT_CUDA_PRODUCT_SM90",
        "-isystem", str(torch_folder / "include"), f"-I{BINDINGS[0].parent}", *map(str, BINDINGS), *kernels,
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-Wl,-Bsymbolic", "-o", str(library),
    ]
    # fmt: on
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"csrc/cuda/*bindings.cpp do not compile for the host:\n{built.stderr}")


def emulated_kernels() -> list[str]:
    """What to link for the kernels in the emulator."""
    kernels = Path(emulated.library()._name)
    return [str(kernels), f"-Wl,-rpath,{kernels.parent}"]
