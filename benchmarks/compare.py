"""Check if the code became slower: python -m benchmarks.compare REF [--what ops ...] [--quick]

REF is a folder of results, or a git ref whose benchmarks/results are read. The questions are answered now, and compared
with REF's answers of this machine's instruction set.

The compared quantities are ratios of ours to another competitor within a run, because a busy machine changes times but
hardly ratios. A ratio is suspect if its spread lies above REF's and its median is worse by more than 5 %. Among
hundreds of ratios some are suspect by chance. A question with suspects is therefore answered a second time, and a ratio
that is suspect both times is a regression.

On another processor, with other threads or another torch, the competitor has another speed too, so a ratio says nothing
about the code. Then the differences are shown, and there is no verdict. Exit code 1: a regression, or a missing ratio;
2: no verdict.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .harness import Spread, environment, instruction_set, print_aligned, threads_of
from .records import RESULTS, ROOT, Record, question_of, read_all, read_records, select_records

WORSE = 1.05  # times the median of REF, at most
REMEDY = "Measure REF here: python -m benchmarks --out FOLDER in a checkout of it; then compare with FOLDER."
SAME = ("device", "threads", "backend", "torch_instruction_set", "torch")  # any of these can change the numbers


@dataclass(frozen=True)
class Change:
    """A ratio of ours in REF and now, and again if it was measured a second time; None if one of them lacks it."""

    quantity: str
    before: Spread | None
    now: Spread | None
    again: Spread | None = None
    alike: bool = True  # whether both were measured on one machine

    @property
    def suspect(self) -> bool:
        """Whether it is worse now."""
        return self.before is not None and self.now is not None and _clearly_above(self.now, self.before)

    @property
    def verdict(self) -> str:
        """new, MISSING, REGRESSION, not repeated, better (by the same rule) or empty.

        On another machine: "higher here", "lower here" or empty.
        """
        if self.before is None:
            return "new"
        if self.now is None:
            return "MISSING"
        if not self.alike:
            return "higher here" if self.suspect else "lower here" if _clearly_above(self.before, self.now) else ""
        if self.suspect:
            repeated = self.again is None or _clearly_above(self.again, self.before)
            return "REGRESSION" if repeated else f"not repeated: {self.again}"
        return "better" if _clearly_above(self.before, self.now) else ""

    def row(self) -> tuple[str, str, str, str, str]:
        """(quantity, before, now, change of the median, verdict) as text."""
        change = ""
        if self.before is not None and self.now is not None:
            change = f"{100 * (self.now.median / self.before.median - 1):+.1f} %"
        return self.quantity, str(self.before or "-"), str(self.now or "-"), change, self.verdict


def _clearly_above(a: Spread, b: Spread) -> bool:
    return a.low > b.high and a.median > WORSE * b.median


def ratios(record: Record) -> dict[str, Spread]:
    """Return the ratios of ours to others by quantity. Lower is better."""
    return {
        finding["quantity"]: Spread(**finding["measured"])
        for finding in record["findings"]
        if finding["unit"] == "x" and finding["quantity"].startswith("ours") and " / " in finding["quantity"]
    }


def compare(before: Record, now: Record, again: Record | None = None, *, partial: bool = False) -> list[Change]:
    """Compare every ratio of either record; ``partial``: ratios that a quick run did not measure are not missing."""
    old, new = ratios(before), ratios(now)
    repeated = {} if again is None else ratios(again)
    asked = [name for name in old if not partial or name in new]
    names = dict.fromkeys((*asked, *new))
    alike = not differences(before["environment"], now["environment"])
    return [Change(name, old.get(name), new.get(name), repeated.get(name), alike) for name in names]


def differences(old: Record, new: Record) -> list[str]:
    """Return in words what differs between two environments."""
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in SAME if old.get(key, "") != new.get(key, "")
    ]


def read_ref(ref: str) -> list[tuple[str, Record]]:
    """Return (name, record) pairs of a folder, or of benchmarks/results in a commit.

    Raises: ValueError if ``ref`` is neither.
    """
    if Path(ref).is_dir():
        return read_all(Path(ref))
    place = RESULTS.relative_to(ROOT).as_posix()
    listed = _git("ls-tree", "--name-only", ref, f"{place}/")
    if listed is None:
        raise ValueError(f"REF must be a folder of results or a git ref, got {ref!r}")
    paths = [path for path in listed.splitlines() if question_of(Path(path).name)]
    return [(Path(path).name, json.loads(_git("show", f"{ref}:{path}") or "")) for path in paths]


def measure(
    before: Mapping[str, Record], questions: list[str], *, quick: bool
) -> tuple[dict[str, Record], dict[str, Record]]:
    """Return the records by question, and a second record of each question with a suspect ratio."""
    now = _answers(questions, quick=quick)
    suspects = {q: sum(change.suspect and change.alike for change in compare(before[q], now[q])) for q in questions}
    for question, count in suspects.items():
        if count:
            print(f"\n{question}: {count} ratios seem worse; asked again", flush=True)
    doubtful = [question for question, count in suspects.items() if count]
    return now, _answers(doubtful, quick=quick) if doubtful else {}


def _answers(questions: list[str], *, quick: bool) -> dict[str, Record]:
    """Answer the questions in another process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", *(["--quick"] if quick else []), "--out", folder, *questions]
        subprocess.run(command, cwd=ROOT, check=True)
        return dict(read_records(Path(folder), instruction_set()))


def show(question: str, before: Record, now: Record, changes: list[Change]) -> None:
    """Print the table of one question: what changed, and how many ratios did not."""
    print(f"\n{question}: {before['environment']['commit'][:10]} -> {now['environment']['commit'][:10]}")
    others = differences(before["environment"], now["environment"])
    for difference in others:
        print(f"  !!! NOT THE SAME MACHINE: {difference}")
    told = [change.row() for change in changes if change.verdict]
    if told:
        print_aligned([("ratio", "before", "now", "median", ""), *told])
    print(f"  {len(changes) - len(told)} of {len(changes)} ratios within the spread or {100 * (WORSE - 1):.0f} %")


def main() -> None:
    """Compare, print, and exit with the verdict."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("ref", metavar="REF", help="a git ref, or a folder of results")
    parser.add_argument("--what", nargs="+", default=[], help="questions; default: all for which REF has ratios")
    parser.add_argument("--quick", action="store_true", help="measure few cases")
    asked = parser.parse_args()
    try:
        ref = read_ref(asked.ref)
    except ValueError as error:
        parser.error(str(error))
    before = select_records(ref, instruction_set())
    questions = [question for question in asked.what or before if question in before and ratios(before[question])]
    if not questions:
        asked_for = ", ".join(asked.what) or "any question"
        parser.error(
            f"REF must hold ratios of ours on {instruction_set()}, {asked.ref} has none of {asked_for}. {REMEDY}"
        )
    unknown = [question for question in asked.what if question not in before]
    for question in unknown:
        print(f"{question}: REF has no results")
    failed, undecided = _judge(before, questions, quick=asked.quick)
    failed |= bool(unknown)
    if undecided:
        print(f"\nno verdict on another machine: whether the code became slower cannot be told. {REMEDY}")
    if failed or not undecided:
        print("\nworse" if failed else "\nno regression")
    sys.exit(1 if failed else 2 if undecided else 0)


def _judge(before: Mapping[str, Record], questions: list[str], *, quick: bool) -> tuple[bool, bool]:
    """Measure; return (a ratio is worse or missing, nothing can be concluded)."""
    _warn({question: before[question] for question in questions})
    now, again = measure(before, questions, quick=quick)
    failed = undecided = False
    for question in questions:
        changes = compare(before[question], now[question], again.get(question), partial=quick)
        show(question, before[question], now[question], changes)
        failed |= any(change.verdict in ("REGRESSION", "MISSING") for change in changes)
        undecided |= not all(change.alike for change in changes)
    return failed, undecided


def _warn(before: Mapping[str, Record]) -> None:
    """Warn if REF is from another machine, before an hour is spent on measuring."""
    here = environment()
    others = {
        difference
        for question, record in before.items()
        for difference in differences(record["environment"], here | {"threads": threads_of(question)})
    }
    if others:
        print(f"REF was not measured on this machine ({'; '.join(sorted(others))}): there will be no verdict. {REMEDY}")


def _git(*arguments: str) -> str | None:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


if __name__ == "__main__":
    main()
