"""python -m benchmarks.kernel_code [--few] [--target sm_90,gfx942] [--out FILE.md]: compile every kernel, read, judge.

Exit code: 0 if no kernel has a fault, 1 otherwise, 2 for a bad argument. No GPU is needed.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton

from mft_kernels.triton.target import installed_assembler

from .launches import targets
from .report import Row, count, rows

_HEADER = """Written by `make kernels-report`. A line is a kernel with its tiles on a target: how many binaries there
are (dtypes, masks, modes), the most registers and shared memory of any, and the loops of the one with most registers:
instructions that multiply, waits (full + partial), asynchronous copies."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as it grows; the exit code."""
    every = {str(target): target for target in targets()}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_code", description=__doc__.split("\n")[0])
    parser.add_argument("--few", action="store_true", help="what the tests compile: bf16, the usual calls")
    parser.add_argument("--target", default=",".join(every), help=f"of {', '.join(every)}")
    parser.add_argument("--out", type=Path, help="write the summary as Markdown")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.target.split(",") if name not in every]
    if unknown:
        parser.error(f"--target must be among {', '.join(every)}, got {unknown[0]!r}")
    chosen = [every[name] for name in asked.target.split(",")]
    total, done, start = count(chosen, few=asked.few), [], time.monotonic()
    versions = f"Triton {triton.__version__}, ptxas {'.'.join(map(str, installed_assembler(90)))} on sm_90"
    print(f"{total} binaries, {versions}")
    for i, one in enumerate(rows(chosen, few=asked.few, processes=asked.processes), 1):
        done.append(one)
        seconds = time.monotonic() - start
        print(f"[{i}/{total}, {i / seconds:.1f}/s, {seconds * (total - i) / i:.0f} s left] {_line(one)}", flush=True)
    faulty = [one for one in done if one.faults]
    print("\n" + summary(done))
    for one in faulty:
        print(f"FAULT {one.target} {one.kernel} {one.tiles} ({one.call}): {'; '.join(one.faults)}")
    if asked.out:
        asked.out.write_text(f"# Binaries of the Triton kernels\n\n{_HEADER}\n{versions}.\n\n{summary(done)}\n")
    return 1 if faulty else 0


def _line(one: Row) -> str:
    state = "; ".join(one.faults) or "fine"
    sizes = f"registers {one.registers}, shared {one.shared}"
    return " | ".join([f"{one.target} {one.kernel} {one.tiles}", one.call, sizes, *one.loops, state])


def summary(done: Iterable[Row]) -> str:
    """A Markdown table, one line a kernel, target and tiling: the worst of its binaries."""
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
