"""Compile and read each launch: a row of figures, and its faults by the rules of its target."""

import functools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from building.ahead import compile_ahead, gpu_target
from building.machine_code import hazard, sass
from mft_kernels.backends.triton.launch import Launch
from mft_kernels.backends.triton.target import Target

from .launches import Entry, entries, targets

#: Registers per multiprocessor of sm_80 to sm_100.
_REGISTERS = 65536
#: Shared memory that the driver reserves per block.
_RESERVED = 1024
#: Kernels whose loop multiplies, and whose grid is as large as the card.
_MASKED = ("_masked_product_kernel", "_grouped_product_kernel")
_PRODUCTS = (*_MASKED, "_score_grad_kernel", "_grouped_score_grad_kernel", "_backward_kernel")


@dataclass(frozen=True)
class Row:
    """Figures of one binary. A binary without faults is fine; ``loops``: see loop_text."""

    target: str
    kernel: str
    tiles: str
    call: str
    registers: int
    spills: int
    shared: int
    loops: tuple[str, ...]
    faults: tuple[str, ...]


def jobs() -> list[tuple[Target, int]]:
    """Return the target of every launch of launches.entries and its place among that target's."""
    return [(target, i) for target in targets() for i in range(len(_entries(target)))]


def rows(jobs: Sequence[tuple[Target, int]], processes: int) -> Iterator[Row]:
    """Yield one row for each launch, as soon as it is ready."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(_row_of, jobs, chunksize=4)


_entries = functools.cache(entries)


def _row_of(job: tuple[Target, int]) -> Row:
    target, i = job
    return row(_entries(target)[i])  # a launch cannot be sent to another process, but its index can


def row(entry: Entry) -> Row:
    """Compile and read one launch."""
    target, launch = entry.target, entry.launch
    compiled = compile_ahead(launch.kernel, gpu_target(target), launch.args, launch.options)
    name = launch.kernel.__name__
    blocks = _blocks(launch) if name in _PRODUCTS else 1
    if target.backend == "hip":
        registers, spills, mma = read_amd(compiled.asm["amdgcn"])
        loops, shared = (f"MFMA {mma} in all",) if mma else (), compiled.metadata.shared
        faults = ["no MFMA instruction"] if name in _PRODUCTS and not _is_exact(entry) and not mma else []
    else:
        code = sass.read(compiled)
        loops = tuple(map(loop_text, code.loops))
        registers, spills, shared = code.registers, code.spills, code.shared
        faults = list(_faults_of_nvidia(code, compiled, name, entry, blocks))
    if spills:
        faults.append(f"{spills} spills")
    if shared > target.shared_memory:
        faults.append(f"{shared} bytes of shared memory, the target has {target.shared_memory}")
    return Row(str(target), name, _tiles(entry), entry.call, registers, spills, shared, loops, tuple(faults))


def _blocks(launch: Launch) -> int:
    """Return the blocks that must share a multiprocessor, by the launch's limit of registers. A grid may be smaller."""
    limit = launch.options.get("maxnreg")
    return 1 if limit is None else _REGISTERS // (32 * launch.options["num_warps"] * limit)


def _faults_of_nvidia(code: sass.Code, compiled: object, name: str, entry: Entry, blocks: int) -> Iterator[str]:
    target, options = entry.target, entry.launch.options
    if blocks * code.registers * options["num_warps"] * 32 > _REGISTERS:
        yield f"{code.registers} registers do not let {blocks} blocks share a multiprocessor"
    if blocks * (code.shared + _RESERVED) > target.shared_memory + _RESERVED:
        yield f"{code.shared} bytes of shared memory do not let {blocks} blocks share a multiprocessor"
    if name not in _PRODUCTS or _is_exact(entry):
        return
    expected = {"_backward_kernel": 2}.get(name, 1)
    if len(code.loops) < expected:  # a compiler may split one loop into two
        yield f"{len(code.loops)} loops multiply, at least {expected} should"
    if any(loop.async_copies == 0 for loop in code.loops) and "odd" not in entry.call:  # copies are of 4 bytes or more
        yield "a loop without asynchronous copies"
    if name in _MASKED and options["BLOCK_M"] == 16 and not options["MASK_ON_A"]:
        if any(loop.counts["HMMA"] == 0 for loop in code.loops):  # plan._FEW: mma.sync on every card
            yield "a loop without HMMA"
    elif target.arch == 90:
        yield from _faults_of_hopper(code, compiled, name, entry)
    elif target.hopper_or_newer and not any(op.startswith("UTC") and op.endswith("MMA") for op in code.counts):
        yield "no tensor memory instruction"


def _faults_of_hopper(code: sass.Code, compiled: object, name: str, entry: Entry) -> Iterator[str]:
    if any(loop.counts["HGMMA"] == 0 for loop in code.loops):
        yield "a loop without HGMMA"
    for loop in code.loops:
        if loop.full_waits > 1:
            yield f"{loop.full_waits} full waits in a loop of {loop.mma} HGMMA"
    if entry.target.swapped and not name.endswith("_score_grad_kernel"):
        if not any(loop.register_a == loop.mma for loop in code.loops):
            yield "the masked weight does not come from registers"
    elif any(loop.register_a for loop in code.loops) and not entry.target.swapped:
        yield "an operand comes from registers, which this compiler does not guard"
    found = hazard.hazards(sass.disassemble(compiled.asm["cubin"]))  # type: ignore[attr-defined]
    if found:
        yield f"{len(found)} hazards, the first: {found[0]}"
    yield from (warning for warning in sass.assembler_warnings(compiled) if "(C75" in warning)


def read_amd(text: str) -> tuple[int, int, int]:
    """Return from assembly for AMD (vector registers, spills, instructions that multiply matrices).

    Without scratch, spilled scalars are kept in lanes of vector registers, which is no fault.
    """
    found = {key: int(value) for key, value in re.findall(r"^[\s-]+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    scalars = found["sgpr_spill_count"] if found["private_segment_fixed_size"] else 0
    return found["vgpr_count"], found["vgpr_spill_count"] + scalars, len(re.findall(r"^\s+v_mfma", text, re.MULTILINE))


def _is_exact(entry: Entry) -> bool:
    """Whether it computes in full fp32 precision, for which ordinary cores multiply."""
    tensors = [getattr(argument, "base", argument) for argument in entry.launch.args]
    return "float32" in str(getattr(tensors[0], "dtype", "")) and entry.launch.options["PRECISION"] == "ieee"


def loop_text(loop: sass.Loop) -> str:
    """Return ``HGMMA 8 (8 from registers), waits 0+2, LDSM 16, copies 3, 431 instructions``."""
    name = next((op for op in loop.counts if op.endswith("MMA")), "MMA")
    parts = [f"{name} {loop.mma}" + (f" ({loop.register_a} from registers)" if loop.register_a else "")]
    parts += [f"waits {loop.full_waits}+{loop.partial_waits}"] if name == "HGMMA" else []
    parts += [f"LDSM {loop.counts['LDSM']}"] if loop.counts["LDSM"] else []
    return ", ".join([*parts, f"copies {loop.async_copies}", f"{sum(loop.counts.values())} instructions"])


def _tiles(entry: Entry) -> str:
    options = entry.launch.options
    sizes = [f"{name.removeprefix('BLOCK_').lower()} {value}" for name, value in options.items() if "BLOCK_" in name]
    extra = [f"stages {options['STAGES']}"] if "STAGES" in options else []
    extra += ["TMA"] if options.get("DESCRIPTORS") else []
    return ", ".join([*sizes, f"warps {options['num_warps']}", *extra])
