"""Ratios and their goals: one table and one JSON record per question.

Time is measured by mft_kernels/timing.py. Ratios are taken within a round, then their median and quartiles over the
rounds. records.py names the records and reads them.
"""

import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch

from building.sources import digest
from mft_kernels.backends.processor import this_processor
from mft_kernels.backends.table import asked_for
from mft_kernels.timing import Samples

from .records import RESULTS, ROOT, file_name
from .side_by_side import SideBySide

THREADS = 2
ONE_THREAD = frozenset({"launch"})  # questions about the host, not about how threads wait for each other
_folder = RESULTS  # where report() writes; see write_results_to
Case = TypeVar("Case")
_pattern = "*"  # the cases that are measured; see choose_cases


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(statistics.median(values), low, high)

    def __str__(self) -> str:
        digits = 3 if self.median < 10 else 1
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Finding:
    """One quantity and its goal: ``rule`` is "at most" or "at least", or None if there is no goal."""

    quantity: str
    measured: Spread
    unit: str = "x"
    rule: str | None = None
    bound: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None without a goal."""
        if self.rule is None:
            return None
        return self.measured.median <= self.bound if self.rule == "at most" else self.measured.median >= self.bound

    def row(self) -> tuple[str, str, str, str]:
        """(quantity, measured, target, met), as text."""
        target = "" if self.rule is None else f"{self.rule} {self.bound:g}"
        return (
            self.quantity,
            f"{self.measured} {self.unit}",
            target,
            {None: "", True: "met", False: "NOT MET"}[self.met],
        )


def ratio(
    samples: Samples, above: str, below: str, rule: str | None = None, bound: float | None = None, suffix: str = ""
) -> Finding:
    """Return the time of ``above`` / the time of ``below``, round by round."""
    values = [a / b for a, b in zip(samples[above], samples[below])]
    return Finding(f"{above} / {below}{suffix}", Spread.of(values), "x", rule, bound)


def comparison_row(samples: Samples, name: str, baseline: str) -> dict[str, object]:
    """Return what a row of a record says of a competitor: ms, and the ratio to a baseline, round by round."""
    times = samples[name]
    to_baseline = Spread.of([a / b for a, b in zip(times, samples[baseline])])
    return {"competitor": name, "ms": vars(Spread.of(times)), "ratio": vars(to_baseline), "rounds": len(times)}


def check_built_of(sources: Path, report: Path) -> None:
    """Raise RuntimeError if the CPU library was built from other sources than those of the commit."""
    if not sources.is_dir() or not report.is_file():
        return
    built_of = json.loads(report.read_text())["cpu"].get("sources")
    if built_of != digest(sources):
        raise RuntimeError(
            f"mft_kernels/libmft_cpu.so must be built of csrc as it is to be measured, {report.name} says "
            f"{built_of[:10] if built_of else 'nothing'} of its sources: make install"
        )


def environment() -> dict[str, str | int | bool | dict[str, str]]:
    """Return machine, versions and commit, without which a number is worthless.

    Works in a checkout that is not installed. Raises: RuntimeError as check_built_of; ValueError if MFT_KERNELS names
    no backend.
    """
    from mft_kernels import __version__, backend_report

    check_built_of(ROOT / "csrc", ROOT / "mft_kernels" / "_build.json")

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    backends, taken = SideBySide.here(), _serving_backend()
    changes = git("status", "--porcelain", "--", "csrc", "mft_kernels", "python", "benchmarks/*.py", "setup.py")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(this_processor()),
        "threads": torch.get_num_threads(),
        "backend": backend_report()["backends"][taken]["detail"] or taken,
        "backends": backends.record(),
        "instruction_set": instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "mft_kernels": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "HEAD") or "unknown",
        "tree_is_dirty": "unknown" if changes is None else bool(changes),
    }


def threads_of(question: str, asked: int = THREADS) -> int:
    """Return the number of threads for a question."""
    return 1 if question in ONE_THREAD else asked


def instruction_set() -> str:
    """Return what record names call this machine: the CPU library's instruction set, or another backend's name."""
    taken = _serving_backend()
    return torch.ops.mft_cpu.capability() if taken == "cpu" else taken


def _serving_backend() -> str:
    """Return the backend that serves the CPU."""
    from mft_kernels import backend_report

    asked = asked_for()
    return backend_report()["auto"]["cpu"] if asked == "auto" else asked


def write_results_to(folder: Path) -> None:
    """Make report() write into ``folder`` from now on, instead of benchmarks/results."""
    global _folder
    _folder = folder


def choose_cases(pattern: str) -> None:
    """Measure only the cases whose names match ``pattern`` from now on; * in it stands for any text."""
    global _pattern
    _pattern = pattern


def select_cases(cases: Iterable[Case]) -> list[Case]:
    """Return the cases that are asked for. A case's name is str(case). Exits if there is none."""
    known = list(cases)
    found = [case for case in known if fnmatchcase(str(case), _pattern)]
    if not found:
        names = "\n    ".join(map(str, known))
        raise SystemExit(f"--case must name one of these, * stands for any text, got {_pattern}:\n    {names}")
    return found


def report(
    question: str,
    title: str,
    findings: list[Finding],
    *,
    printed: bool = True,
    **details: object,
) -> Path:
    """Print the table and write the record with ``details`` unchanged; return its path."""
    print(f"\n{title}")
    if printed:
        print_aligned([("", "median [spread]", "target", ""), *(finding.row() for finding in findings)])
    return write_record(question, title, findings, _folder, **details)


def print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equally many cells as columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)


def write_record(question: str, title: str, findings: list[Finding], folder: Path, **details: object) -> Path:
    """Write a record into folder, under the name that records.py gives it, and return its path."""
    record = {
        "question": question,
        "title": title,
        "environment": environment(),
        **details,
        "findings": [{**asdict(finding), "met": finding.met} for finding in findings],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(question, instruction_set())
    path.write_text(one_line_an_entry(record))
    return path


def one_line_an_entry(record: Mapping[str, object]) -> str:
    """Return JSON with one line per list entry: hundreds of findings stay readable, and a change is one line."""
    parts = []
    for key, value in record.items():
        if isinstance(value, list):
            text = "[\n    " + ",\n    ".join(json.dumps(_rounded(entry)) for entry in value) + "\n  ]"
        else:
            text = json.dumps(_rounded(value), indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: object) -> object:
    """Round floats to 6 digits, more than any spread leaves meaningful."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
