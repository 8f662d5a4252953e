"""The compiled kernels of csrc/cuda: a row of figures for each, and its faults by the rules of its target."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from building.machine_code import hazard
from building.machine_code.sass import Loop

from .cuda_launches import Launch, launches
from .cuda_object import Kernel, kernels

_ROOT = Path(__file__).parents[2]
SOURCES = _ROOT / "csrc" / "cuda"
OBJECTS = _ROOT / "build" / "cuda"  # where setup.py keeps them


@dataclass(frozen=True)
class Gpu:
    """Limits of a compute capability: KiB of shared memory per multiprocessor and block, threads per multiprocessor.

    CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
    """

    shared: int
    block_shared: int
    threads: int


_GPUS = {
    80: Gpu(164, 163, 2048),
    86: Gpu(100, 99, 1536),
    87: Gpu(164, 163, 1536),
    89: Gpu(100, 99, 1536),
    90: Gpu(228, 227, 2048),
    100: Gpu(228, 227, 2048),
    120: Gpu(100, 99, 1536),
}
#: The first capability that a target's code runs on.
_CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_90a": 90, "sm_100": 100, "sm_120": 120}

_REGISTERS = 65536  # per multiprocessor, for all of these
_RESERVED = 1024  # bytes of shared memory that each block gives to the system


@dataclass(frozen=True)
class Row:
    """Figures of one kernel for one target. A kernel without faults is fine.

    ``shared``: bytes of the kernel and its launch; ``blocks``: how many fit a multiprocessor; ``declared``: how many
    the kernel asks for; ``spilled``: bytes.
    """

    target: str
    kernel: str
    threads: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    declared: int
    loops: tuple[str, ...]
    faults: tuple[str, ...]


def missing(report: Mapping) -> str | None:
    """Return why there is nothing to read, from the part "cuda" of _build.json; None if there is something."""
    if not report.get("built"):
        return report.get("reason") or "it was never built; make cuda"
    for name in report["kernels"]:
        if not (OBJECTS / f"{name}.o").exists() or not (OBJECTS / f"{name}.o.log").exists():
            return f"{name}.o or its log is not in build/cuda; make cuda"
    for name in report["kernels"]:
        if newer := _changed_since(SOURCES / name, (OBJECTS / f"{name}.o").stat().st_mtime):
            return f"{newer} has changed since {name} was compiled; make cuda"
    return None


def rows(report: Mapping, *, processes: int = 2) -> list[Row]:
    """Return the rows of every kernel that is linked into the library.

    Raises: ValueError if objects, logs and launches disagree.
    """
    objects = [OBJECTS / f"{name}.o" for name in report["kernels"]]
    host = [
        OBJECTS / f"{source.name}.o"
        for source in sorted(SOURCES.glob("*.cpp"))
        if not source.name.endswith("bindings.cpp") and source.stem not in report["left_out"]
    ]
    launched = launches([*objects, *host])
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        largest_first = sorted(objects, key=lambda path: -path.stat().st_size)
        found = dict(zip(largest_first, pool.map(_read, largest_first, [launched] * len(objects)), strict=True))
    return [one for path in objects for one in found[path]]


def _read(path: Path, launched: Mapping[str, Mapping[int, Launch]]) -> list[Row]:
    return [row(one, launched.get(one.symbol, {})) for one in kernels(path, Path(f"{path}.log").read_text())]


def row(kernel: Kernel, launched: Mapping[int, Launch]) -> Row:
    """Return a kernel's row. ``launched``: its launches by capability.

    The number of blocks that fit is computed for the launch on the target's own capability, if there is one.
    """
    shared = kernel.code.shared + max((one.shared for one in launched.values()), default=0)
    capability = _CAPABILITIES[kernel.target]
    asked = kernel.code.shared + launched[capability].shared if capability in launched else shared
    blocks = blocks_that_fit(kernel.code.registers, kernel.threads, asked, _GPUS[capability])
    return Row(
        kernel.target,
        kernel.name,
        kernel.threads,
        kernel.code.registers,
        kernel.spilled,
        shared,
        blocks,
        kernel.blocks,
        tuple(map(_loop_text, kernel.code.loops)),
        tuple(faults(kernel, launched, blocks)),
    )


def blocks_that_fit(registers: int, threads: int, shared: int, gpu: Gpu) -> int:
    """Return the blocks that fit a multiprocessor.

    Registers are allocated to warps in units of 256, and each quarter of a multiprocessor has its own.
    """
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        _REGISTERS // 4 // of_warp * 4 // warps, gpu.threads // threads, gpu.shared * 1024 // (shared + _RESERVED)
    )


def faults(kernel: Kernel, launched: Mapping[int, Launch], blocks: int) -> Iterator[str]:
    code = kernel.code
    if kernel.spilled:
        yield f"{kernel.spilled} bytes spilled"
    elif code.spills:
        yield f"{code.spill_stores} stores to local memory, {code.spill_loads} loads"
    if code.stack:
        yield f"a stack of {code.stack} bytes"
    if blocks < kernel.blocks:
        yield f"{kernel.blocks} blocks shall share a multiprocessor, registers and shared memory let {blocks}"
    yield from kernel.warnings
    yield from _faults_of_launches(kernel, launched)
    if kernel.name.startswith(("Product", "ScoreGrad", "Decode")):
        yield from _faults_of_hopper(kernel) if kernel.target == "sm_90a" else _faults_of_general(kernel)


def _faults_of_launches(kernel: Kernel, launched: Mapping[int, Launch]) -> Iterator[str]:
    if not launched:
        yield "nothing launches it; if something can, benchmarks/kernel_code/cuda_calls.cpp shall"
    for capability, one in launched.items():
        limit = _GPUS[capability].block_shared * 1024
        if kernel.code.shared + one.shared > limit:
            yield f"{kernel.code.shared + one.shared} bytes of shared memory, {capability / 10} gives a block {limit}"
        if one.threads != kernel.threads:
            yield f"launched with {one.threads} threads, compiled for {kernel.threads}"


def _faults_of_general(kernel: Kernel) -> Iterator[str]:
    if not any(loop.counts["HMMA"] for loop in kernel.code.loops):
        yield "no loop with HMMA"
    if kernel.target == "sm_90" and kernel.name.startswith("Decode") and not kernel.code.counts["UCGABAR_ARV"]:
        yield "no barrier of a cluster, which is launched there"


def _faults_of_hopper(kernel: Kernel) -> Iterator[str]:
    loops = kernel.code.loops
    if not any(loop.counts["HGMMA"] for loop in loops):
        yield "no loop with HGMMA"
    if not kernel.code.counts["UTMALDG"]:
        yield "no copies by TMA"
    if kernel.name.startswith("Product"):  # the others' loop is CUTLASS's, from shared memory
        for loop in loops:
            if loop.register_a < loop.mma:
                yield f"{loop.mma - loop.register_a} of {loop.mma} HGMMA take no operand from registers"
            if loop.full_waits:
                yield f"{loop.full_waits} full waits in a loop of {loop.mma} HGMMA"
    if found := hazard.hazards(kernel.text):
        yield f"{len(found)} hazards, the first: {found[0]}"


def _loop_text(loop: Loop) -> str:
    """Return ``HGMMA 8 (8 from registers), waits 0+2, LDSM 16, 431 instructions``, without copies by other warps."""
    name = "HGMMA" if loop.counts["HGMMA"] else "HMMA"
    parts = [f"{name} {loop.mma}"]
    if name == "HGMMA":
        parts[0] += f" ({loop.register_a} from registers)" if loop.register_a else ""
        parts.append(f"waits {loop.full_waits}+{loop.partial_waits}")
    parts += [f"{other} {loop.counts[other]}" for other in ("LDSM", "LDGSTS", "UTMALDG") if loop.counts[other]]
    return ", ".join([*parts, f"{sum(loop.counts.values())} instructions"])


_HEAD = (
    "| target | kernel | numbers | binaries | threads | registers | spilled | shared | blocks | loop | faults |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|---|---:|",
)


def table(done: Iterable[Row]) -> str:
    """Return Markdown, one line per kernel, target and numbers in its name: the worst of its instances."""
    groups: dict[tuple[str, str, str, int], list[Row]] = defaultdict(list)
    for one in done:
        groups[one.target, one.kernel.split("<")[0], ", ".join(numbers(one.kernel)), one.declared].append(one)
    lines = list(_HEAD)
    for (target, kernel, tile, declared), some in sorted(groups.items(), key=lambda item: item[0][0]):
        most = max(some, key=lambda one: one.registers)
        blocks = f"{min(one.blocks for one in some)} of {declared}"
        lines.append(
            f"| {target} | {kernel} | {tile} | {len(some)} | {most.threads} | {most.registers} | "
            f"{sum(one.spilled for one in some)} | {max(one.shared for one in some)} | {blocks} | "
            f"{'; '.join(most.loops)} | {sum(bool(one.faults) for one in some)} |"
        )
    return "\n".join(lines)


def numbers(name: str) -> list[str]:
    """Return the numbers among a template's arguments: ``ProductSm90<BFloat16, MaskKind 0, true, 256>`` has 256."""
    return re.findall(r"[<,]\s*(\d+)(?=[,>])", name)


def _changed_since(source: Path, time: float) -> str | None:
    """Return the name of a newer file that the source is made of: itself or a header in its folder."""
    seen: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        if path.stat().st_mtime > time:
            return path.name
        waiting += [path.parent / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)]
    return None
