"""One line of JSON an event, on the disk at once: a worker or a machine that goes away leaves all that it finished."""

import json
import os
from pathlib import Path
from typing import Any

from .cases import Case

MEASURED, NOT_MEASURED, FAILED = "measured", "not measured", "failed"


class Journal:
    """Events: "asked" (the command's arguments), "about" (environment, ceilings), "started" (a case), "lost" (the
    device, during it), "suspect" (who is left out when it is measured once more), "record" (its outcome).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: str, **fields: Any) -> None:
        """Append one event, on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def started(self, case: Case, patience: float) -> None:
        """``patience``: seconds after which the case counts as hung."""
        self.add("started", key=case.key, patience=patience)

    def record(self, case: Case, status: str, **fields: Any) -> None:
        """The outcome of a case."""
        self.add("record", key=case.key, what=case.what, n=case.n, k=case.k, m=case.m, detail=case.detail,
                 status=status, **fields)  # fmt: skip

    def events(self, event: str) -> list[dict[str, Any]]:
        """All events of a kind, oldest first; a last line that was cut off is left out."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [e for e in map(json.loads, lines) if e["event"] == event]

    def records(self) -> dict[str, dict[str, Any]]:
        """Outcomes by the key of their case."""
        return {e["key"]: e for e in self.events("record")}

    def unfinished(self) -> dict[str, Any] | None:
        """The case that was started last, if it has no outcome."""
        started = self.events("started")
        return started[-1] if started and started[-1]["key"] not in self.records() else None

    def suspect(self, name: str, case: Case, reason: str, *, everywhere: bool) -> None:
        """Leave ``name`` out from here on, of this kind of case or of all: a worker ended, or hung, where it ran."""
        self.add("suspect", name=name, key=case.key, case=str(case), what="" if everywhere else case.what,
                 reason=reason)  # fmt: skip

    def suspects(self, case: Case) -> list[dict[str, Any]]:
        """The events by which competitors are left out of a case."""
        return [event for event in self.events("suspect") if event["what"] in ("", case.what)]

    def about(self) -> dict[str, Any]:
        """Environment and ceilings; empty if no worker came that far."""
        return {key: value for event in self.events("about") for key, value in event.items() if key != "event"}
