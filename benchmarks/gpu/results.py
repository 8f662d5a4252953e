"""gpu-<what>.json: where a kind of case was measured, and a record for each of its cases, on disk at every moment.

A case is written as failed before it runs, and again with its outcome. So whatever ends the process, the file says
which case ran then, and every record before it is whole.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import WHATS, Case

#: FAILED: a result is wrong, or something raised or died. The other two say nothing of results: SLOW took longer than
#: its patience, or hangs; of REPORTED compute-sanitizer complains, whose racecheck may do so of a right kernel.
MEASURED, NOT_MEASURED, FAILED, SLOW, REPORTED = "measured", "not measured", "failed", "slow", "reported"
WAITING = "the run ended before its turn"

Document = dict[str, Any]
Record = dict[str, Any]


class Results:
    """The documents of one run in a folder, one for each kind of case; those of other runs are left as they are."""

    def __init__(self, out: Path, run: str) -> None:
        self._out, self._run = out, run
        self._documents = {document["what"]: document for document in read(out) if document.get("run") == run}

    def begin(self, cases: Iterable[Case], environment: Mapping[str, Any], ceilings: Mapping[str, float]) -> None:
        """Write the documents that the run does not have yet: all cases wait."""
        asked: dict[str, list[Case]] = {}
        for case in cases:
            asked.setdefault(case.what, []).append(case)
        for what in asked.keys() - self._documents.keys():
            waiting = [asdict(case) | {"status": NOT_MEASURED, "reason": WAITING} for case in asked[what]]
            about = {"question": f"gpu-{what}", "what": what, "run": self._run}
            self._documents[what] = about | {"environment": environment, "ceilings": ceilings, "cases": waiting}
            self._write(what)

    def of(self, case: Case) -> Record:
        """What is known of a case."""
        return next(record for record in self._documents[case.what]["cases"] if Case.of(record) == case)

    def is_waiting(self, case: Case) -> bool:
        """Whether it is still to be run."""
        return self.of(case).get("reason") == WAITING

    def start(self, case: Case, patience: float) -> None:
        """Write a case as failed, since a process that ends from here on has ended while it ran."""
        running = {"since": time.time(), "patience": patience}
        self.set(case, FAILED, reason="the process ended while it ran", running=running, **self.blamed(case))

    def blamed(self, case: Case) -> dict[str, dict[str, str]]:
        """Who has taken a process down in this very case, and why: in "failures", or in "slow" of those that hung."""
        return {kind: named for kind in ("failures", "slow") if (named := self.of(case).get(kind))}

    def lose(self, case: Case, why: str) -> None:
        """Add to a case that runs why its process is about to end."""
        self.of(case)["running"]["lost"] = why
        self._write(case.what)

    def set(self, case: Case, status: str, **fields: Any) -> None:
        """The outcome of a case."""
        record = self.of(case)
        record.clear()
        record.update(asdict(case) | {"status": status} | fields)
        self._write(case.what)

    def running(self) -> Case | None:
        """The case during which the process ended."""
        records = (record for document in self._documents.values() for record in document["cases"])
        return next((Case.of(record) for record in records if "running" in record), None)

    def _write(self, what: str) -> None:
        write_whole(self._out / f"gpu-{what}.json", self._documents[what])


def figures(sample: Record) -> str:
    """What was measured of a competitor, short enough for a cell."""
    parts = []
    if "ms" in sample:
        median, low, high = (f"{sample['ms'][key]:.4g}" for key in ("median", "low", "high"))
        mark = {"queued": " (q)", "clock": " (c)"}.get(sample.get("method", ""), "")
        parts.append(median + (f" [{low}, {high}]" if low != high else "") + mark)
    if "percent_of_cublas" in sample:
        parts.append(f"{sample['percent_of_cublas']['median']:.0f} %")
    if "percent_of_byte_floor" in sample:
        parts.append(f"{sample['percent_of_byte_floor']:.0f} / {sample['percent_of_flop_floor']:.0f}")
    if "peak_bytes" in sample:
        parts.append(f"{sample['peak_bytes'] / 1e6:,.1f} MB")
    if "beyond_results_of_weight" in sample:
        parts.append(f"{100 * sample['beyond_results_of_weight']:.0f} %")
    return ", ".join(parts)


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read(out: Path) -> list[Document]:
    """The documents that lie in a folder, in the order of WHATS."""
    paths = [out / f"gpu-{what}.json" for what in WHATS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """JSON, a list of numbers on one line; the file is whole at every moment."""
    text = json.dumps(value, indent=1)
    text = re.sub(r"\[[-+.\de,\s]+\]", lambda found: " ".join(found.group().split()), text) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
