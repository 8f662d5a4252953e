"""Triton's launcher and ours on a driver that records (driver.cpp), with CPU tensors treated as a GPU's.

build() compiles both sides. The rest is for a process of its own, which looks for libcuda.so.1 after Stub has loaded
it.
"""

import contextlib
import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from building.compile import find_compiler
from mft_kernels.backends import built
from mft_kernels.backends.triton import cubins, planned
from mft_kernels.backends.triton import target as targets
from mft_kernels.backends.triton.launch import Launch, record
from mft_kernels.backends.triton.target import Target, assume

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
OPS = "mft_cuda_cubins"
OPS_LIBRARY = "libops.so"


def build(folder: Path) -> None:
    """Build the driver, and csrc/cuda's launcher with its ops for CPU tensors."""
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"  # Triton's cuda.h
    torch_folder = Path(torch.__file__).parent
    sources = [ROOT / "csrc/cuda" / name for name in ("cubin.cpp", "cubin_bindings.cpp", "plan_bindings.cpp")]
    flags = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DMFT_CUDA_ON_HOST", "-isystem",
        str(torch_folder / "include"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-ldl",
    ]  # fmt: skip
    _compile(folder / "libcuda.so.1", headers, [HERE / "driver.cpp"], ["-Wl,-soname,libcuda.so.1"])
    _compile(folder / OPS_LIBRARY, headers, sources, flags)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def _compile(library: Path, headers: Path, sources: list[Path], flags: list[str]) -> None:
    command = [find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += ["-isystem", str(headers), *map(str, sources), *flags, "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        sys.exit(built.stderr)


class Stub:
    """The driver with our launcher, for as long as the process lives; ``archives``: a folder other than its own."""

    def __init__(self, folder: Path, archives: Path | None = None) -> None:
        self.folder = folder
        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self._library.recorded.restype = ctypes.c_char_p
        built.load_ops(folder / OPS_LIBRARY, OPS)
        built.cuda_ops = getattr(torch.ops, OPS)
        cubins.FOLDER = archives or folder
        cubins.load = lambda part: None

    def launches(self) -> list[dict]:
        """Return the launches since the last call."""
        return [json.loads(line) for line in self._library.recorded().decode().splitlines()]

    def modules_loaded(self) -> int:
        return self._library.modules_loaded()

    def set_recording(self, on: bool) -> None:
        """Turn recording on or off: it takes longer than the code that leads to a launch."""
        self._library.set_recording(on)

    def use_triton_s_launcher(self, arch: int) -> None:
        """From now on launch kernels with Triton's own driver.c, compiled against the stub."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia import driver

        class OnStub(driver.CudaDriver):
            def __init__(self) -> None:
                self.utils = driver.CudaUtils()
                self.launcher_cls = driver.CudaLauncher

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", arch, 32)

            def get_current_device(self) -> int:
                return arch  # Triton caches compiled kernels by device, so each target is a device

            def get_current_stream(self, device: int) -> int:
                return 0

        triton.knobs.nvidia.libcuda_path = str(self.folder)
        triton.runtime.driver.set_active(OnStub())


@contextlib.contextmanager
def taken_for(target: Target) -> Iterator[None]:
    """Within the context, CPU tensors count as on a card of this target, and plans of other targets are forgotten."""
    planned.forget()
    on_card = mock.patch.object(targets, "_ask", return_value=(target, None))
    with on_card, mock.patch.object(torch.cuda, "current_device", return_value=0):
        yield
    planned.forget()


def launches_of(call: Callable[[], object], target: Target) -> list[Launch]:
    """Return the launches with their tensors, so that both launchers pass the same addresses."""
    with assume(target), record() as launched:
        call()
    return launched
