"""The compiled kernels of csrc/cuda: a row of figures for each, and its faults by the rules of its target.

The machine code is read from the objects that nvcc has made, so the judged code is the linked code. Only ptxas's log
names the warpgroup MMAs that ptxas has serialised.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from building import ptxas_log
from building.cuda import with_headers
from building.machine_code import hazard, sass
from building.register_hazards import Readers, cubins, disassembled, find_readers, output

from .report import Row, loop_text

_ROOT = Path(__file__).parents[2]
SOURCES = _ROOT / "csrc" / "cuda"
OBJECTS = _ROOT / "build" / "cuda"  # where setup.py keeps them
#: Shared memory that every block gives to the system; cuobjdump includes it from sm_90 on.
_SYSTEM_BYTES = 1024


def missing(report: Mapping) -> str | None:
    """Return why there is nothing to read, from the part "cuda" of _build.json; None if there is something."""
    if not report.get("built"):
        return report.get("reason") or "it was never built; make cuda"
    for name in report["kernels"]:
        if not (OBJECTS / f"{name}.o").exists() or not (OBJECTS / f"{name}.o.log").exists():
            return f"{name}.o or its log is not in build/cuda; make cuda"
        made = (OBJECTS / f"{name}.o").stat().st_mtime
        if newer := [path.name for path in with_headers([SOURCES / name]) if path.stat().st_mtime > made]:
            return f"{newer[0]} has changed since {name} was compiled; make cuda"
    if find_readers() is None:
        return "cuobjdump and nvdisasm are missing; pip install triton"
    return None


def rows(report: Mapping, *, processes: int = 2) -> list[Row]:
    """Return the rows of every kernel that is linked into the library. Raises: ValueError for an unknown name."""
    objects = [OBJECTS / f"{name}.o" for name in report["kernels"]]
    largest_first = sorted(objects, key=lambda path: -path.stat().st_size)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = dict(zip(largest_first, pool.map(_read, largest_first), strict=True))
    return [one for path in objects for one in found[path]]


def _read(path: Path) -> list[Row]:
    return list(kernels(path, Path(f"{path}.log").read_text()))


def kernels(path: Path, log: str) -> Iterator[Row]:
    """Yield the rows of an object's kernels, with the warnings of its log."""
    readers, warnings = find_readers(), ptxas_log.serialised(log)
    assert readers is not None, "missing() says so"
    for cubin in cubins(readers, path):
        target = re.search(r"\.(sm_\d+[af]?)\.cubin$", cubin.name)
        assert target is not None, f"cuobjdump names the target of {cubin.name}"
        usage, texts = _usage(readers, cubin), disassembled(readers, cubin)
        names = subprocess.run(["c++filt", *usage], capture_output=True, text=True, check=True).stdout if usage else ""
        for (symbol, sizes), demangled in zip(usage.items(), names.splitlines(), strict=True):
            name = short_name(symbol, demangled)
            yield row(name, target[1], texts[symbol], *sizes, warnings=_warnings_of(symbol, warnings))


def row(
    name: str, target: str, text: str, registers: int, stack: int, shared: int, warnings: tuple[str, ...] = ()
) -> Row:
    """Return the row of one kernel from nvdisasm's text and its sizes."""
    code = sass.code_of(text, registers, stack, shared)
    numbers = ", ".join(re.findall(r"[<,]\s*(\d+)(?=[,>])", name))  # of the template's arguments
    faults = [*_faults(name, target, code, text), *warnings]
    loops = tuple(map(loop_text, code.loops))
    return Row(target, name.split("<")[0], numbers, name, registers, code.spills, shared, loops, tuple(faults))


def _faults(name: str, target: str, code: sass.Code, text: str) -> Iterator[str]:
    if code.spills:
        yield f"{code.spill_stores} stores to local memory, {code.spill_loads} loads"
    if code.stack:
        yield f"a stack of {code.stack} bytes"
    if not name.startswith(("Product", "ScoreGrad", "Decode")):
        return
    mma = "HGMMA" if target == "sm_90a" else "HMMA"
    if not any(loop.counts[mma] for loop in code.loops):
        yield f"no loop with {mma}"
    if target != "sm_90a":
        if target == "sm_90" and name.startswith("Decode") and not code.counts["UCGABAR_ARV"]:
            yield "no barrier of a cluster, which is launched there"
        return
    if not code.counts["UTMALDG"]:
        yield "no copies by TMA"
    for loop in code.loops if name.startswith("Product") else ():  # the others' loop is CUTLASS's, from shared memory
        if loop.register_a < loop.mma:
            yield f"{loop.mma - loop.register_a} of {loop.mma} HGMMA take no operand from registers"
        if loop.full_waits:
            yield f"{loop.full_waits} full waits in a loop of {loop.mma} HGMMA"
    if found := hazard.hazards(text):
        yield f"{len(found)} hazards, the first: {found[0]}"


def _warnings_of(symbol: str, warnings: list[str]) -> tuple[str, ...]:
    """Return the warnings without the kernel's name; a warning that names no kernel belongs to all."""
    found = [re.fullmatch(r"(.*?)(?: in (?:the )?function '(.*)'.*)?", line) for line in warnings]
    return tuple(match[1] for match in found if match is not None and match[2] in (None, symbol))


def _usage(readers: Readers, cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Return {symbol: (registers, stack, shared)}."""
    text = output([readers.cuobjdump, "-res-usage", str(cubin)])
    system = _SYSTEM_BYTES if int(re.findall(r"sm_(\d+)", cubin.name)[-1]) >= 90 else 0
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {symbol: (int(reg), int(stack), max(0, int(shared) - system)) for symbol, reg, stack, shared in found}


def short_name(symbol: str, demangled: str) -> str:
    """Return the name without namespaces and arguments; for CUTLASS's kernel, whose name fills pages, our part of it.

    Raises: ValueError for any other name, because the rules depend on the name.
    """
    if found := re.search(r"13ScoreEpilogueINS\w*?_\d+(BFloat16|Float16)E(f?)", symbol):
        return f"ScoreGradSm90<{found[1]}, {'float' if found[2] else found[1]}>"
    if found := re.search(r"::isa::entry<(.*?) ?>\(", demangled):
        name = re.sub(r"\w+::|\(anonymous namespace\)::", "", found[1])
        return re.sub(r"\((\w+)\)(\d)", r"\1 \2", name)
    raise ValueError(f"a kernel must be isa::entry<...> or have ScoreEpilogue<...>, got {demangled or symbol}")
