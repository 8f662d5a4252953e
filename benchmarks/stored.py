"""List the stored results of older code, and the commands that make them again: python -m benchmarks.stored [NAME] ...

For each JSON file in benchmarks/results it prints the commit of the measurement, the command, and how many files of
the code behind the result have changed since, including uncommitted changes. NAME is part of a file's name; with it
the changed files are listed too. Changed code need not give other results; unchanged code on another machine may.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .records import RESULTS, ROOT, question_of

# Code that can change a result; in the recipe not what prints, publishes or serves.
KERNELS = ("mft_kernels", "csrc/cpu")
_NO_RESULT = (
    *("mft/cli", "mft/publishing", "mft/serving", "mft/tracking", "mft/memory"),
    *("mft_study/report", "mft_study/evidence"),
)
RECIPE = (*KERNELS, "python/mft", "python/mft_study", *(f":!python/{folder}" for folder in _NO_RESULT))
SERVER = (*KERNELS, "python/mft/serving", "python/mft/masks")
SIMULATED = ("python/mft", "mft_kernels", "benchmarks/memory")
#: Questions that only the commit of their result can answer, and the command there.
GONE = {
    "budget-search.json": "python -m benchmarks.regimes.budget_search",
    "federated.json": "python -m benchmarks.regimes.federated",
}


@dataclass
class Stored:
    """One file of results. changed: files that differ from its commit's; None: this checkout lacks that commit."""

    name: str
    commit: str
    command: str
    changed: list[str] | None

    @property
    def words(self) -> str:
        if self.changed is None:
            return "not known: this checkout lacks the commit"
        return f"{len(self.changed)} files changed" if self.changed else "as it was"


def find_maker(name: str, record: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return (the command that makes a file of results, the code that decides its content)."""
    if name.startswith(("compare-", "ablation-")):
        return record["environment"]["command"], RECIPE
    if name.startswith("serve-load"):
        return record["environment"]["command"], SERVER
    question = question_of(name) or name
    if question in GONE:
        return f"git switch --detach {record['environment']['commit'][:8]}; {GONE[question]}", ()
    if question.startswith("memory_"):
        return f"python -m benchmarks.memory {question.removeprefix('memory_')}", SIMULATED
    if question == "memory":
        return "make bench WHAT=memory", (*SIMULATED, "benchmarks/bench_memory.py")
    if question.startswith("gpu"):
        return "make gpu", ("mft_kernels", "csrc/cuda", "benchmarks/gpu")
    recipe = ("train_step", "generate", "many_masks")
    code = SERVER if question == "serve" else RECIPE if question in recipe else KERNELS
    return f"make bench WHAT={question}", (*code, f"benchmarks/bench_{question}.py")


def read_stored() -> list[Stored]:
    """Return all stored results by name."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if "environment" not in record:  # made from results, such as gpu-faster.json
            continue
        commit = str(record["environment"].get("commit") or "")
        command, code = find_maker(path.name, record)
        found.append(Stored(path.name, commit, command, _changed_since(commit, code)))
    return found


def _changed_since(commit: str, code: Sequence[str]) -> list[str] | None:
    if not commit or _git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        return None
    done = _git("diff", "--name-status", "--find-renames", commit, "--", *code)
    if done.returncode:
        raise RuntimeError(f"git diff must say what changed since {commit}, got: {done.stderr.strip()}")
    lines = (line.split("\t") for line in done.stdout.splitlines())
    return [paths[-1] for status, *paths in lines if status != "R100"]  # R100: moved without a change


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stored", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of files; also lists the changed code")
    asked = parser.parse_args()
    if _git("rev-parse", "HEAD").returncode:
        sys.exit(f"error: {ROOT} must be a git checkout, whose history says what changed, it is none")
    stored = [one for one in read_stored() if not asked.names or any(name in one.name for name in asked.names)]
    if not stored:
        sys.exit(f"error: names must be parts of names in {RESULTS}, got {' '.join(asked.names)}")
    print("| result | measured at | the code since | made again by |\n|---|---|---|---|")
    for one in stored:
        print(f"| {one.name} | {one.commit[:7] or 'not said'} | {one.words} | `{one.command}` |")
    for one in stored if asked.names else []:
        print("\n".join([f"\n{one.name}:", *(f"  {path}" for path in one.changed or ["nothing"])]))


if __name__ == "__main__":
    main()
