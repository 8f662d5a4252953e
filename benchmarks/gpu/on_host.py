"""For a dry run: backend="cuda" on CPU tensors, its bindings over the kernels in the emulator of the tests.

It is compiled once, into build/cuda_on_host, and again when a source changes.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from mft_kernels.backends import built

from ..harness import ROOT

_FOLDER = ROOT / "build" / "cuda_on_host"
_NAME = "mft_cuda_on_host"


def install() -> str | None:
    """Put the emulated ops in the place of the library's. Returns why they cannot be had, or None.

    Raises: RuntimeError, with the compiler's words, if the sources do not compile.
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
    os.environ.setdefault("MFT_CUDA_CAPABILITY", "90")  # Hopper's kernels where they take the arguments, else sm_80's
    return None


def _bindings(on_host: ModuleType) -> Path:
    headers = [on_host.BINDINGS[0].parent / name for name in ("api.h", "operands.h", "place.h", "../registration.h")]
    sources = [*on_host.BINDINGS, *headers, Path(on_host.__file__)]
    library = _FOLDER / f"{torch.__version__}.so"
    if library.exists() and library.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return library
    _FOLDER.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    on_host.build(part, _NAME, *on_host.emulated_kernels())
    part.replace(library)  # whole or not at all: another dry run may be reading it
    return library
