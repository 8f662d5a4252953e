"""python -m building.cubins [FOLDER] [--target sm_90,sm_100] [--processes N]: Triton's kernels, compiled ahead of time.

Writes FOLDER/TARGET.zip (mft_kernels/cubins) with the cubin of every launch of calls() and manifest.json, which says
of each what it is made for (mft_kernels.triton.specialise) and how it is launched. By them a machine with an older
Triton, or with none, runs the code of this one. No GPU is needed.
"""

import argparse
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST, expand_signature

from building.ahead import compile_ahead, gpu_target, recorded
from building.machine_code.parameters import parameters
from mft_kernels.reference_step import BLOCK
from mft_kernels.triton import bits, many, ops, score_step, select
from mft_kernels.triton.cubins import FOLDER, MANIFEST, kernels_hash
from mft_kernels.triton.launch import Launch
from mft_kernels.triton.specialise import identity
from mft_kernels.triton.target import A100, B200, H100, Target, installed_assembler

TARGETS = {str(target): target for target in (A100, H100, B200)}
#: Tokens, N and K by which every tile that plan.py has for 16-bit operands is chosen. N and K are multiples of 16, as
#: those of layers are, K / 32 is one or not. What is launched otherwise is compiled where it is launched.
TOKENS = (1, 16, 24, 64, 100, 128, 256, 300, 512, 1024, 2048, 4096)
FEATURES = ((4096, 4096), (4096, 11008), (11008, 4096), (1024, 4096), (576, 576), (1536, 576), (576, 1536))
_MAGNITUDE = "magnitude"
_BYTES = {"i1": 4, "i32": 4, "i64": 8, "fp32": 4, "nvTmaDesc": 128}


def calls() -> Iterator[Callable[[], object]]:
    """Calls with tensors on no device, whose launches are compiled: what layers do in 16 bits, in magnitude mode.

    A mask a row: in bf16 and without bias, up to 16 masks, which take the longest to compile. Steps: of bf16 weights.
    """
    for n, k in FEATURES:
        for scores_dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield from _selections(n, k, scores_dtype)
        for dtype in (torch.bfloat16, torch.float16):
            for m in TOKENS:
                yield from _products(m, n, k, dtype)
        for scores_dtype, eight_bit in itertools.product((torch.float32, torch.bfloat16, torch.int16), (True, False)):
            yield _step(n, k, scores_dtype, eight_bit)
        for m, masks in itertools.product((8, 24, 64), (1, 2, 4, 8, 16)):
            yield _rows_of_many_masks(m, n, k, masks)


def _selections(n: int, k: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    scores, threshold = _empty(n, k, dtype=dtype), _empty(dtype=dtype)
    yield lambda: select.kept_threshold(scores, 0.9, _MAGNITUDE)
    yield lambda: bits.pack_mask(scores, threshold, _MAGNITUDE)
    yield lambda: bits.pack_signs(scores)


def _products(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    x, grad, weight = (_empty(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n, k)))
    packed = _empty(n, -(-k // 32), dtype=torch.int32)
    wanted = ([True, False, False, False], [True, False, True, False], [False, False, True, False])
    for bias in (None, _empty(n, dtype=dtype)):
        yield lambda bias=bias: ops.masked_linear_packed(x, weight, packed, bias)
    for scores_dtype in (torch.float32, torch.bfloat16):
        scores, threshold = _empty(n, k, dtype=scores_dtype), _empty(dtype=scores_dtype)
        for bias in (None, _empty(n, dtype=dtype)):
            yield lambda bias=bias, s=scores, t=threshold: ops.masked_linear(x, weight, s, t, bias, _MAGNITUDE)
        for asked in wanted:
            yield lambda asked=asked, s=scores, t=threshold: ops.masked_linear_backward(
                grad, x, weight, s, t, _MAGNITUDE, asked
            )
            yield lambda asked=asked, s=scores: ops.masked_linear_packed_backward(
                grad, x, weight, packed, s, packed, _MAGNITUDE, asked
            )
    sums = _empty(n, k, dtype=torch.float32)
    yield lambda: ops.accumulate_score_grad(sums, grad, x, weight, None, packed, _MAGNITUDE)
    yield lambda: ops.accumulate_product(sums, grad, x)


def _rows_of_many_masks(m: int, n: int, k: int, masks: int) -> Callable[[], object]:
    x, weight = (_empty(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
    packed, tasks = [_empty(n, -(-k // 32), dtype=torch.int32)] * masks, _empty(m, dtype=torch.int32)
    return lambda: many.masked_linear_many(x, weight, packed, tasks, None)


def _step(n: int, k: int, dtype: torch.dtype, eight_bit: bool) -> Callable[[], object]:
    scores, threshold = _empty(n, k, dtype=dtype), _empty(dtype=dtype)
    grad, weight = _empty(n, k, dtype=torch.float32), _empty(n, k, dtype=torch.bfloat16)
    first, second = (_empty(n, k, dtype=torch.uint8 if eight_bit else torch.float32) for _ in range(2))
    scales = _empty(2, -(-n * k // BLOCK), dtype=torch.float32) if eight_bit else None
    adam = {"step": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    asked = {"grad_scale": None, "seed": 0, "mode": _MAGNITUDE, "keep_ratio": 0.9, "threshold": threshold}
    return lambda: score_step.score_step(scores, grad, weight, first, second, scales, **adam, **asked)


def launches(target: Target) -> dict[str, Launch]:
    """One of each binary, by what it is made for."""
    found: dict[str, Launch] = {}
    for call in calls():
        for launch in recorded(call, target):
            found.setdefault(identity(launch.kernel, launch.args, launch.options), launch)
    return found


def entry(launch: Launch, compiled: Any) -> dict[str, Any]:
    """Of the manifest: how the binary is launched.

    Raises: ValueError for what no launch of ours gives it, and where cubin and signature have other parameters.
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
    """Compile for these targets and write their archives, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for name in names:
            keys = list(launches(TARGETS[name]))
            done = pool.map(_compile, [name] * len(keys), range(len(keys)), chunksize=4)
            print(f"{name}: {write_archive(folder, name, dict(zip(keys, done)))}", flush=True)


def write_archive(folder: Path, name: str, binaries: dict[str, tuple[dict[str, Any], bytes]]) -> str:
    """Write one target's archive whole or not at all. Returns how much that is."""
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
    if name not in _launches:  # a launch cannot be sent to another process, its place in the list can
        knobs.compilation.disable_line_info = True  # two thirds of a cubin
        _launches[name] = list(launches(TARGETS[name]).values())
    return compiled(_launches[name][i], TARGETS[name])


def compiled(launch: Launch, target: Target) -> tuple[dict[str, Any], bytes]:
    """(entry of the manifest, cubin)."""
    found = compile_ahead(launch.kernel, gpu_target(target), launch.args, launch.options)
    return entry(launch, found), found.asm["cubin"]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
