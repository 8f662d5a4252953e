"""A run whose process dies, or whose disk fails, at each call that touches its files, and that then continues.

    python tests/files/file_faults.py               every call, every fault; some minutes
    python tests/files/file_faults.py --cases 20    20 cases, spread over all
    python tests/files/file_faults.py --only "mft train, call 39 "

A short mft train, a mft finetune, and commands that resume or overwrite one run in children of this process, which has
torch and transformers loaded already. file_faults.c is preloaded and counts their calls below the run's directory:
opening, reading, writing, renaming, deleting, syncing. For each call and each fault, the run begins again and meets
that fault. What is left of it then continues without faults. It must end with the bytes of an undisturbed run
(metrics.jsonl: except the seconds), must not have lost a checkpoint, and must leave no other files. If its disk failed,
it must have printed one message that names the file and what to do.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for tiny_run, which loads torch and is imported where it is used

SOURCE = Path(__file__).with_suffix(".c")
COUNT, DIE, HALF, FAIL, FAIL_ON = range(5)  # as in file_faults.c
KILLED, NO_COMPILER = 137, 3  # exit codes
RUN = "run"
CONFIG = "../config.yaml"
_UNLIKE = ("seconds",)
REMEDY = re.compile(
    r"go on with (mft \w+ )?--resume run|start again|has its result|name another (output_dir|one)|check the disk"
)


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    kind: int
    number: int = 0

    @property
    def kills(self) -> bool:
        return self.kind in (DIE, HALF)


FAULTS = [
    Fault("killed before the call", DIE),
    Fault("killed within it, or after it", HALF),
    Fault("ENOSPC from then on", FAIL_ON, errno.ENOSPC),
    Fault("EIO, once", FAIL, errno.EIO),
    Fault("EROFS from then on", FAIL_ON, errno.EROFS),
]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command on a directory in a certain state."""

    name: str
    command: tuple[str, ...]
    begun: Path | None  # its run's directory is a copy of this; None: nothing exists
    wanted: str  # which result it must have
    calls: tuple[str, ...] = ()  # "rename /checkpoints/step-00000001", in the order of a run without a fault
    tried: range = range(0)  # the calls that meet faults, from 1; the others belong to another scenario


@dataclasses.dataclass(frozen=True)
class Case:
    scenario: Scenario
    call: int  # from 1
    fault: Fault

    def __str__(self) -> str:
        return f"{self.scenario.name}, call {self.call} ({self.scenario.calls[self.call - 1]}), {self.fault.name}"


class Wrong(AssertionError):
    """A violated requirement."""


def build(directory: Path) -> Path | None:
    """Build file_faults.c as a shared object; return None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = directory / "file_faults.so"
    subprocess.run([compiler, "-std=gnu11", "-O1", "-fPIC", "-shared", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def main(arguments: list[str]) -> int:
    """Build the library, and continue in a process that preloads it."""
    options = _options().parse_args(arguments)
    if options.inside is not None:
        return sweep(options.inside, options.only, options.cases, options.jobs)
    shared = Path("/dev/shm")  # syncing costs nothing there
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        work = Path(name).resolve()
        library = build(work)
        if library is None:
            print("needs a C compiler: cc, gcc or clang")
            return NO_COMPILER
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        own |= {"MFT_CACHE": str(work / "cache"), "LD_PRELOAD": str(library)}
        command = [sys.executable, str(Path(__file__)), "--inside", name, *arguments]
        return subprocess.call(command, env=os.environ | own)


def sweep(work: Path, only: str, most: int | None, jobs: int) -> int:
    """Try all cases, or only those that contain ``only``, and print how they ended; return 1 if one went wrong."""
    global _lab  # for the pool's processes too, which are forks of this one
    lab = _lab = Lab(work)
    cases = [case for scenario in lab.scenarios() for case in _cases(scenario) if only in str(case)]
    if most is not None:
        cases = [cases[i * len(cases) // most] for i in range(most)]
    ends: Counter[str] = Counter()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for number, (end, problem) in enumerate(pool.imap_unordered(_tried, cases), 1):
            ends[end] += 1
            if problem:
                print(problem, flush=True)
            if number % 50 == 0:
                print(f"{number} of {len(cases)} faults", flush=True)
    print(f"{len(cases)} faults: {', '.join(f'{count} {end}' for end, count in ends.items())}")
    gc.unfreeze()
    return 1 if ends["wrong"] else 0


class Lab:
    """Runs of a tiny model below one directory, each in a child of this process."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.results: dict[str, dict[str, bytes]] = {}
        _warm_up(work)

    def scenarios(self) -> list[Scenario]:
        """Return the scenarios with their calls; keep the results that they lead to."""
        train = ("train", "--config", CONFIG)
        tune = ("finetune", "--config", CONFIG)
        again, tune_again = ("train", "--resume", RUN), ("finetune", "--resume", RUN)
        begun = self.work / "begun"
        first = self.recorded("mft train", train, None, "masks")
        tuned_first = self.recorded("mft finetune, as it finishes", tune, None, "model", begin="rename /plot.png")
        found = [first, tuned_first]
        for name, of, command, after in (
            ("mft train --resume, killed after step 1", first, again, "rename /checkpoints/step-00000001"),
            ("mft train --resume, killed while it finished", first, again, "rename /plot.png"),
            ("mft finetune --resume, killed while it finished", tuned_first, tune_again, "rename /plot.png"),
        ):
            state = begun / name.replace(" ", "-")
            with self.directory() as case:
                number = of.calls.index(after) + 1
                code, _ = self.run(case, of.command, number, Fault("", HALF))
                assert code == KILLED
                shutil.copytree(case / RUN, state)
            found.append(self.recorded(name, command, state, of.wanted))
        other = begun / "other"
        with self.directory() as case:
            code, output = self.run(case, (*train, "train.lr=1e-3", "checkpoint_minutes=null"))
            assert code == 0, output
            shutil.copytree(case / RUN, other)
        name, command = "mft train --overwrite, as it begins", (*train, "--overwrite")
        found.append(self.recorded(name, command, other, "masks", end="rename /metrics.jsonl"))
        return found

    def recorded(
        self,
        name: str,
        command: tuple[str, ...],
        begun: Path | None,
        wanted: str,
        begin: str | None = None,
        end: str | None = None,
    ) -> Scenario:
        """Return the scenario with the calls of a run without a fault; keep that run's result."""
        scenario = Scenario(name, command, begun, wanted)
        with self.directory(begun) as case:
            log = case / "calls"
            code, output = self.run(case, command, log=log)
            if code:
                raise Wrong(f"{name}: {output}")
            result = contents(case / RUN)
            if self.results.setdefault(wanted, result) != result:
                raise Wrong(f"{name} without a fault: {_difference(result, self.results[wanted])}")
            calls = tuple(_steady(line) for line in log.read_text().splitlines())
        first = 1 if begin is None else calls.index(begin) + 1
        last = len(calls) if end is None else calls.index(end) + 1
        return dataclasses.replace(scenario, calls=calls, tried=range(first, last + 1))

    def tried(self, case: Case) -> tuple[str, str]:
        """Return (how it ended, what went wrong)."""
        with self.directory(case.scenario.begun) as directory:
            try:
                return self.try_case(directory, case), ""
            except Wrong as error:
                return "wrong", f"{case}: {error}"

    def try_case(self, directory: Path, case: Case) -> str:
        scenario, fault, run = case.scenario, case.fault, directory / RUN
        code, output = self.run(directory, scenario.command, case.call, fault)
        if fault.kills:
            _must(code == KILLED, f"exit code {code}, {output}")
        elif code:
            _must(code == 2, f"exit code {code}, {output}")
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            _must(len(errors) == 1 and "Traceback" not in output, f"must end with one message, got {output}")
            # safetensors reports everything that it cannot open as missing.
            reasons = [os.strerror(fault.number), f"No such file or directory: {RUN}/checkpoints"]
            named = f"{RUN}/" in errors[0] or f"got {RUN} (" in errors[0]
            _must(named and any(reason in errors[0] for reason in reasons), f"must name file and reason: {errors[0]}")
            _must(REMEDY.search(errors[0]) is not None, f"must say what to do: {errors[0]}")
        end = "killed" if fault.kills else "refused in one message" if code else "went on"
        self.lost_nothing(run, case)
        self.settle(directory, scenario)
        found = contents(run)
        _must(found == self.results[scenario.wanted], _difference(found, self.results[scenario.wanted]))
        return end

    def lost_nothing(self, run: Path, case: Case) -> None:
        """Check that what had been saved before the fault is there."""
        from mft.training.checkpoint import newest_checkpoint

        done = case.scenario.calls[: case.call - 1 + (case.fault.kind == HALF)]
        saved = [int(name[-8:]) for name in done if re.fullmatch(r"rename /checkpoints/step-\d{8}", name)]
        if saved and not (run / case.scenario.wanted).exists():
            found, skipped = newest_checkpoint(run / "checkpoints")
            _must(found is not None and found.step >= saved[-1], f"saved {saved}, has {found}; {skipped}")

    def settle(self, directory: Path, scenario: Scenario) -> None:
        """Do what a user would do, until the run is done."""
        run = directory / RUN
        begun = (run / "config.yaml").is_file() and (
            (run / "config.yaml").read_bytes() == self.results[scenario.wanted]["config.yaml"]
        )
        resume = (scenario.command[0], "--resume", RUN)
        finished = begun and (run / scenario.wanted).exists()
        code, output = self.run(directory, resume if begun else scenario.command)
        if finished:
            _must(code == 2 and "must name a run that is not finished" in output, f"finished, then {code}: {output}")
        else:
            _must(code == 0, f"{' '.join(resume) if begun else 'again'}: {code}, {output}")

    @contextlib.contextmanager
    def directory(self, begun: Path | None = None) -> Iterator[Path]:
        """Make a directory below the work directory; ``begun`` is copied there as its run."""
        path = Path(tempfile.mkdtemp(dir=self.work))
        if begun is not None:
            shutil.copytree(begun, path / RUN)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def run(
        self, case: Path, command: tuple[str, ...], call: int = 0, fault: Fault | None = None, log: Path | None = None
    ) -> tuple[int, str]:
        """Return (exit code, output) of mft with the command, in a child that works in the directory ``case``."""
        from tiny_run import run_main

        with (case / "output").open("w+b") as output:
            child = os.fork()
            if not child:
                signal.alarm(120)
                os.chdir(case)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                to = -1 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT)
                fault = fault or Fault("none", COUNT)
                ctypes.CDLL(None).faults_arm(
                    os.fsencode(case / RUN), ctypes.c_long(call), fault.kind, fault.number, ctypes.c_int(to)
                )
                os._exit(run_main(command))
            _, status = os.waitpid(child, 0)
            output.seek(0)
            return os.waitstatus_to_exitcode(status), output.read().decode()


_lab: Lab


def _cases(scenario: Scenario) -> Iterator[Case]:
    """Yield every fault at each call, except dying at a call that changes nothing.

    That is the same as dying before it.
    """
    written = True
    for number in scenario.tried:
        call, _ = scenario.calls[number - 1].split(" ")
        changes = call not in ("look", "read")
        for fault in FAULTS:
            if (fault.kind != DIE or (changes and written)) and (changes or fault.number == errno.EIO):
                yield Case(scenario, number, fault)
        written = call == "write" or (written and not changes)


def _tried(case: Case) -> tuple[str, str]:
    return _lab.tried(case)


def contents(run: Path) -> dict[str, bytes]:
    """Return every file below ``run`` by name; metrics without what differs between any two runs."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    events = [json.loads(line) for line in found.pop("metrics.jsonl", b"").splitlines()]
    lines = [json.dumps({key: value for key, value in event.items() if key not in _UNLIKE}) for event in events]
    return found | {"metrics.jsonl, but for seconds": "\n".join(lines).encode()}


def _warm_up(work: Path) -> None:
    """Do once what every child would need: import, compile, fill caches. No thread starts, so a fork is safe."""
    import torch
    from tiny_run import run_main, write_run

    torch.set_num_threads(1)
    learn = "train: {lr: 1e-2, epochs: null, steps: 2, batch_size: 2}\n"
    with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar
        write_run(work, f"checkpoint_minutes: 0\nmask: {{layers_to_transform: 2-3, keep_ratio: 0.8}}\n{learn}")
    import matplotlib.figure

    # Drawing takes two fifths of a run and touches no file: plots stay blank here, test_resume_cli.py compares drawn
    # ones.
    matplotlib.figure.Figure.draw = lambda *_: None
    for verb in ("train", "finetune"):
        run = work / f"warm-{verb}"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            if run_main((verb, "--config", str(work / "config.yaml"), f"output_dir={run}")):
                raise RuntimeError(said.getvalue())
    gc.collect()
    gc.freeze()  # otherwise each child copies what its collector touches


def _steady(call: str) -> str:
    """Return the call without random parts of names."""
    return re.sub(r"\.[a-z0-9_]{8}\.(tmp|old)", r".*.\1", call)


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def _difference(found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    other = [name for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    return (
        f"lacks {sorted(wanted.keys() - found.keys())}, has {sorted(found.keys() - wanted.keys())} too, differs in "
        f"{sorted(other)}"
    )


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="only so many, spread over all")
    parser.add_argument("--only", default="", help="those whose line holds this, such as 'call 39 (look'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
