"""Read ptxas's log of each kernel (--ptxas-options=-v): registers, spills, and serialised warpgroup MMAs."""

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
#: C7510 to C7519: "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
_SERIALISED = re.compile(r"\((C75\d\d)\)")


@dataclass(frozen=True)
class Kernel:
    """One kernel. ``spilled``: bytes stored and loaded because registers ran out."""

    name: str
    architecture: str
    registers: int
    spilled: int


def kernels(log: str) -> list[Kernel]:
    """Return the kernels in the order of the log."""
    found: list[Kernel] = []
    name, architecture, spilled = "", "", 0
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            (name, architecture), spilled = entry.groups(), 0
        elif spills := _SPILLS.search(line):
            spilled = int(spills[1]) + int(spills[2])
        elif (registers := _REGISTERS.search(line)) and name:
            found.append(Kernel(name, architecture, int(registers[1]), spilled))
            name = ""
    return found


def serialised(log: str) -> list[str]:
    """Return the warnings that a warpgroup MMA waits for the previous one."""
    return [line.strip() for line in log.splitlines() if _SERIALISED.search(line)]


def summary(log: str) -> dict[str, int]:
    """Return for one file the number of kernels, the most registers of any, all spilled bytes, and serialised MMAs."""
    found = kernels(log)
    return {
        "kernels": len(found),
        "registers": max((kernel.registers for kernel in found), default=0),
        "spilled": sum(kernel.spilled for kernel in found),
        "serialised": len(serialised(log)),
    }
