"""Pool one answer from several processes: the placement of memory differs from process to process, and so do times.

Within a process rounds agree to a few percent. The next process, with the same code on the same quiet machine, gave
ratios up to 30 % away (a training step of a LLaMA2-7B block). So the median of the processes' medians is stored. The
stored quartiles are the lowest and the highest quartile of any process.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import ROOT, Finding, Spread, instruction_set, write_record
from .records import read_records

PROCESSES = 3
_SPREAD = {"median", "low", "high"}
_NOT_MEASURED = {"environment", "n", "k", "m", "threads", "value", "bound", "target"}  # taken from the first process


def answer(question: str, folder: Path, threads: int, together: Callable[[Sequence[Any]], Any]) -> Path:
    """Answer in PROCESSES processes, one after the other. Write what ``together`` makes of the answers into folder."""
    records = []
    for number in range(PROCESSES):
        print(f"\n{question}: process {number + 1} of {PROCESSES}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "benchmarks", "--alone", "--out", scratch, "--threads", str(threads)]
            subprocess.run([*command, question], cwd=ROOT, check=True)
            records.append(read_records(Path(scratch), instruction_set())[question])
    record = {**together(records), "processes": PROCESSES}
    findings = [
        Finding(found["quantity"], Spread(**found["measured"]), found["unit"], found["rule"], found["bound"])
        for found in record["findings"]
    ]
    details = {key: record[key] for key in record if key not in ("question", "title", "environment", "findings")}
    return write_record(question, record["title"], findings, folder, **details)


def pooled(values: Sequence[Any], name: str = "") -> Any:
    """Return the same structure with every number pooled; values that are not measurements must agree."""
    first = values[0]
    if name in _NOT_MEASURED:
        return first
    if isinstance(first, Mapping):
        if first.keys() == _SPREAD:
            return {
                "median": statistics.median(value["median"] for value in values),
                "low": min(value["low"] for value in values),
                "high": max(value["high"] for value in values),
            }
        if any(value.keys() != first.keys() for value in values):
            raise ValueError(f"every process must give the same keys, {name or 'the record'} differs in them")
        return {key: pooled([value[key] for value in values], key) for key in first}
    if isinstance(first, list):
        if len({len(value) for value in values}) > 1:
            raise ValueError(f"every process must give the same cases, got {[len(v) for v in values]} {name}")
        return [pooled(entries) for entries in zip(*values)]
    if name == "rounds":
        return sum(values)
    if isinstance(first, int | float) and not isinstance(first, bool):
        return statistics.median(values)
    if name != "met" and any(value != first for value in values):
        raise ValueError(f"every process must give the same {name}, got {', '.join(map(str, values))}")
    return first
