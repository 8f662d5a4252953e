"""python -m benchmarks.kernel_code [--only cuda] [--out FILE.md]: read and judge.

Compiles every Triton kernel, and reads the CUDA library as it was built. Exit code: 0 if no kernel has a fault, 1
otherwise, 2 for a bad argument. No GPU is needed.
"""

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton

from mft_kernels.backends import built
from mft_kernels.backends.triton.target import installed_assembler

from . import cuda, report
from .report import Row

_TITLE = "# Binaries of the GPU kernels\n\nWritten by `make kernels-report`, without a GPU."

_UNREAD = "Not read here: `make kernels-report` compiles every kernel for every target and reads the machine code."

_LINE = """A line is a kernel on a target, with its tiles (of CUDA C++: the numbers among its template's arguments): how
many binaries there are (dtypes, masks, modes), the most registers and shared memory of any (of CUDA C++ without what
the launch adds), and the loops of the one with most registers: instructions that multiply, waits (full + partial),
loads from shared memory, asynchronous copies of the same warps."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, Triton's as it grows, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_code", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["triton", "cuda"], help="only this part; FILE.md keeps the other section")
    parser.add_argument("--out", type=Path, help="write the summary as Markdown")
    asked = parser.parse_args(arguments)
    sections, faulty, processes = {}, False, min(4, os.cpu_count() or 1)
    if asked.only != "triton":  # takes seconds, so it comes before the minutes
        sections["CUDA C++"], faults = _read_cuda(processes)
        faulty |= faults
    if asked.only != "cuda":
        sections["Triton"], faults = _compile_triton(processes)
        faulty |= faults
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(document(sections, asked.out.read_text() if asked.out.exists() else ""))
    return 1 if faulty else 0


def _compile_triton(processes: int) -> tuple[str, bool]:
    """Return (the section's text, whether a kernel has a fault)."""
    jobs, done, start = report.jobs(), [], time.monotonic()
    total = len(jobs)
    versions = f"Triton {triton.__version__}, ptxas {'.'.join(map(str, installed_assembler(90)))} on sm_90"
    print(f"{total} binaries, {versions}")
    for i, one in enumerate(report.rows(jobs, processes), 1):
        done.append(one)
        seconds = time.monotonic() - start
        print(f"[{i}/{total}, {i / seconds:.1f}/s, {seconds * (total - i) / i:.0f} s left] {_line(one)}", flush=True)
    return _judged(done, versions, [])


def _read_cuda(processes: int) -> tuple[str, bool]:
    """Return (the section's text, whether a kernel has a fault). What is not built is no fault; the text says so."""
    made = built.report("cuda")
    if reason := cuda.missing(made):
        print(f"without the CUDA kernels: {reason}\n")
        return f"Not read: {reason}.", False
    versions = f"{made['nvcc'].split(' (')[0]}, ptxas {made['ptxas']}"  # without nvcc's path
    versions += f", CUTLASS {made['cutlass']}" if made["cutlass"] else ""
    versions += f"; general code for {', '.join(made['targets'])}"
    left_out = [f"Without {name}: {why}." for name, why in made["left_out"].items()]
    try:
        done = cuda.rows(made, processes=processes)
    except ValueError as error:
        print(f"FAULT of the CUDA library: {error}\n")
        return f"Not read: {error}.", True
    print(f"{len(done)} binaries, {versions}", *left_out, sep="\n")
    return _judged(done, versions, left_out)


def _judged(done: Sequence[Row], versions: str, left_out: Sequence[str]) -> tuple[str, bool]:
    """Print the summary and every fault; return (the section's text, whether there is a fault)."""
    print(f"\n{summary(done)}\n")
    faulty = [one for one in done if one.faults]
    for one in faulty:
        print(f"FAULT {one.target} {one.kernel} {one.tiles} ({one.call}): {'; '.join(one.faults)}")
    return "\n".join([_LINE, f"{versions}.", *left_out, "", summary(done)]), bool(faulty)


def document(sections: dict[str, str], before: str) -> str:
    """Return the Markdown of these sections. A missing one comes from ``before``, or says which command makes it."""
    pieces = re.split(r"^## (.+)\n", before, flags=re.MULTILINE)
    kept = {title: text.strip() for title, text in zip(pieces[1::2], pieces[2::2], strict=True)}
    every = dict.fromkeys(("Triton", "CUDA C++"), _UNREAD) | kept | sections
    return "\n\n".join([_TITLE, *(f"## {title}\n\n{text}" for title, text in every.items())]) + "\n"


def _line(one: Row) -> str:
    state = "; ".join(one.faults) or "fine"
    sizes = f"registers {one.registers}, shared {one.shared}"
    return " | ".join([f"{one.target} {one.kernel} {one.tiles}", one.call, sizes, *one.loops, state])


def summary(done: Iterable[Row]) -> str:
    """Return a Markdown table with one line per kernel, target and tiling: the worst of its binaries."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for one in done:
        groups[one.target, one.kernel.strip("_").removesuffix("_kernel"), one.tiles].append(one)
    lines = ["| target | kernel | tiles | binaries | registers | spills | shared bytes | loop | faults |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---|---:|"]
    for (target, kernel, tiles), some in groups.items():
        most = max(some, key=lambda one: one.registers)
        lines.append(
            f"| {target} | {kernel} | {tiles} | {len(some)} | {most.registers} | {sum(one.spills for one in some)} | "
            f"{max(one.shared for one in some)} | {'; '.join(most.loops)} | {sum(bool(one.faults) for one in some)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
