"""Processes that join a tiny study, some of which are killed.

    PYTHONPATH=.:python:tests python tests/study/shared/joiners.py --kills 200

Each round begins a study in a new directory, with joiners that die by kill -9: at a named stage, or at a random moment.
Each dead joiner is replaced until the round has made its kills. Then the study must have found the same bits as one
process alone, and no result may have been written twice.
"""

import argparse
import faulthandler
import io
import itertools
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from rich.console import Console
from tiny_study import FULL, equal, make_study, write_ground

from mft.study.load import load_study
from mft.study.report.write import write_study_report
from mft.study.run import run_study
from mft.study.shared import claims as claims_module
from mft.study.shared import leases as leases_module
from mft.study.shared.leases import Pace
from mft.study.store import Store

ARMS = FULL + "  control: {kind: control, lrs: [1e-2]}\n  MFT: {kind: mask, lrs: [1e-2, 3e-2]}\n"
PACE = Pace(beat=0.2, expiry=2.0, look=0.2)
# Where a joiner can be made to die: the owner and the name of a function, and whether before or after its call.
STAGES = {
    "after a claim": (leases_module.Leases, "take", "after"),
    "before a result": (claims_module, "publish", "before"),
    "after a result": (claims_module, "publish", "after"),
    "after the weights": (claims_module, "place", "after"),
    "before a release": (leases_module.Leases, "release", "before"),
    "after a release": (leases_module.Leases, "release", "after"),
    "while test is opened": (Store, "open_test", "before"),
    "while it is reported": (Store, "report_once", "before"),
    "after the report": (Store, "report_once", "after"),
}
_TOLD, _STUDY = "told.txt", "joined.yaml"
_PRELOADED = ["mft.study.run", "mft.study.report.write", "transformers.models.llama.modeling_llama"]  # slow imports


def join(ground, directory, stage=None, call=1, report=True, skew=0.0, foreign=False, workers=1):
    """Join the study in a process of its own.

    It dies at the call-th time that it reaches ``stage``. skew: seconds that its clock is ahead. foreign: as on another
    machine, nobody can see by its process id whether it is alive.
    """
    faulthandler.dump_traceback_later(90, exit=True)  # a joiner that hangs prints where
    if skew:
        real = time.time
        time.time = lambda: real() + skew
    if foreign:
        leases_module._process = lambda process: ({}, "")
    _note_what_is_told(directory)
    if stage is not None:
        _die_at(stage, call)
    found = io.StringIO()
    try:
        study = load_study(ground / _STUDY, [f"workers={workers}"])
        options = {"report": lambda findings: write_study_report(findings, directory)} if report else {}
        run_study(study, directory, console=Console(file=found, width=200), joins=True, pace=PACE, **options)
    finally:
        with (directory.parent / f"{directory.name}-{os.getpid()}.log").open("w") as file:
            file.write(found.getvalue())


def facts(ground, directory, **options):
    """Return what a study found, without times; a finished study is only read."""
    console = Console(file=io.StringIO(), width=200)
    findings = run_study(make_study(ground, ARMS), directory, console=console, **options)
    for outcome in findings.outcomes:
        outcome.seconds = 0.0
    names = ("outcomes", "chosen", "validation", "test", "notes", "test_openings")
    return {name: vars(findings)[name] for name in names}


def told(directory):
    """Return the names of the results that were written, once for each time."""
    return [line for path in directory.parent.glob(f"{directory.name}-*-{_TOLD}") for line in path.read_text().split()]


def start(ground, directory, **options):
    if not (ground / _STUDY).exists():  # written before any joiner can read it
        make_study(ground, ARMS)
        (ground / "study.yaml").rename(ground / _STUDY)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=join, args=(ground, directory), kwargs=options)
    process.start()
    return process


def finish(ground, directory, processes, seconds=180):
    """Wait for joiners, and assert that each ends with exit code 0."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(codes), (codes, [path.read_text() for path in directory.parent.glob("*.log")])


def round_of_kills(ground, directory, kills, workers, rng):
    """Kill joiners of one study ``kills`` times; return (kills, kills per stage, seconds)."""
    stages, counts = itertools.cycle(rng.sample([*STAGES, None, None, None], len(STAGES) + 3)), {}
    running, killed, began = {}, 0, time.monotonic()
    while killed < kills:
        while len(running) < workers:
            stage = next(stages)
            options = {}
            if stage is not None:
                options = {"stage": stage, "call": 1 if STAGES[stage][0] is Store else rng.randint(1, 4)}
            process = start(ground, directory, foreign=rng.random() < 0.2, **options)
            until = time.monotonic() + (rng.uniform(0.2, 3.0) if stage is None else 12)
            running[process] = (stage or "at random", until)
        time.sleep(0.02)
        for process, (stage, until) in list(running.items()):
            if process.is_alive() and time.monotonic() > until:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            if not process.is_alive():
                del running[process]
                assert process.exitcode in (0, -9), process.exitcode
                if process.exitcode == -9:
                    killed += 1
                    counts[stage] = counts.get(stage, 0) + 1
        if all((directory / name).exists() for name in ("table.json", "test/reported.json")):
            break  # done before all kills were made: the next round makes them
    for process in running:
        process.kill() if killed < kills else None
        process.join(180)
    finish(ground, directory, [start(ground, directory)])
    return killed, counts, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, counts, killed, rounds = random.Random(given.seed), {}, 0, 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["MFT_CACHE"] = str(place / "cache")
        write_ground(place)
        alone = facts(place, place / "alone")
        while killed < given.kills:
            workers, directory = given.workers[rounds % len(given.workers)], place / f"round-{rounds}"
            more, stages, seconds = round_of_kills(place, directory, min(10, given.kills - killed), workers, rng)
            results = told(directory)
            assert len(results) == len(set(results)), "a result was told twice"
            assert equal(facts(place, directory), alone), f"round {rounds} found other bits"
            for stage, count in stages.items():
                counts[stage] = counts.get(stage, 0) + count
            killed, rounds = killed + more, rounds + 1
            print(f"round {rounds}: {workers} at a time, {more} killed in {seconds:.0f} s, bits as alone", flush=True)
    print(f"{killed} killed in {rounds} studies, all with the bits of one process alone; no result told twice")
    print(", ".join(f"{stage} {count}" for stage, count in sorted(counts.items())))


def _note_what_is_told(directory):
    real = claims_module.publish

    def publish(path, content):
        first = real(path, content)
        if first:
            with (directory.parent / f"{directory.name}-{os.getpid()}-{_TOLD}").open("a") as file:
                file.write(f"{Path(path).relative_to(directory)}\n")
        return first

    claims_module.publish = publish


def _die_at(stage, call):
    owner, name, when = STAGES[stage]
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*args, **kwargs):
        dies = next(calls) == call + (2 if name in ("take", "release") else 0)  # plus those for its presence
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


if __name__ == "__main__":
    main()
