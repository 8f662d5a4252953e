"""python -m benchmarks.gpu [--what step,forward] [--shapes 4096x4096] [--tokens 512,2048] [--budget 500] [--out DIR]
python -m benchmarks.gpu --report DIR   gpu.md and gpu-faster.json from the results in DIR, also of an interrupted run

This process measures nothing. It starts the one that measures (worker.py), and another one if a kernel took that down.

Exit code:

0   done; also if the time was up before the last case, or Triton alone was measured because libmft_cuda.so is missing
1   something failed or is wrong
2   no GPU, or a bad argument
3   nothing failed, but something was slow, or compute-sanitizer on the CUDA kernels complained, is missing or gave no
    verdict, or the library was built without this card's own kernels; everything else is measured and written
"""

import argparse
import difflib
import json
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..records import RESULTS
from . import report
from .cases import (
    CUDA,
    DRY_SHAPE,
    DRY_TOKENS,
    EVERY_SHAPE,
    SHAPES,
    TOKENS,
    WHATS,
    deciding,
    is_beside_others,
    plan,
    schedule,
)
from .programs import run_for
from .results import FAILED, NOT_MEASURED, SLOW, WAITING, Results

BUDGET = 500
#: Seconds beyond the budget, for a case that takes longer than expected.
_GRACE = 25.0
#: Variables that the suite sets by itself.
_NOT_INHERITED = ("MFT_KERNELS", "MFT_AUTOTUNE", "MFT_CUDA_CAPABILITY", "TRITON_INTERPRET")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; "--what" and similar options hold lists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--what", type=_list_of(_what), help=f"the default run decides; or among {','.join(WHATS)}")
    parser.add_argument("--shapes", type=_list_of(_shape), default=[EVERY_SHAPE],
                        help=f"NxK, or {' or '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--tokens", type=_list_of(_positive), default=list(TOKENS), help="values of M")
    parser.add_argument("--budget", type=_positive, default=BUDGET, help="seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu-*.json and gpu.md, or one *.zip")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, kernels emulated, no GPU needed")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write gpu.md from the results in DIR")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # arguments of work()
    asked = parser.parse_args(arguments)
    asked.shapes = [shape for shapes in asked.shapes for shape in shapes]
    if asked.dry_run:
        asked.shapes, asked.tokens = [DRY_SHAPE], [DRY_TOKENS]
        if asked.out == RESULTS:
            asked.out = Path(tempfile.mkdtemp(prefix="gpu-dry-run-"))
        if asked.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must be elsewhere in a dry run, which measures nothing, got {asked.out}")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asked = parse(arguments)
    if asked.report:
        return _reported(asked.report, WHATS)
    if asked.what or asked.dry_run:
        cases = plan(asked.what or WHATS, asked.shapes, asked.tokens)
    else:
        cases = deciding(asked.shapes, asked.tokens)
    if asked.worker:
        from .worker import work

        work(cases, asked.out, dry=asked.dry_run, **asked.worker)
        return 0
    if not asked.dry_run and not _has_gpu():
        print("no GPU found by torch; --dry-run walks through the suite without one", file=sys.stderr)
        return 2
    if not cases:
        print("nothing to measure: no case has such a shape and M", file=sys.stderr)
        return 2
    if asked.dry_run and not asked.what:
        print(f"the default run, as planned on a GPU:\n{schedule(deciding(EVERY_SHAPE, TOKENS))}\n", flush=True)
    archive = asked.out if asked.out.suffix == ".zip" else None
    out = Path(tempfile.mkdtemp(prefix="gpu-")) if archive else asked.out
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--out", str(out.absolute())]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the started processes end too
    try:
        ended_well = measure(command, out, time.time() + asked.budget, dry=asked.dry_run)
        code = _reported(out, asked.what or WHATS)
    finally:
        if archive:
            _pack(out, archive)
    return code if ended_well else 1


def _pack(folder: Path, archive: Path) -> None:
    """Write all results into one file, for machines that return few files."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.glob("gpu*")):
            packed.write(path, path.name)
    print(f"packed into {archive}", flush=True)


def measure(command: Sequence[str], out: Path, deadline: float, *, dry: bool = False, grace: float = _GRACE) -> bool:
    """Run workers until one ends by itself, and none after the deadline.

    Each worker continues after the case that ended the last one. If a worker died or hung during a case in which the
    CUDA kernels took part, the case is measured once more without them, so that the other competitors keep their
    numbers. Otherwise, or if that ends the same way, the case has failed. From then on the CUDA kernels are left out of
    that kind of case. After a hang, which costs a minute, they are left out of every kind.

    Returns: False if a worker died and no case is to blame: another worker would end the same way.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    environment |= {"PYTHONUNBUFFERED": "1"} | ({"TRITON_INTERPRET": "1"} if dry else {})
    run, without_cuda = str(time.time_ns()), dict[str, str]()
    while True:
        own = json.dumps({"run": run, "deadline": deadline, "without_cuda": without_cuda})
        _, code = run_for([*command, "--worker", own], environment, deadline + grace - time.time(), shown=True)
        results = Results(out, run)
        case = results.running()
        if case is None:
            if code:
                print(f"the process that measures died between two cases, exit code {code}", file=sys.stderr)
            return not code
        record = results.of(case)
        running, blamed = record["running"], results.blamed(case)
        hung = code is not None and time.time() - running["since"] >= running["patience"]
        why = f"no end after {running['patience']:.0f} s: it hangs, or is slow"
        why = why if hung else f"the process died, exit code {code}"
        why = running.get("lost", why) if code is not None else "the time was up while it ran"
        print(f"{case}: {why}", flush=True)
        kind = "" if hung else case.what
        if code is not None and is_beside_others(case) and not {"", case.what} & without_cuda.keys():
            without_cuda[kind] = f"not tried again after {case}: {why}"
            results.set(case, NOT_MEASURED, reason=WAITING, **{"slow" if hung else "failures": {CUDA: why}})
            continue
        if hung and case.detail.startswith(CUDA):
            without_cuda[kind] = f"not tried again after {case}: {why}"
        results.set(case, NOT_MEASURED if code is None else SLOW if hung else FAILED, reason=why, **blamed)
        if code is None:
            return True


def _reported(out: Path, whats: Sequence[str]) -> int:
    """Write the report of a folder, print its top for these kinds of cases, and return the exit code."""
    documents = [document for document in report.write(out) if document["what"] in whats]
    if not documents:
        print(f"no results in {out}", file=sys.stderr)
        return 2
    print(f"\n{report.top(documents)}\nwritten to {out}", flush=True)
    unproven = [line for line in report.gaps(documents) if not line.startswith(report.WARNING)]
    return 1 if report.failures(documents) else 3 if unproven else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _list_of(item: Callable) -> Callable[[str], list]:
    return lambda text: [item(part.strip()) for part in text.split(",") if part.strip()]


def _what(text: str) -> str:
    if text not in WHATS:
        near = difflib.get_close_matches(text, WHATS, n=1, cutoff=0.0)
        raise argparse.ArgumentTypeError(f"must be among {', '.join(WHATS)}, got {text!r}; did you mean {near[0]!r}?")
    return text


def _shape(text: str) -> tuple[tuple[int, int], ...]:
    """Return the shapes of a model, or one shape."""
    if text in SHAPES:
        return SHAPES[text]
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.lower()):
        return ((int(found[1]), int(found[2])),)
    raise argparse.ArgumentTypeError(f"must be NxK, or one of {', '.join(SHAPES)}, got {text!r}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
