"""Triton's launcher and ours on a driver that records (driver.cpp), for CPU tensors taken for a GPU's.

To be imported in a process of its own, before anything asks for libcuda.so.1.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from building.compile import find_compiler
from mft_kernels.triton.launch import Launch, record
from mft_kernels.triton.target import Target, assume

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"  # Triton's cuda.h
OPS = "mft_cuda_cubins"


class Stub:
    """The driver, once loaded for the whole process."""

    def __init__(self, folder: Path) -> None:
        library = folder / "libcuda.so.1"
        _compile(library, [HERE / "driver.cpp"], ["-Wl,-soname,libcuda.so.1"])
        (folder / "libcuda.so").symlink_to(library)
        triton.knobs.nvidia.libcuda_path = str(folder)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.recorded.restype = ctypes.c_char_p

    def launches(self) -> list[dict]:
        """Since they were last asked for."""
        return [json.loads(line) for line in self._library.recorded().decode().splitlines()]

    def modules_loaded(self) -> int:
        return self._library.modules_loaded()


def load_ops(folder: Path) -> None:
    """csrc/cuda's launcher for CPU tensors, in the place of torch.ops.mft_cuda."""
    sources = [ROOT / "csrc/cuda" / name for name in ("cubin.cpp", "cubin_bindings.cpp")]
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DMFT_CUDA_ON_HOST={OPS}", "-isystem",
        str(torch_folder / "include"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-ldl",
    ]  # fmt: skip
    _compile(folder / "libops.so", sources, flags)
    torch.ops.load_library(folder / "libops.so")
    torch.ops.mft_cuda = getattr(torch.ops, OPS)


def use_triton_s_launcher(arch: int) -> None:
    """Triton's own driver.c, compiled against the stub, launches from now on."""
    from triton.backends.nvidia import driver

    class OnStub(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils = driver.CudaUtils()
            self.launcher_cls = driver.CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch  # Triton keeps compiled kernels by device: one device a target

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(OnStub())


def launches_of(call: Callable[[], object], target: Target) -> list[Launch]:
    """With their tensors: both launchers then pass the same addresses."""
    with assume(target), record() as launched:
        call()
    return launched


def _compile(library: Path, sources: list[Path], flags: list[str]) -> None:
    command = [find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += ["-isystem", str(HEADERS), *map(str, sources), *flags, "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        sys.exit(built.stderr)
