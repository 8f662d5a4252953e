"""For a dry run: backend="cuda" on CPU tensors, its bindings over the kernels in the emulator of the tests.

It is compiled once, into build/cuda_on_host, and again when a source changes.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from ..harness import ROOT

_FOLDER = ROOT / "build" / "cuda_on_host"
_NAME = "mft_cuda_on_host"


def install() -> str | None:
    """Put the emulated ops in the place of torch.ops.mft_cuda. Returns why they cannot be had, or None.

    Raises: RuntimeError, with the compiler's words, if the sources do not compile.
    """
    for folder in ("tests", "tests/cuda_kernels"):
        if str(ROOT / folder) not in sys.path:
            sys.path.append(str(ROOT / folder))
    try:
        import emulated
    except ImportError as error:
        return f"the emulator lies with the tests, and they are not here: {error}"
    if not _FOLDER.exists():
        print("compiling csrc/cuda for the emulator, minutes the first time", flush=True)
    try:
        kernels = Path(emulated.library()._name)
        torch.ops.load_library(_bindings(emulated.compiler(), kernels))
    except emulated.NotBuilt as reason:
        return str(reason)
    torch.ops.mft_cuda = getattr(torch.ops, _NAME)
    os.environ.setdefault("MFT_CUDA_CAPABILITY", "90")  # Hopper's kernels where they take the arguments, else sm_80's
    return None


def _bindings(compiler: str, kernels: Path) -> Path:
    sources = [ROOT / "csrc/cuda/bindings.cpp", ROOT / "csrc/cuda/api.h", Path(__file__)]
    library, torch_folder = _FOLDER / f"{torch.__version__}.so", Path(torch.__file__).parent
    if library.exists() and library.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return library
    _FOLDER.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    # fmt: off
    command = [
        compiler, "-std=c++17", "-O1", "-fPIC", "-shared",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DMFT_CUDA_ON_HOST={_NAME}", "-DMFT_CUDA_PRODUCT_SM90",
        "-isystem", str(torch_folder / "include"), str(sources[0]), str(kernels), f"-Wl,-rpath,{kernels.parent}",
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-o", str(part),
    ]
    # fmt: on
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"csrc/cuda/bindings.cpp does not compile for the host:\n{built.stderr}")
    part.replace(library)  # whole or not at all: another dry run may be reading it
    return library
