"""Measure what `mft compare --join` adds to each run: python -m benchmarks.joining.overhead [DIRECTORY].

The study has as many results as board-small. It is made below DIRECTORY, for example on a network disk. Medians in ms.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.joining.board import runs, study
from mft.evaluation.evaluate import Evaluation
from mft_study.evidence.host import this_host
from mft_study.outcome import General, Measured, Outcome
from mft_study.plan import ready, selection
from mft_study.shared.claims import Joined
from mft_study.shared.leases import Leases
from mft_study.store import Store

DOCUMENTS = 200  # per split, about as many as board-small's
_TIMES = 20


def main() -> None:
    with (
        tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name,
        Leases(Path(name)) as held,
    ):
        store = Store(study(), Path(name), Joined(held))
        outcomes = [_of_real_size(outcome) for outcome, _ in runs().values()]
        chosen = selection(study(), outcomes).chosen
        for outcome in outcomes:
            store.save(outcome, chosen)
        files = list(Path(name).glob("units/*/*/*.json"))
        size = sum(path.stat().st_size for path in files) / len(files)
        print(f"{this_host().kind}; {len(files)} outcomes of {size / 1e3:.0f} kB")
        print(f"read all outcomes, first time: {_timed(lambda: Store(study(), Path(name)).outcomes(), 3):.0f} ms")
        print(f"look for more outcomes: {_timed(store.outcomes, 5):.0f} ms")
        print(f"plan: {_timed(lambda: ready(study(), outcomes), 5):.0f} ms")
        numbers = iter(range(10 * _TIMES))
        print(f"claim and release: {_timed(lambda: _claim(held, str(next(numbers)))):.2f} ms")
        path = Path(name) / "units" / "one.json"
        text = files[0].read_text()
        print(f"publish: {_timed(lambda: (store.claims.tell(path, text), path.unlink())):.2f} ms")


def _claim(leases: Leases, name: str) -> None:
    leases._listed = float("-inf"), []  # otherwise one listing serves several claims
    assert leases.take(name)
    leases.release(name)


def _of_real_size(outcome: Outcome) -> Outcome:
    if outcome.measured is None:
        return outcome
    loss = outcome.loss
    tokens = torch.full((DOCUMENTS,), 127.0, dtype=torch.float64)
    each = Evaluation(torch.arange(DOCUMENTS), tokens, tokens * loss, tokens.floor())
    return replace(outcome, measured=Measured(each), general={"stdlib": General(each)}, where=this_host())


def _timed(call: Callable[[], object], times: int = _TIMES) -> float:
    """Return the median in ms."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * median(seconds)


if __name__ == "__main__":
    main()
