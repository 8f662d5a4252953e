"""python -m benchmarks.gpu [--what step,forward] [--shapes 4096x4096] [--tokens 512,2048] [--budget 500] [--out DIR]
python -m benchmarks.gpu --recover DIR   the results of a run that was cut off, from the journal that it left there

This process only watches: a kernel that hangs, or takes the CUDA context with it, ends the worker and not the run.

Exit code: 0 done, also if a goal is missed, the budget left cases out, or without libmft_cuda.so Triton alone was
measured; 1 something failed or is wrong; 2 no GPU, or a bad argument; 3 nothing failed, but compute-sanitizer, which
should have looked into the CUDA kernels, is missing or gave no verdict, or the library was built without this card's
own kernels: all else is measured and written.
"""

import argparse
import difflib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..harness import RESULTS, ROOT
from . import results, worker
from .cases import CUDA, DRY_SHAPE, DRY_TOKENS, SHAPES, TOKENS, WHATS, Case, plan, takes_part
from .journal import FAILED, NOT_MEASURED, Journal

BUDGET = 500.0
#: In the folder of the results, until they are written.
JOURNAL = "gpu-journal.jsonl"
#: Beyond the budget, for a case that takes longer than was expected.
_GRACE = 25.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; "--what" and its like hold lists."""
    every = tuple(shape for shapes in SHAPES.values() for shape in shapes)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--what", type=_list_of(_what), default=list(WHATS), help=f"of {','.join(WHATS)}")
    parser.add_argument("--shapes", type=_list_of(_shape), default=list(every),
                        help=f"NxK, or {' or '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--tokens", type=_list_of(_tokens), default=list(TOKENS), help="values of M")
    parser.add_argument("--budget", type=_positive, default=BUDGET, help="seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where gpu-*.json and gpu.md go")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, kernels emulated, no GPU needed")
    parser.add_argument("--recover", type=Path, metavar="DIR", help="write the results of a run that was cut off")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the journal of the process that watches
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    asked.shapes = [s for shapes in asked.shapes for s in (shapes if isinstance(shapes[0], tuple) else (shapes,))]
    if asked.dry_run:
        asked.shapes, asked.tokens = [DRY_SHAPE], [DRY_TOKENS]
        if asked.out == RESULTS:
            asked.out = Path(tempfile.mkdtemp(prefix="gpu-dry-run-"))
        if asked.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must be elsewhere in a dry run, which measures nothing, got {asked.out}")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asked = parse(arguments)
    if asked.recover:
        return recover(asked.recover)
    cases = plan(asked.what, asked.shapes, asked.tokens)
    if asked.worker:
        worker.work_on(cases, Journal(asked.worker), asked.out, budget=asked.budget, deadline=asked.deadline,
                       dry=asked.dry_run)  # fmt: skip
        return 0
    if not asked.dry_run and not _has_gpu():
        print("no GPU found by torch; --dry-run walks through the suite without one", file=sys.stderr)
        return 2
    if not cases:
        print("nothing to measure: no case has such a shape and M", file=sys.stderr)
        return 2
    deadline = time.time() + asked.budget
    asked.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(asked.out / JOURNAL)
    journal.path.unlink(missing_ok=True)
    journal.add("asked", arguments=arguments)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--out", str(asked.out.absolute())]
    command += ["--worker", str(journal.path.absolute()), "--deadline", str(deadline)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("MFT_KERNELS", "MFT_AUTOTUNE", "MFT_CUDA_CAPABILITY", "TRITON_INTERPRET"):  # the suite decides
        environment.pop(name, None)
    if asked.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what follows is still done
    try:
        watch(command, environment, journal, cases, deadline + _GRACE)
    finally:
        if journal.about():  # else nothing ran, and what was measured earlier stays
            results.write(asked.out, journal, cases)
    code = _summary(journal, cases, asked.out)
    journal.path.unlink()
    return code


def recover(folder: Path) -> int:
    """The results of a run that was cut off, from its journal; 2 if there is none."""
    journal = Journal(folder / JOURNAL)
    earlier = journal.events("asked")
    if not earlier or not journal.about():
        print(f"no run left its journal in {folder}", file=sys.stderr)
        return 2
    asked = parse([*earlier[0]["arguments"], "--out", str(folder)])
    cases = plan(asked.what, asked.shapes, asked.tokens)
    results.write(folder, journal, cases)
    return _summary(journal, cases, folder)


def watch(
    command: Sequence[str],
    environment: dict[str, str],
    journal: Journal,
    cases: Sequence[Case],
    deadline: float,
    *,
    clock: Callable[[], float] = time.time,
    poll: float = 0.2,
) -> None:
    """Run workers until one ends by itself, each going on behind the case that ended the last; none after the deadline.

    A case that hangs, or with which the worker died, is measured once more without the CUDA kernels if they took part:
    they shall cost no other competitor its numbers. Else, or if that ends the same way, it is recorded as failed. From
    then on they are left out of that kind of case, and after a hang, which costs a minute, of every kind.
    """
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)
        why, lost = None, len(journal.events("lost"))
        try:
            since: tuple[str | None, float] = (None, clock())
            while process.poll() is None and why is None:
                time.sleep(poll)
                current = journal.unfinished()
                key = current["key"] if current else None
                if key != since[0]:
                    since = (key, clock())
                if clock() > deadline:
                    why = "the budget ended while it ran"
                elif current and clock() - since[1] > current["patience"]:
                    why = f"hung: no end after {current['patience']:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return
        culprit = journal.unfinished()
        case = next((case for case in cases if culprit and case.key == culprit["key"]), None)
        if case is None:  # not a case is to blame: a second worker would end the same way
            return
        late = clock() > deadline
        last_words = [event["message"] for event in journal.events("lost")[lost:] if event["key"] == case.key]
        why = why or (last_words[-1] if last_words else f"the worker died, exit code {process.returncode}")
        print(f"{case}: {why}", flush=True)
        hung = why.startswith("hung")
        if not late and takes_part(CUDA, case) and not journal.suspects(case):
            journal.suspect(CUDA, case, why, everywhere=hung)
            continue
        if hung and case.detail.startswith(CUDA):
            journal.suspect(CUDA, case, why, everywhere=True)
        journal.record(case, NOT_MEASURED if late else FAILED, reason=why)
        if late:
            return


def _summary(journal: Journal, cases: Sequence[Case], out: Path) -> int:
    if not journal.about():
        print("the worker ended before its first case", file=sys.stderr)
        return 1
    records = journal.records()
    failed = [case for case in cases if records.get(case.key, {}).get("status") == FAILED]
    left = [case for case in cases if records.get(case.key, {}).get("status", NOT_MEASURED) == NOT_MEASURED]
    print(f"\n{(out / 'gpu.md').read_text().partition('## Goals')[2].partition('## ')[0].strip()}\n")
    for title, some in (("failed", failed), ("not measured", left)):
        if some:
            print(f"{title}: {'; '.join(map(str, some))}")
    print(f"{len(cases) - len(failed) - len(left)} of {len(cases)} cases measured; written to {out}")
    if journal.about().get("environment", {}).get("dry_run"):
        print("a dry run: nothing was measured on a GPU, and no figure of it says anything of one")
    library = journal.about().get("environment", {}).get("cuda_library", "")
    if library.startswith("none: "):
        print(f"WARNING: the CUDA kernels were left out: {library[6:]}", flush=True)
    unproven = [record for record in records.values() if record.get("unproven")]
    for record in unproven:
        print(f"UNPROVEN: {record['detail']}: {record['reason']}", flush=True)
    lacks = journal.about().get("environment", {}).get("cuda_lacks", [])
    for kernels in lacks:
        print(f"LACKING: this card's own {kernels}; the general kernels were measured in their place", flush=True)
    return 1 if failed else 3 if unproven or lacks else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _list_of(item: Callable) -> Callable[[str], list]:
    def parse_list(text: str) -> list:
        return [item(part.strip()) for part in text.split(",") if part.strip()]

    return parse_list


def _what(text: str) -> str:
    if text not in WHATS:
        near = difflib.get_close_matches(text, WHATS, n=1, cutoff=0.0)
        raise argparse.ArgumentTypeError(f"must be among {', '.join(WHATS)}, got {text!r}; did you mean {near[0]!r}?")
    return text


def _shape(text: str) -> tuple:
    if text in SHAPES:
        return SHAPES[text]
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be NxK, or one of {', '.join(SHAPES)}, got {text!r}")
    return int(parts[0]), int(parts[1])


def _tokens(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
