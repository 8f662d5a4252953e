"""Read what nvcc made of a file of csrc/cuda: each kernel in its object, for each target, with ptxas's log.

The machine code is read from the object itself, so the judged code is the linked code. Spills in bytes and warnings are
only in the log. cuobjdump and nvdisasm are Triton's.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from building import ptxas_log
from building.machine_code import sass
from building.register_hazards import split

#: Shared memory that every block gives to the system; cuobjdump includes it from sm_90 on.
_SYSTEM_BYTES = 1024
#: Registers that ptxas may use if the kernel does not ask for a number of blocks, for any number of threads.
_MOST_REGISTERS = 255
_FILE_REGISTERS = 65536


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target.

    ``symbol``: the linker's name; ``name``: the reader's, such as ``ProductSm90<BFloat16, MaskKind 0, true, 256>``.
    ``threads`` and ``blocks`` (per multiprocessor) are those of __launch_bounds__; ``spilled`` is in bytes, from the
    log; ``code.shared`` excludes what a launch adds; ``text`` is nvdisasm's; ``warnings`` are about serialised MMAs.
    """

    symbol: str
    name: str
    target: str
    threads: int
    blocks: int
    spilled: int
    code: sass.Code
    text: str
    warnings: tuple[str, ...]


def kernels(path: Path, log: str) -> list[Kernel]:
    """Return the kernels of an object and its log. Raises: ValueError if one has kernels that the other lacks."""
    logged = {(one.name, one.architecture): one for one in ptxas_log.kernels(log)}
    warnings = ptxas_log.serialised(log)
    found = []
    for target, cubin in _cubins(path):
        usage, bounds, texts = _usage(cubin), _bounds(cubin), split(_run(knobs.nvidia.nvdisasm.path, "-c", cubin))
        names = _demangled(list(usage))
        for symbol, (registers, stack, shared) in usage.items():
            if (one := logged.pop((symbol, target), None)) is None or one.registers != registers:
                raise ValueError(f"{path.name} and its log must be of one compilation, got {symbol} for {target}")
            threads, limit = bounds[symbol]
            code = sass.code_of(texts[symbol], registers, stack, shared)
            found.append(
                Kernel(
                    symbol,
                    names[symbol],
                    target,
                    threads,
                    _FILE_REGISTERS // (threads * limit) if limit < _MOST_REGISTERS else 1,
                    one.spilled,
                    code,
                    texts[symbol],
                    _warnings_of(symbol, warnings),
                )
            )
    if logged:
        raise ValueError(f"{path.name} and its log must be of one compilation, the object lacks {next(iter(logged))}")
    return found


def _warnings_of(symbol: str, warnings: list[str]) -> tuple[str, ...]:
    """Return the warnings without the kernel's name; a warning that names no kernel belongs to all."""
    found = [re.fullmatch(r"(.*?)(?: in (?:the )?function '(.*)'.*)?", line) for line in warnings]
    return tuple(match[1] for match in found if match is not None and match[2] in (None, symbol))


def _cubins(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield (target, file) for each; the file lives until the next."""
    with tempfile.TemporaryDirectory() as directory:
        _run(knobs.nvidia.cuobjdump.path, "--extract-elf", "all", path.resolve(), directory=directory)
        for cubin in sorted(Path(directory).glob("*.cubin")):
            target = re.search(r"\.(sm_\d+[af]?)\.cubin$", cubin.name)
            assert target is not None, f"cuobjdump names the target of {cubin.name}"
            yield target[1], cubin


def _usage(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Return {symbol: (registers, stack, shared)}."""
    text = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    system = _SYSTEM_BYTES if int(re.findall(r"sm_(\d+)", cubin.name)[-1]) >= 90 else 0
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {symbol: (int(reg), int(stack), max(0, int(shared) - system)) for symbol, reg, stack, shared in found}


def _bounds(cubin: Path) -> dict[str, tuple[int, int]]:
    """Return {symbol: (threads per block, registers per thread)}, the upper limits that the kernel declares."""
    found = {}
    text = _run(knobs.nvidia.cuobjdump.path, "-elf", cubin)
    for symbol, attributes in re.findall(r"^\.nv\.info\.(\S+)$(.*?)(?=^\.\S|\Z)", text, re.MULTILINE | re.DOTALL):
        threads = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x\S+) (0x\S+) (0x\S+)", attributes)
        registers = re.search(r"EIATTR_MAXREG_COUNT\s+Format:\s+\S+\s+Value:\s+(0x\S+)", attributes)
        if threads is None or registers is None:
            raise ValueError(f"{symbol} must have launch bounds; declare it with __launch_bounds__")
        x, y, z = (int(number, 16) for number in threads.groups())
        found[symbol] = (x * y * z, int(registers[1], 16))
    return found


def _demangled(symbols: list[str]) -> dict[str, str]:
    output = _run("c++filt", *symbols) if symbols else ""  # without arguments c++filt would read its input
    return {symbol: short_name(symbol, line) for symbol, line in zip(symbols, output.splitlines(), strict=True)}


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


def _run(tool: str, *arguments: str | Path, directory: str | None = None) -> str:
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory).stdout
