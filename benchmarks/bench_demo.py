"""How long does `make demo` take, where does its time go, and what does its table say?

The demo itself; then a run of each kind of arm that it trained, and an evaluation on test, once more under the
profiler: each stands for all of its kind. Starting, reading the data, merging and generating are not seen.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mft.cli.demo import demo_study, run_demo
from mft.study.arms.run import run_test, run_unit
from mft.study.config import CONTROL, FULL, MASK
from mft.study.report.finished import Finished, opened
from mft.training.run_directory import TABLE_JSON

from .harness import Finding, Spread, report
from .step_profile import KINDS, REST, profile_step

ASKED = ("products", "attention", "optimiser")  # the rest shall be at most TARGET of the time
TARGET = 0.05


def shares(finished: Finished) -> dict[str, float]:
    """By kind of work, of all that was trained and evaluated on test."""
    study, workspace = finished.study, finished.workspace
    domain, seed = next(iter(study.domains)), study.seeds[0]
    spent = dict.fromkeys((*KINDS, REST), 0.0)

    def add(times: int, work: Callable[[], object]) -> None:
        for kind, milliseconds in profile_step(work).items():
            spent[kind] += times * milliseconds

    with tempfile.TemporaryDirectory() as folder:
        for arm in (finished.arm(kind) for kind in (FULL, CONTROL, MASK)):
            job = replace(finished.job(domain, arm, seed), trained=Path(folder) / "again.safetensors")
            add(sum(outcome.unit.arm == arm for outcome in finished.outcomes), lambda job=job: run_unit(workspace, job))
    test = finished.job(domain, finished.arm(MASK), seed)
    add(len(study.arms), lambda: run_test(workspace, test))
    return {kind: milliseconds / sum(spent.values()) for kind, milliseconds in spent.items()}


def main() -> None:
    """Print and store the answer."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "demo"
        begin = time.perf_counter()
        run_demo(demo_study(directory))
        total = time.perf_counter() - begin
        table = json.loads((directory / TABLE_JSON).read_text())
        torch.set_num_threads(1)  # as the study ran it
        with opened(directory) as finished, torch.enable_grad():
            found = shares(finished)
    report(
        "demo",
        "make demo: where its time goes",
        [
            Finding("the demo", Spread.of([total]), "s"),
            *(Finding(kind, Spread.of([100 * share]), "%") for kind, share in found.items() if share),
            Finding(
                f"outside {', '.join(ASKED)}",
                Spread.of([100 * (1 - sum(found[kind] for kind in ASKED))]),
                "%",
                "at most",
                100 * TARGET,
            ),
        ],
        table=table,
    )
