"""A backend for dry runs that runs the CUDA kernels on CPU tensors: their bindings, over the emulator of the tests.

The bindings are compiled once, into build/cuda_on_host, and again when a source changes.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from mft_kernels.backends import built
from mft_kernels.backends.table import Backend, register, registered

from ..records import ROOT

#: The backend's name in calls of ops: the backend "cuda" accepts only GPU tensors.
BACKEND = "cuda_on_host"
_FOLDER = ROOT / "build" / "cuda_on_host"
_NAME = "mft_cuda_on_host"


def install() -> str | None:
    """Register the backend with the ops of "cuda". Return why this is impossible, or None.

    Raises: RuntimeError with the compiler's output, if the sources do not compile.
    """
    for folder in ("tests", "tests/cuda_kernels"):
        if str(ROOT / folder) not in sys.path:
            sys.path.append(str(ROOT / folder))
    try:
        import bindings_on_host
        import emulated
    except ImportError as error:
        return f"the emulator lies with the tests, and they are not here: {error}"
    if not _FOLDER.exists():
        print("compiling csrc/cuda for the emulator, minutes the first time", flush=True)
    try:
        built.load_ops(_bindings(bindings_on_host), _NAME)
    except emulated.NotBuilt as reason:
        return str(reason)
    built.cuda_ops = getattr(torch.ops, _NAME)
    cuda = registered("cuda")
    on_cpu = frozenset({"cpu"})
    register(Backend(BACKEND, on_cpu, cuda.dtypes, cuda.functions, takes=cuda.takes))
    os.environ.setdefault("MFT_CUDA_CAPABILITY", "90")  # Hopper's kernels if they take the arguments, else sm_80's
    return None


def _bindings(on_host: ModuleType) -> Path:
    headers = [on_host.BINDINGS.parent / name for name in ("api.h", "operands.h", "place.h", "../registration.h")]
    sources = [on_host.BINDINGS, *headers, Path(on_host.__file__)]
    library = _FOLDER / f"{torch.__version__}.so"
    if library.exists() and library.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return library
    _FOLDER.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    on_host.build(part, _NAME, *on_host.emulated_kernels())
    part.replace(library)  # atomic: another dry run may be reading it
    return library
