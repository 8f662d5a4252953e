"""Read the machine code of a kernel for an NVIDIA GPU: its resources, its instructions, and its main loops.

Everything comes from Triton's own cuobjdump, nvdisasm and ptxas. Counts and loops are for sm_80 to sm_100. The
registers that an instruction writes are only for sm_90: nvdisasm's own life ranges agreed, except at calls, on all
154,890 instructions of 141 kernels there (tests/building/test_kernel_code.py repeats it on one).
"""

import contextlib
import functools
import io
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.compiler.compiler import make_backend

from .flow import Instruction, Program

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d])\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\S+):(?:\s|$)")
_MMA = re.compile(r"(UTC)?[A-Z]*MMA")
_REGISTER = re.compile(r"R(\d+)")
_PREDICATE = re.compile(r"!?U?P[T\d]")
#: If their first operand that is not a predicate is a register, these instructions only read it.
_WRITES_NO_REGISTER = re.compile(r"\w*SETP\d?|PLOP3|R2P|FCHK|BAR|RET|NANOSLEEP|WARPSYNC|WARPGROUP|DEPBAR|ERRBAR|YIELD")


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies matrices; counts are for one pass through it.

    ``register_a``: HGMMAs whose first operand comes from registers. A wait is for groups of HGMMAs: a full one leaves
    none in flight, a partial one some.
    """

    address: int
    counts: Counter[str]
    mma: int
    register_a: int
    full_waits: int
    partial_waits: int

    @property
    def async_copies(self) -> int:
        return self.counts["LDGSTS"] + self.counts["UTMALDG"]

    @property
    def barriers(self) -> int:
        return self.counts["BAR"]


@dataclass(frozen=True)
class Code:
    """A kernel's code. ``stack`` and ``shared`` are bytes; ``counts``: instructions by family, see family()."""

    registers: int
    stack: int
    shared: int
    counts: Counter[str]
    loops: list[Loop]

    @property
    def spill_stores(self) -> int:
        return self.counts["STL"]

    @property
    def spill_loads(self) -> int:
        return self.counts["LDL"]

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def read(compiled: Any) -> Code:
    """Read a CompiledKernel for a "cuda" target."""
    cubin = compiled.asm["cubin"]
    usage = _run_on(cubin, knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage must name registers and stack, got {usage!r}")
    return code_of(disassemble(cubin), int(found[1]), int(found[2]), compiled.metadata.shared)


def code_of(sass: str, registers: int, stack: int, shared: int) -> Code:
    """Return the code from nvdisasm's text of one kernel, and the sizes that the text lacks."""
    program = parse(sass)
    counts = Counter(map(family, program.instructions))
    return Code(registers, stack, shared, counts, [_loop(body) for body in program.innermost_loops(is_mma)])


@functools.lru_cache(maxsize=1)  # a reader of a kernel's code next looks for its hazards
def disassemble(cubin: bytes) -> str:
    """Return nvdisasm's text of the kernel's code. Its data-flow analysis is off: a quarter of the time, same text."""
    return _run_on(cubin, knobs.nvidia.nvdisasm.path, "-c", "-ndf")


def assembler_warnings(compiled: Any) -> list[str]:
    """Return ptxas's messages on the kernel's PTX except sizes, mainly C7510 to C7519 (wgmma serialised).

    The backend assembles once more, so that tool and options are those of every other build.
    """
    target = compiled.metadata.target
    log = io.StringIO()
    before = knobs.nvidia.dump_ptxas_log
    knobs.nvidia.dump_ptxas_log = True
    try:
        with contextlib.redirect_stdout(log):
            make_backend(target).make_cubin(compiled.asm["ptx"], {}, compiled.metadata, target.arch)
    finally:
        knobs.nvidia.dump_ptxas_log = before
    return [line for line in log.getvalue().splitlines() if re.search(r"\(C\d+\)|warning", line)]


def parse(sass: str) -> Program:
    """Parse nvdisasm's text of one kernel.

    Raises: ValueError at a jump whose targets the text does not name.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := _LINE.match(line):
            address, guard, opcode, operands = found.groups()
            split = tuple(part.strip() for part in operands.split(",") if part)
            instructions.append(Instruction(int(address, 16), opcode, split, guard is not None))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
    if not instructions or any(b.address <= a.address for a, b in itertools.pairwise(instructions)):
        raise ValueError("the text must hold the code of one kernel, addresses ascending from 0")
    return Program(instructions, _successors(instructions, labels))


def family(instruction: Instruction) -> str:
    """Return the opcode without modifiers, except that WARPGROUP.ARRIVE and WARPGROUP.DEPBAR differ."""
    parts = instruction.opcode.split(".")
    return ".".join(parts[:2]) if parts[0] == "WARPGROUP" else parts[0]


def is_mma(instruction: Instruction) -> bool:
    return _MMA.fullmatch(instruction.name) is not None


def is_warpgroup_mma(instruction: Instruction) -> bool:
    """Whether it is HGMMA or its like for integers and 8-bit floats: asynchronous, only on sm_90."""
    return instruction.name.endswith("GMMA")


def a_registers(instruction: Instruction) -> range:
    """Return the registers of a warpgroup MMA's first operand; empty if that is in shared memory.

    HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24      from registers
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24          both from shared memory, one pair of descriptors

    Always 4 of them: 64 rows x 32 bytes over 128 threads, for any type.
    """
    if is_warpgroup_mma(instruction) and (found := _REGISTER.match(instruction.operands[1])):
        return range(int(found[1]), int(found[1]) + 4)
    return range(0)


def waited_groups(instruction: Instruction) -> int | None:
    """Return how many groups a wait for warpgroup MMAs leaves in flight; None if the instruction is no such wait."""
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        return int(instruction.operands[1], 16)
    return None


def written_registers(instruction: Instruction) -> range:
    """Return the registers that an instruction writes, with or without a predicate; empty if none.

    The destination is the first operand that is not a predicate: LDSM R4, [R8]; LOP3.LUT P0, R4, R5, R6, R7, 0xc0, !PT.
    """
    if _WRITES_NO_REGISTER.fullmatch(instruction.name):
        return range(0)
    first = next((operand for operand in instruction.operands if not _PREDICATE.fullmatch(operand)), "")
    if (found := _REGISTER.fullmatch(first)) is None:
        return range(0)
    return range(int(found[1]), int(found[1]) + _width(instruction))


def _width(instruction: Instruction) -> int:
    """Return the number of registers of the destination."""
    name, *modifiers = instruction.opcode.split(".")
    if is_warpgroup_mma(instruction):
        columns = int(modifiers[0].split("x")[1])  # 64 rows over 128 threads
        return columns // 4 if modifiers[1] == "F16" else columns // 2
    if is_mma(instruction):
        return 2 if modifiers[1:2] == ["F16"] else 4
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if name == "CS2R":
        return 1 if "32" in modifiers else 2
    if name in ("I2F", "F2F"):
        return 2 if modifiers[0] == "F64" else 1
    if "128" in modifiers:
        return 4
    two = {"64", "WIDE", "TRANS64"} & set(modifiers) or (name == "F2I" and {"S64", "U64"} & set(modifiers))
    return 2 if two or name in ("DADD", "DFMA", "DMUL", "FADD2", "FMUL2", "FFMA2") else 1


def _loop(body: list[Instruction]) -> Loop:
    waits = [left for left in map(waited_groups, body) if left is not None]
    return Loop(
        address=body[0].address,
        counts=Counter(map(family, body)),
        mma=sum(map(is_mma, body)),
        register_a=sum(bool(a_registers(instruction)) for instruction in body),
        full_waits=waits.count(0),
        partial_waits=len(waits) - waits.count(0),
    )


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, ...]]:
    """Return where control may go. A return leads back to every call: more than can happen, but never less."""
    returns = tuple(i + 1 for i, instruction in enumerate(instructions) if instruction.name == "CALL")

    def after(i: int) -> tuple[int, ...]:
        instruction = instructions[i]
        following = (i + 1,) if i + 1 < len(instructions) else ()
        match instruction.name:
            case "BRX" | "BRXU" | "JMX" | "JMXU":
                raise ValueError(f"jumps must name their target, got {instruction}")
            case "EXIT" | "BSYNC":
                jumps: tuple[int, ...] = ()
            case "RET":
                jumps = returns
            case "BRA" | "JMP" | "CALL":
                jumps = (_target(instruction, labels),)
                if len(instruction.operands) > 1:  # BRA.U UP0, `(.L_x_1)
                    jumps += following
            case _:
                return following
        return tuple(sorted({*jumps, *(following if instruction.guarded else ())}))

    return _with_meetings(instructions, labels, [after(i) for i in range(len(instructions))])


def _with_meetings(
    instructions: list[Instruction], labels: dict[str, int], successors: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Return the successors with those of each BSYNC: the targets of its barrier's BSSYs that may have come before it.

    BSSY names where the threads of a barrier meet, and BSYNC with the same barrier goes there. The few barriers are
    used again and again: a BSYNC that led to all targets of its barrier would jump into loops.
    """
    every: dict[str, set[int]] = {}
    for instruction in instructions:
        if instruction.name == "BSSY":
            every.setdefault(instruction.operands[0], set()).add(_target(instruction, labels))
    if not every:
        return successors
    successors = list(successors)
    begun: list[dict[str, frozenset[int]] | None] = [{}] + [None] * (len(instructions) - 1)  # before each instruction
    waiting = [0]
    while waiting:
        i = waiting.pop()
        instruction, now = instructions[i], begun[i] or {}
        if instruction.name == "BSSY":
            barrier, before = instruction.operands[0], now if instruction.guarded else {}
            now = now | {barrier: before.get(barrier, frozenset()) | {_target(instruction, labels)}}
        elif instruction.name == "BMOV" and instruction.operands[0] in every:  # restores a barrier kept in a register
            now = now | {instruction.operands[0]: frozenset(every[instruction.operands[0]])}
        elif instruction.name == "BSYNC":
            barrier = instruction.operands[0]
            successors[i] = tuple(sorted({*successors[i], *(now.get(barrier) or every[barrier])}))
        for j in successors[i]:
            known = begun[j]
            if known is None:
                begun[j] = now
                waiting.append(j)
            elif known is not now:
                merged = known | {b: targets | known.get(b, frozenset()) for b, targets in now.items()}
                if merged != known:
                    begun[j] = merged
                    waiting.append(j)
    return successors


def _target(instruction: Instruction, labels: dict[str, int]) -> int:
    found = re.fullmatch(r"`\((.*)\)", instruction.operands[-1])
    if found is None or found[1] not in labels:
        raise ValueError(f"jumps must name a label of the text, got {instruction}")
    return labels[found[1]]


def _run_on(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
