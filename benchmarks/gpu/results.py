"""From the journal to gpu-<what>.json and gpu.md; called after each case, so that a killed run keeps what it has."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import WHATS, Case
from .faster_table import FASTER, is_wrong, table
from .goals import Where, goals
from .journal import NOT_MEASURED, Journal
from .tables import markdown


def write(out: Path, journal: Journal, cases: Sequence[Case]) -> None:
    """One JSON a kind of case that was asked for, and the Markdown of all that lie in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    for what in WHATS:
        asked = [case for case in cases if case.what == what]
        if asked:
            (out / f"gpu-{what}.json").write_text(_as_text(document(what, journal, asked)))
    stored = [out / f"gpu-{what}.json" for what in WHATS]
    records = list(journal.records().values())
    if found := table(journal.about().get("environment", {}), records):
        (out / FASTER).write_text(_as_text(found))
    elif is_wrong(records):
        (out / FASTER).unlink(missing_ok=True)
    (out / "gpu.md").write_text(markdown([json.loads(path.read_text()) for path in stored if path.exists()]))


def document(what: str, journal: Journal, asked: Sequence[Case]) -> dict[str, Any]:
    """What gpu-<what>.json holds: where it was measured, every case that was asked for, and the goals."""
    about, records = journal.about(), journal.records()
    cases = [records.get(case.key) or _not_measured(case) for case in asked]
    cases = [{key: value for key, value in case.items() if key not in ("event", "key")} for case in cases]
    return {
        "question": f"gpu-{what}",
        "what": what,
        "environment": about.get("environment", {}),
        "ceilings": about.get("ceilings", {}),
        "goals": goals(what, cases, Where.of(about.get("environment", {}))),
        "cases": cases,
    }


def _not_measured(case: Case) -> dict[str, Any]:
    fields = {"what": case.what, "n": case.n, "k": case.k, "m": case.m, "detail": case.detail}
    return {**fields, "status": NOT_MEASURED, "reason": "the run ended before its turn"}


def _as_text(value: dict[str, Any]) -> str:
    """JSON, a list of numbers on one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[-+.\de,\s]+\]", lambda found: " ".join(found.group().split()), text) + "\n"
