"""python -m building.cubins [FOLDER] [--target sm_90,sm_100] [--processes N]: compile Triton's kernels ahead of time.

Writes FOLDER/TARGET.zip (mft_kernels/cubins) with the cubin of every launch of cubin_calls.py, and manifest.json. The
manifest says for each cubin what it is made for (backends/triton/specialise.py) and how it is launched. With them a
machine with an older Triton, or with none, runs the code of this one. No GPU is needed. A stopped run continues where
it was, through Triton's own cache.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST, expand_signature

from building.ahead import compile_ahead, gpu_target, recorded
from building.cubin_calls import calls
from building.machine_code.parameters import parameters
from mft_kernels.backends.triton.cubins import FOLDER, MANIFEST, kernels_hash
from mft_kernels.backends.triton.launch import Launch
from mft_kernels.backends.triton.specialise import identity
from mft_kernels.backends.triton.target import A100, B200, H100, Target, installed_assembler

TARGETS = {str(target): target for target in (A100, H100, B200)}
_BYTES = {"i1": 4, "i32": 4, "i64": 8, "fp32": 4, "nvTmaDesc": 128}


def launches(target: Target) -> dict[str, Launch]:
    """Return one launch for each binary, by what it is made for."""
    found: dict[str, Launch] = {}
    for call in calls():
        for launch in recorded(call, target):
            found.setdefault(identity(launch.kernel, launch.args, launch.options), launch)
    return found


def entry(launch: Launch, compiled: Any) -> dict[str, Any]:
    """Return the manifest's entry: how the binary is launched.

    Raises: ValueError if the kernel needs what no launch of ours provides, or if cubin and signature have different
    parameters.
    """
    about = compiled.metadata
    unusual = {name: value for name, value in (
        ("num_ctas", about.num_ctas - 1), ("global_scratch_size", about.global_scratch_size),
        ("profile_scratch_size", about.profile_scratch_size), ("launch_pdl", about.launch_pdl),
        ("launch_cooperative_grid", about.launch_cooperative_grid),
    ) if value}  # fmt: skip
    if unusual:
        raise ValueError(f"a kernel must be launched alone and without scratch, got {unusual} for {about.name}")
    maps = [
        [m["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[m["elem_type"]], m["swizzle"], *m["block_size"]]
        for m in about.tensordesc_meta
    ]
    signature = compiled.src.signature
    flat = [one for t in signature.values() for one in (t if isinstance(t, tuple) else (t,))]
    types = [t for t in expand_signature(flat, maps, "nvTmaDesc") if t != "constexpr"]
    types += ["*i8", "*i8"]  # global scratch, profile scratch
    cubin = compiled.asm["cubin"]
    places = parameters(cubin, about.name)
    sizes = [8 if t.startswith("*") else _BYTES[t] for t in types]
    if sizes != [size for _, size in places]:
        raise ValueError(f"parameters of {about.name} must be {types}, the cubin's are {places}")
    rest = iter(maps)
    return {
        "name": about.name,
        "warps": about.num_warps,
        "shared": about.shared,
        "signature": {name: t for name, t in signature.items() if t != "constexpr"},
        "constexprs": {launch.kernel.arg_names[at]: value for (at,), value in compiled.src.constants.items()},
        "parameters": [
            {"type": t, "offset": offset, "size": size} | ({"map": next(rest)} if t == "nvTmaDesc" else {})
            for t, (offset, size) in zip(types, places)
        ],
    }


def write(folder: Path, names: Iterable[str], processes: int = 2) -> None:
    """Compile for these targets and write their archives, printing one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for name in names:
            keys = list(launches(TARGETS[name]))
            done = pool.map(_compile, [name] * len(keys), range(len(keys)), chunksize=4)
            print(f"{name}: {write_archive(folder, name, dict(zip(keys, done)))}", flush=True)


def write_archive(folder: Path, name: str, binaries: dict[str, tuple[dict[str, Any], bytes]]) -> str:
    """Write one target's archive atomically. Returns its number of cubins and size, in words."""
    path = folder / f"{name}.zip"
    about = {
        "target": name,
        "triton": triton.__version__,
        "ptxas": ".".join(map(str, installed_assembler(int(name.removeprefix("sm_"))))),
        "kernels": kernels_hash(),
        "cubins": {},
    }
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i, (key, (launched, cubin)) in enumerate(binaries.items()):
            file = f"{launched['name'].strip('_')}_{i}.cubin"
            about["cubins"][key] = launched | {"file": file}
            archive.writestr(zipfile.ZipInfo(file), cubin, zipfile.ZIP_DEFLATED)
        archive.writestr(zipfile.ZipInfo(MANIFEST), json.dumps(about, indent=1), zipfile.ZIP_DEFLATED)
    part.replace(path)
    return f"{len(binaries)} cubins, {path.stat().st_size / 1e6:.1f} MB in {path}"


_launches: dict[str, list[Launch]] = {}


def _compile(name: str, i: int) -> tuple[dict[str, Any], bytes]:
    if name not in _launches:  # a launch cannot be sent to another process, but its index can
        knobs.compilation.disable_line_info = True  # line info is two thirds of a cubin
        _launches[name] = list(launches(TARGETS[name]).values())
    return compiled(_launches[name][i], TARGETS[name])


def compiled(launch: Launch, target: Target) -> tuple[dict[str, Any], bytes]:
    """Return (entry of the manifest, cubin)."""
    found = compile_ahead(launch.kernel, gpu_target(target), launch.args, launch.options)
    return entry(launch, found), found.asm["cubin"]


def main(arguments: list[str] | None = None) -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(prog="python -m building.cubins", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--target", default=",".join(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args(arguments)
    names = asked.target.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--target must be among {', '.join(TARGETS)}, got {unknown[0]!r}")
    write(asked.folder, names, asked.processes)


if __name__ == "__main__":
    main(sys.argv[1:])
