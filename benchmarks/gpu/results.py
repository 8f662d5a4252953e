"""gpu-<what>.json: the environment of a kind of case and a record for each case, on disk at every moment.

A case is written as failed before it runs, and again with its outcome. Whatever ends the process, the file then says
which case was running, and every record before it is complete.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import WHATS, Case

#: FAILED: a result is wrong, or something raised or died. The other two do not make results wrong. SLOW: it took longer
#: than its patience, or hangs. REPORTED: compute-sanitizer complains; its racecheck may do so about a correct kernel.
MEASURED, NOT_MEASURED, FAILED, SLOW, REPORTED = "measured", "not measured", "failed", "slow", "reported"
WAITING = "the run ended before its turn"

Document = dict[str, Any]
Record = dict[str, Any]


class Results:
    """The documents of one run in a folder, one for each kind of case; those of other runs do not change."""

    def __init__(self, out: Path, run: str) -> None:
        self._out, self._run = out, run
        self._documents = {document["what"]: document for document in read(out) if document.get("run") == run}

    def begin(self, cases: Iterable[Case], environment: Mapping[str, Any], ceilings: Mapping[str, float]) -> None:
        """Write the documents that the run does not have yet, with all cases waiting."""
        asked: dict[str, list[Case]] = {}
        for case in cases:
            asked.setdefault(case.what, []).append(case)
        for what in asked.keys() - self._documents.keys():
            waiting = [asdict(case) | {"status": NOT_MEASURED, "reason": WAITING} for case in asked[what]]
            about = {"question": f"gpu-{what}", "what": what, "run": self._run}
            self._documents[what] = about | {"environment": environment, "ceilings": ceilings, "cases": waiting}
            self._write(what)

    def of(self, case: Case) -> Record:
        """Return the record of a case."""
        return next(record for record in self._documents[case.what]["cases"] if Case.of(record) == case)

    def start(self, case: Case, patience: float) -> None:
        """Write a case as failed: if the process ends from here on, the case was running."""
        running = {"since": time.time(), "patience": patience}
        self.set(case, FAILED, reason="the process ended while it ran", running=running, **self.blamed(case))

    def blamed(self, case: Case) -> dict[str, dict[str, str]]:
        """Return who took a process down in this case, and why: in "failures", or for hangs in "slow"."""
        return {kind: named for kind in ("failures", "slow") if (named := self.of(case).get(kind))}

    def lose(self, case: Case, why: str) -> None:
        """Add to a running case why its process is about to end."""
        self.of(case)["running"]["lost"] = why
        self._write(case.what)

    def set(self, case: Case, status: str, **fields: Any) -> None:
        """Write the outcome of a case."""
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
    """Return what was measured for a competitor, short enough for a table cell."""
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
    return ", ".join(parts)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read(out: Path) -> list[Document]:
    """Return the documents in a folder, in the order of WHATS."""
    paths = [out / f"gpu-{what}.json" for what in WHATS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically, each list of numbers on one line."""
    text = json.dumps(value, indent=1)
    text = re.sub(r"\[[-+.\de,\s]+\]", lambda found: " ".join(found.group().split()), text) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
