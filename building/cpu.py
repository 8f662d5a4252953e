"""Build libmft_cpu.so from csrc/*.cpp and csrc/cpu with the C++ compiler."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .compile import CPP_FLAGS, CannotBuild, Link, Unit, accepts, find_compiler, find_torch, system_headers
from .older_systems import build_for_older

LIBRARY = "libmft_cpu.so"

AVX2_FLAGS = ["-mavx2", "-mfma"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
DOT_BFLOAT16_FLAGS = ["-mavx512bf16"]
AMX_FLAGS = ["-mamx-tile", "-mamx-bf16"]
X86_FLAGS = {
    "row_kernels_avx2.cpp": AVX2_FLAGS,
    "row_kernels_avx512.cpp": AVX512_FLAGS,
    "step_kernels_avx2.cpp": AVX2_FLAGS,
    "step_kernels_avx512.cpp": [*AVX512_FLAGS, "-mprefer-vector-width=512"],
    "decode_avx2.cpp": [*AVX2_FLAGS, "-mf16c"],
    "decode_avx512.cpp": [*AVX512_FLAGS, "-mprefer-vector-width=512"],
    "decode_avx512_bf16.cpp": [*AVX512_FLAGS, *DOT_BFLOAT16_FLAGS, "-mprefer-vector-width=512"],
    "few_tokens_avx2.cpp": [*AVX2_FLAGS, "-mf16c"],
    "few_tokens_avx512.cpp": AVX512_FLAGS,
    "few_tokens_avx512_bf16.cpp": [*AVX512_FLAGS, *DOT_BFLOAT16_FLAGS],
    "gemm_float32.cpp": AVX512_FLAGS,
    "gemm_bfloat16.cpp": [*AVX512_FLAGS, *DOT_BFLOAT16_FLAGS],
    "gemm_amx.cpp": [*AVX512_FLAGS, *DOT_BFLOAT16_FLAGS, *AMX_FLAGS],
    "gemm_amx_emulated.cpp": [*AVX512_FLAGS, *DOT_BFLOAT16_FLAGS],
}
DOT_BFLOAT16_FILES = ["decode_avx512_bf16.cpp", "few_tokens_avx512_bf16.cpp", "gemm_bfloat16.cpp"]
AMX_FILES = ["gemm_amx.cpp", "gemm_amx_emulated.cpp"]
# Needed to vectorise loops with a square root, a choice or a conversion; they change no value.
VECTOR_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]


def build_cpu(directory: Path, sources: Path, extra: Sequence[str] = (), compiler: str | None = None) -> dict:
    """Build into ``directory`` from csrc, with ``extra`` flags. Returns the tools and flags used, for the report."""
    version, torch_directory = find_torch()
    compiler = compiler or find_compiler()
    link = Link(LIBRARY, compiler, [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ltorch", *extra])
    found = [replace(unit, flags=[*unit.flags, *extra]) for unit in units(compiler, torch_directory, sources)]
    glibc = build_for_older(directory, found, link)
    first_line = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"glibc": glibc, "compiler": first_line, "torch": version}


def units(compiler: str, torch_directory: Path, sources: Path, machine: str | None = None) -> list[Unit]:
    """Return the library's files that this compiler can use for ``machine``, by default the machine that runs this."""
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64")
    dot_bfloat16 = x86 and accepts(compiler, DOT_BFLOAT16_FLAGS)
    amx = dot_bfloat16 and accepts(compiler, AMX_FLAGS)
    unknown = [*([] if dot_bfloat16 else DOT_BFLOAT16_FILES), *([] if amx else AMX_FILES)]
    flags = [
        *CPP_FLAGS,
        "-ffp-contract=off",
        *(["-DMFT_X86"] if x86 else []),
        *(["-DMFT_DOT_BFLOAT16"] if dot_bfloat16 else []),
        *(["-DMFT_AMX"] if amx else []),
        *system_headers([torch_directory / "include"]),
    ]
    found = []
    for source in [*sorted(sources.glob("*.cpp")), *sorted((sources / "cpu").glob("*.cpp"))]:
        own = X86_FLAGS.get(source.name, [])
        if (own and not x86) or source.name in unknown:
            continue
        if source.name.startswith(("decode_", "row_kernels_", "step_kernels_")):
            own = [*own, *VECTOR_FLAGS]
        found.append(Unit(source, compiler, [*flags, *own]))
    return found


def library_capabilities(environment: dict[str, str], prefix: Sequence[str] = ()) -> list[str]:
    """Return the capabilities of the library in MFT_CPU_LIBRARY.

    Without this check all tests would be skipped if it cannot be loaded. ``prefix``: of the command that loads it.
    Raises: CannotBuild.
    """
    script = (
        "from mft_kernels.backends import cpu; print(cpu.unavailable or '', ','.join(cpu.capabilities()), sep='\\n')"
    )
    environment = {name: value for name, value in environment.items() if name != "MFT_CPU_CAPABILITY"}
    command = [*prefix, sys.executable, "-c", script]
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if ran.returncode != 0:
        raise CannotBuild(f"mft_kernels cannot be imported: {ran.stderr.strip()}")
    unavailable, capabilities = ran.stdout.splitlines()[-2:]
    if unavailable:
        raise CannotBuild(f"the library is not used: {unavailable}")
    return capabilities.split(",")
