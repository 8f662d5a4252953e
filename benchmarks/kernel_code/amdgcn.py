"""Read the assembly of a kernel for an AMD GPU (gfx942): its resources, its instructions, and its main loops."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from building.machine_code.flow import Instruction, Program

_LINE = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;]*?))?\s*(?:;.*)?$")
_LABEL = re.compile(r"^(\.?\w+):")


@dataclass(frozen=True)
class Code:
    """Resources and instructions of one kernel.

    ``vgprs`` includes ``agprs``, because gfx942 has one register file for both; ``scratch`` and ``shared`` (LDS) are
    bytes. ``counts``: instructions by opcode; ``loops``: the same for each innermost loop that multiplies matrices.
    """

    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    shared: int
    counts: Counter[str]
    loops: list[Counter[str]]

    @property
    def spills(self) -> int:
        """Registers spilled to memory. Without scratch, spilled scalars are kept in lanes of vector registers."""
        return self.vgpr_spills + (self.sgpr_spills if self.scratch else 0)

    @property
    def mma(self) -> int:
        return mma_count(self.counts)


def mma_count(counts: Counter[str]) -> int:
    return sum(number for opcode, number in counts.items() if opcode.startswith("v_mfma"))


def read(compiled: Any) -> Code:
    """Read a CompiledKernel for a "hip" target."""
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        found = re.search(rf"^[\s-]+\.{key}:\s+(\d+)$", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly's metadata must hold .{key}")
        return int(found[1])

    program = parse(text)
    return Code(
        vgprs=metadata("vgpr_count"),
        agprs=metadata("agpr_count"),
        sgprs=metadata("sgpr_count"),
        vgpr_spills=metadata("vgpr_spill_count"),
        sgpr_spills=metadata("sgpr_spill_count"),
        scratch=metadata("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        counts=_count(program.instructions),
        loops=[_count(body) for body in program.innermost_loops(lambda i: i.opcode.startswith("v_mfma"))],
    )


def parse(text: str) -> Program:
    """Parse the assembly of one kernel; addresses are line numbers, from 1."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(".Lfunc_end"):
            break
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(line):
            operands = tuple(part.strip() for part in (found[2] or "").split(",") if part)
            instructions.append(Instruction(number, found[1], operands))
    return Program(instructions, [_after(i, instructions, labels) for i in range(len(instructions))])


def _after(i: int, instructions: list[Instruction], labels: dict[str, int]) -> tuple[int, ...]:
    instruction = instructions[i]
    opcode = instruction.opcode
    if opcode == "s_endpgm":
        return ()
    if opcode == "s_branch":
        return (labels[instruction.operands[0]],)
    if opcode.startswith("s_cbranch"):
        return (labels[instruction.operands[0]], i + 1)
    if opcode.startswith(("s_setpc", "s_swappc")):
        raise ValueError(f"jumps must name their target, got {instruction}")
    return (i + 1,) if i + 1 < len(instructions) else ()


def _count(instructions: list[Instruction]) -> Counter[str]:
    return Counter(instruction.opcode for instruction in instructions)
