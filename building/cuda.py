"""Build libmft_cuda.so from csrc/cuda with nvcc and the C++ compiler. Needs neither a GPU nor a CUDA build of torch.

A file *_sm90* is only for Hopper and belongs to the group of that name (product_sm90_bf16.cu to product_sm90), which
is built completely or left out. The other files serve every GPU from 8.0 on. MFT_CUDA says what is wanted:

    unset    everything if there are a GPU (building/gpu.py) and an nvcc; else a reason, and the install continues
    0        nothing
    1        everything, and a failure is an error
    80,90    the same, only for these architectures (sm_80's code runs on 8.6 and 8.9 too)
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import register_hazards
from .compile import CPP_FLAGS, CannotBuild, Link, Unit, build, find_compiler, find_torch, system_headers
from .nvcc import Nvcc, Version, find_cutlass, find_nvcc
from .older_systems import build_for_older
from .ptxas_log import summary

LIBRARY = "libmft_cuda.so"

ARCHITECTURES = (80, 90, 100, 120)
USUAL = (80, 90)  # for newer GPUs the driver compiles compute_80's code once, and caches it
GROUPS = ("product_sm90", "score_grad_sm90")  # bindings.cpp works without these
REGISTER_FED = "product_sm90"
CLUSTERED = ("decode_sm80.cu",)  # have instructions on sm_90 that compute_80 lacks

NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--ptxas-options=-v",
]
#: From CUDA 13.0 on machine code is packed, because all its drivers unpack it: the library takes a quarter.
PACKED: tuple[Version, str] = ((13, 0), "--compress-mode=size")


@dataclass(frozen=True)
class Wanted:
    """``required``: asked for by name, so that a failure is an error; ``portable``: with code for later GPUs."""

    required: bool = False
    architectures: tuple[int, ...] = USUAL
    portable: bool = True

    @property
    def targets(self) -> list[str]:
        """The targets that the general files are compiled for."""
        return [f"sm_{a}" for a in self.architectures] + (["compute_80"] if self.portable else [])


def wanted() -> Wanted | None:
    """Return what MFT_CUDA asks for; None for nothing. Raises: ValueError for an unknown value."""
    value = os.environ.get("MFT_CUDA", "").strip()
    if value == "0":
        return None
    if value in ("", "1"):
        return Wanted(required=value == "1")
    names = [name.strip() for name in value.split(",")]
    known = [str(a) for a in ARCHITECTURES]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"MFT_CUDA must be 0, 1 or a list of {', '.join(known)}, got {unknown[0]!r}; "
            "for 8.6 and 8.9 say 80, whose code they run"
        )
    return Wanted(required=True, architectures=tuple(sorted({int(name) for name in names})), portable=False)


def build_cuda(directory: Path, sources: Path, asked: Wanted) -> dict:
    """Build into ``directory`` from csrc/cuda. Returns the tools used and what was left out, for the report."""
    nvcc = find_nvcc()
    version, torch_directory = find_torch()
    compiler = find_compiler()
    cutlass = find_cutlass()
    readers = register_hazards.find_readers()
    general, groups, left_out = plan(sources, asked, nvcc, cutlass is not None, readers)

    units = kernel_units(general, groups, asked, nvcc, compiler, [cutlass[1]] if cutlass else [])
    jobs = int(os.environ.get("MAX_JOBS") or min(2, os.cpu_count() or 1))  # a file may take 3 GiB
    build(directory, [unit for some in units.values() for unit in some], jobs=jobs)

    if REGISTER_FED in units:
        objects = [directory / unit.object for unit in units[REGISTER_FED] if unit.source.suffix == ".cu"]
        if reason := register_hazards.refusal_after(nvcc.ptxas, readers, objects):
            left_out[REGISTER_FED] = reason
            del units[REGISTER_FED]

    chosen = [unit for some in units.values() for unit in some]
    flags = [
        *CPP_FLAGS,
        *(f"-DMFT_CUDA_{name.upper()}" for name in units if name in GROUPS),
        f"-DMFT_CUDA_TARGETS={'.'.join(asked.targets)}",
        *system_headers([torch_directory / "include", *nvcc.include]),
    ]
    last = [*sorted(sources.glob("*bindings.cpp")), sources.parent / "older_systems.cpp"]
    everything = [*chosen, *(Unit(source, compiler, flags) for source in last)]
    link = Link(LIBRARY, compiler, link_flags(nvcc, torch_directory))
    return {
        "glibc": build_for_older(directory, everything, link, jobs),
        "torch": version,
        "nvcc": str(nvcc),
        "ptxas": ".".join(map(str, nvcc.ptxas)),
        "cutlass": cutlass[0] if cutlass else None,
        "targets": asked.targets,
        "left_out": left_out,
        "kernels": {
            u.source.name: summary((directory / u.log).read_text()) for u in chosen if u.source.suffix == ".cu"
        },
    }


def plan(
    sources: Path, asked: Wanted, nvcc: Nvcc, has_cutlass: bool, readers: register_hazards.Readers | None
) -> tuple[list[Path], dict[str, list[Path]], dict[str, str]]:
    """Return (files for every GPU, files of each group to compile, why the other groups are left out)."""
    general: list[Path] = []
    groups: dict[str, list[Path]] = {name: [] for name in GROUPS}
    for source in sorted([*sources.glob("*.cu"), *sources.glob("*.cpp")]):
        if source.name.endswith("bindings.cpp"):  # compiled last, against torch
            continue
        group = re.match(r".+_sm90", source.stem)
        if group and group[0] not in groups:
            raise CannotBuild(f"a file *_sm90* must belong to one of {', '.join(GROUPS)}, got {source.name}")
        (groups[group[0]] if group else general).append(source)
    if not any(source.suffix == ".cu" for source in general):
        raise CannotBuild(f"there are no kernels in {sources}")

    left_out = {}
    for name in GROUPS:
        if not groups[name]:
            left_out[name] = "this source tree does not have it"
        elif 90 not in asked.architectures:
            left_out[name] = f"it is for sm_90, and MFT_CUDA={os.environ.get('MFT_CUDA')} does not name that"
        elif not has_cutlass and needs_cutlass(groups[name]):
            left_out[name] = "CUTLASS's headers are missing; pip install nvidia-cutlass, or set CUTLASS_PATH"
        elif name == REGISTER_FED and (reason := register_hazards.refusal_before(nvcc.ptxas, readers)):
            left_out[name] = reason
    return general, {name: files for name, files in groups.items() if name not in left_out}, left_out


def needs_cutlass(files: Sequence[Path]) -> bool:
    """Whether one of the files includes CuTe or CUTLASS, directly or through our headers in its folder."""
    return any(
        re.search(r'^\s*#include [<"]cut(e|lass)/', path.read_text(), re.MULTILINE) for path in with_headers(files)
    )


def with_headers(files: Sequence[Path]) -> list[Path]:
    """Return the files and the headers in their folder that they include, directly or through others."""
    found: dict[Path, None] = {}
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found[path] = None
            included = re.findall(r'^\s*#include [<"](.+)[>"]', path.read_text(), re.MULTILINE)
            waiting += [path.parent / name for name in included]
    return list(found)


def kernel_units(
    general: Sequence[Path],
    groups: dict[str, list[Path]],
    asked: Wanted,
    nvcc: Nvcc,
    compiler: str,
    cutlass: Sequence[Path],
) -> dict[str, list[Unit]]:
    """Return the units for every GPU (named "") and for each group; only the groups read CUTLASS's headers."""

    def unit(source: Path, targets: list[str], headers: Sequence[Path] = ()) -> Unit:
        include = system_headers([*nvcc.include, *headers])
        if source.suffix == ".cpp":
            return Unit(source, compiler, [*CPP_FLAGS, *include])
        packed = [PACKED[1]] if nvcc.version >= PACKED[0] else []
        flags = [*NVCC_FLAGS, *packed, f"-ccbin={compiler}", *targets, *include]
        return Unit(source, str(nvcc.path), flags, [nvcc.root / "bin" / "ptxas"])

    # Groups with CUTLASS first: they take longest, and would otherwise run alone at the end.
    units = {}
    for name in sorted(groups, reverse=True):
        units[name] = [unit(source, ["-gencode=arch=compute_90a,code=sm_90a"], cutlass) for source in groups[name]]
    return units | {"": [unit(source, _general_targets(source, asked.targets)) for source in general]}


def _general_targets(source: Path, targets: Sequence[str]) -> list[str]:
    """Return targets that share one front-end pass, with one assembler run each; CLUSTERED files have sm_90 apart."""
    apart = [target for target in targets if target == "sm_90" and source.name in CLUSTERED]
    together = [target for target in targets if target not in apart]
    of_80 = [f"-gencode=arch=compute_80,code=[{','.join(together)}]"] if together else []
    return [*of_80, *("-gencode=arch=compute_90,code=sm_90" for _ in apart)]


def link_flags(nvcc: Nvcc, torch_directory: Path) -> list[str]:
    """Return flags for a library that needs only torch.

    CUDA's runtime is linked in, and the driver is looked up when a kernel is launched. torch is linked even if no
    symbol needs it: only a CUDA build of torch has the stream getter, which the library declares weak.
    """
    return [
        str(nvcc.runtime),
        f"-L{torch_directory / 'lib'}",
        "-Wl,--no-as-needed,-ltorch,-ltorch_cpu",
        "-Wl,--as-needed,-lrt,-lpthread,-ldl",
        "-Wl,--exclude-libs,ALL",
        "-Wl,-z,defs",
    ]
