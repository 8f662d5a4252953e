"""Processes that join a tiny study, some of which are killed.

    PYTHONPATH=.:python:tests python tests/study/shared/joiners.py --kills 200    # or: make join-kills

Each round begins a study in a new directory, with joiners that die by kill -9: at a named stage, or at a random moment.
Each dead joiner is replaced until the study is done. Then it must have found the same bits as one process alone, and no
result may have been written twice. Studies are begun until each stage has seen the same number of kills.
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
import threading
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

from rich.console import Console
from tiny_study import FULL, equal, make_study, write_ground

from mft_study.load import load_study
from mft_study.report.write import write_study_report
from mft_study.shared import claims as claims_module
from mft_study.shared import leases as leases_module
from mft_study.shared.leases import Pace
from mft_study.store import Store
from mft_study.study_run import run_study

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
LAST = [stage for stage, (owner, *_) in STAGES.items() if owner is Store]  # only seen when all is trained
RANDOM = "at a random moment"
AT_THE_END = 3  # kills of a study at each stage of LAST
_TOLD, _STUDY = "told.txt", "joined.yaml"
_PRELOADED = [
    "mft_study.study_run",
    "mft_study.report.write",
    "transformers.models.llama.modeling_llama",
]  # slow imports


def join(
    ground, directory, stage=None, call=1, number=signal.SIGKILL, seconds=None, skew=0.0, foreign=False, workers=1
):
    """Join the study in a process of its own.

    It gets the signal number at the call-th time that it reaches ``stage``, or is killed after ``seconds`` of processor
    time. skew: seconds that its clock is ahead. foreign: as on another machine, its process id tells nobody whether it
    is alive.
    """
    faulthandler.dump_traceback_later(900, exit=True)  # a joiner that hangs prints where
    if skew:
        real = time.time
        time.time = lambda: real() + skew
    if foreign:
        leases_module._process = lambda process: ({}, "")
    _note_what_is_told(directory)
    if stage is not None:
        _signal_at(stage, call, number)
    if seconds is not None:
        threading.Thread(target=_die_after, args=(seconds,), daemon=True).start()
    found = io.StringIO()
    try:
        study = load_study(ground / _STUDY, [f"workers={workers}"])
        report = lambda findings: write_study_report(findings, directory)  # noqa: E731
        run_study(study, directory, console=Console(file=found, width=200), joins=True, pace=PACE, report=report)
    finally:
        with (directory.parent / f"{directory.name}-{os.getpid()}.log").open("w") as file:
            file.write(found.getvalue())


def facts(ground, directory, **options):
    """Return what a study found, without times; a finished study is only read."""
    console = Console(file=io.StringIO(), width=200)
    findings = run_study(make_study(ground, ARMS), directory, console=console, pace=PACE, **options)
    for outcome in findings.outcomes:
        outcome.seconds = 0.0
    names = ("outcomes", "chosen", "validation", "test", "notes", "test_openings")
    return {name: vars(findings)[name] for name in names}


def told(directory):
    """Return the names of the results that were written, once for each time."""
    return [line for path in directory.parent.glob(f"{directory.name}-*-{_TOLD}") for line in path.read_text().split()]


def results_in(directory):
    return [path for folder in ("units", "test") for path in directory.glob(f"{folder}/*/*/[!.]*.json")]


def start(ground, directory, **options):
    if not (ground / _STUDY).exists():  # written before any joiner can read it
        make_study(ground, ARMS)
        (ground / "study.yaml").rename(ground / _STUDY)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=join, args=(ground, directory), kwargs=options)
    process.start()
    return process


def finish(ground, directory, processes, seconds=600):
    """Wait for joiners, and assert that each ends with exit code 0."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(codes), (codes, [path.read_text() for path in directory.parent.glob("*.log")])


def until(is_true, what, seconds=600):
    """Wait until ``is_true()``; return the seconds that it took."""
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < seconds, f"within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def at_once(calls):
    """Call functions in threads that start together; return what they returned."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(index, call):
        barrier.wait()
        found[index] = call()

    threads = [threading.Thread(target=run, args=numbered) for numbered in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def round_of_kills(ground, directory, wanted, at_once, results, rng, seconds):
    """Kill joiners of one study until it is done; return the kills by stage.

    wanted: how many kills each stage still needs. results: of the whole study. seconds: as for start().
    """
    made, running, begun = Counter(), {}, 0
    while True:
        is_trained = len(told(directory)) >= results
        while len(running) < at_once:
            open_ = {stage: wanted[stage] - made[stage] - list(running.values()).count(stage) for stage in wanted}
            late = {stage: min(open_[stage], AT_THE_END - made[stage]) for stage in LAST}
            early = {stage: open_[stage] for stage in wanted if stage not in LAST}
            left = late if is_trained or max(early.values()) <= 0 else early
            if max(left.values()) <= 0:
                break
            stage = rng.choice([stage for stage in left if left[stage] == max(left.values())])
            options = {"seconds": rng.uniform(0, seconds / at_once)} if stage == RANDOM else {"stage": stage}
            if stage not in (RANDOM, *LAST):
                options["call"] = rng.randint(1, 2)
            process = start(ground, directory, foreign=rng.random() < 0.2, workers=1 + (begun % 20 == 7), **options)
            running[process], begun = stage, begun + 1
        if not running:
            break
        wait([process.sentinel for process in running], 900)
        ended = [process for process in running if not process.is_alive()]
        assert ended, "no joiner ended for 900 s"
        for process in ended:
            assert process.exitcode in (0, -9), process.exitcode
            made[running.pop(process)] += process.exitcode == -9
    finish(ground, directory, [start(ground, directory)])
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    stages = [*STAGES, RANDOM]
    each, rng, counts, began = -(-given.kills // len(stages)), random.Random(given.seed), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["MFT_CACHE"] = str(place / "cache")
        write_ground(place)
        busy = time.process_time()
        alone = facts(place, place / "alone")
        busy, results = time.process_time() - busy, len(results_in(place / "alone"))
        for rounds in itertools.count(1):
            at_once, directory = given.at_once[rounds % len(given.at_once)], place / f"round-{rounds}"
            wanted, since = {stage: each - counts[stage] for stage in stages}, time.monotonic()
            made = round_of_kills(place, directory, wanted, at_once, results, rng, busy)
            names = told(directory)
            assert len(names) == len(set(names)), "a result was published twice"
            assert len(results_in(directory)) == results, "a unit has two results, or none"
            assert equal(facts(place, directory), alone), f"study {rounds} found other bits"
            counts += made
            words = f"{at_once} at once, {made.total()} killed in {time.monotonic() - since:.0f} s"
            print(f"study {rounds}: {words}, bits as alone, {results} results, each once", flush=True)
            if min(counts[stage] for stage in stages) >= each:
                break
    minutes = (time.monotonic() - began) / 60
    print(f"{counts.total()} processes killed by -9 in {rounds} studies, in {minutes:.1f} minutes:")
    print("\n".join(f"  {counts[stage]:3} {stage}" for stage in stages))
    print("Each study found the bits of one process alone, and no unit has two results.")


def _note_what_is_told(directory):
    real = claims_module.publish

    def publish(path, content):
        first = real(path, content)
        if first:
            with (directory.parent / f"{directory.name}-{os.getpid()}-{_TOLD}").open("a") as file:
                file.write(f"{Path(path).relative_to(directory)}\n")
        return first

    claims_module.publish = publish


def _signal_at(stage, call, number):
    owner, name, when = STAGES[stage]
    real, calls = getattr(owner, name), itertools.count(1)

    def stopped(*args, **kwargs):
        stops = next(calls) == call + (2 if name in ("take", "release") else 0)  # plus those for its presence
        if stops and when == "before":
            os.kill(os.getpid(), number)
        result = real(*args, **kwargs)
        if stops and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, stopped)


def _die_after(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
