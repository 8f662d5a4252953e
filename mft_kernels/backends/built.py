"""Load what setup.py has built, libmft_cpu.so and libmft_cuda.so, or say why not; read its _build.json."""

import ctypes
import json
import os
from pathlib import Path

import torch

from .._ops import ops

PACKAGE = Path(__file__).parents[1]  # where setup.py puts what it builds
# The namespaces of the libraries' ops: mft_cpu and mft_cuda.
cpu_ops = getattr(torch.ops, f"{ops.name}_cpu")
cuda_ops = getattr(torch.ops, f"{ops.name}_cuda")


def load(part: str, folder: Path = PACKAGE) -> str | None:
    """Load the library of ``part`` ("cpu" or "cuda"), which defines its ops. Return None, or why it does not load."""
    variable, library = _variable(part), library_path(part, folder)
    if os.environ.get(variable) and not library.exists():
        return f"{variable} must be a library that exists, got {library}; unset it for the one that setup.py built"
    if not library.exists():
        reason = report(part, folder).get("reason") or "setup.py has not run"
        return f"its library is not built: {reason}; see setup.py, then pip install --no-build-isolation -e ."
    try:
        load_ops(library, f"{ops.name}_{part}")
    except OSError as error:  # built for another torch or another machine
        return (
            f"its library {library.name} does not load with torch {torch.__version__}: {error}; build it again with "
            "pip install --no-build-isolation -e ."
        )
    return None


def load_ops(library: Path, namespace: str) -> None:
    """Load one of our libraries, and let it define its ops in torch.ops.NAMESPACE.

    Raises: OSError if it is not one of ours, RuntimeError if one of the ops is defined already.
    """
    torch.ops.load_library(library)
    loaded = ctypes.PyDLL(os.path.realpath(library))  # as torch loads it
    try:
        register = loaded.mft_register_ops
    except AttributeError:
        raise OSError(f"{library} has no mft_register_ops: it was built from other sources") from None
    register.argtypes, register.restype = [ctypes.c_char_p], ctypes.c_char_p
    reason = register(namespace.encode())
    if reason is not None:
        raise RuntimeError(f"the ops of {library} cannot be defined in {namespace}: {reason.decode()}")


def library_path(part: str, folder: Path = PACKAGE) -> Path:
    """Return the path where the library of ``part`` is expected."""
    return Path(os.environ.get(_variable(part)) or folder / f"libmft_{part}.so")


def _variable(part: str) -> str:
    # MFT_CPU_LIBRARY, MFT_CUDA_LIBRARY: another build of the same code, for instance under a sanitizer.
    return f"MFT_{part.upper()}_LIBRARY"


def report(part: str, folder: Path = PACKAGE) -> dict:
    """Return what setup.py recorded about that library: built or not, the reason, compilers, what was left out.

    The record is {} if there is none.
    """
    path = folder / "_build.json"
    return json.loads(path.read_text()).get(part, {}) if path.exists() else {}
