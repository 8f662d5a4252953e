"""Where does `make demo` spend its time, and what does its table say?

The demo itself, with every sixth training step and every sixth batch evaluated under the profiler; their shares stand
for all of their phase. What the profiler needs to start, stop and add up is not counted.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from mft.demo.run import run_demo
from mft.training.metrics import Recorder
from mft.training.run_directory import TABLE_JSON

from .harness import Finding, Spread, report
from .step_profile import KINDS, REST, time_by_kind

ASKED = ("products", "attention", "optimiser")  # the rest shall be at most TARGET of the time
TARGET = 0.05
EVERY = 6
BETWEEN = "between the phases: loading, merging, generating"


class ProfilingRecorder(Recorder):
    """Also adds up seconds by kind of work, of training and of evaluating."""

    def __init__(self, *recorded) -> None:
        super().__init__(*recorded)
        self.seconds = {work: dict.fromkeys((*KINDS, REST), 0.0) for work in ("training", "evaluating")}
        self.profiling = 0.0  # seconds

    @contextlib.contextmanager
    def shown(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        seen = _Phase()
        with super().shown(name, total) as advance:

            def step(*done, **details) -> None:
                advance(*done, **details)
                seen.step()

            yield step
        self.profiling += seen.profiling
        for kind, share in seen.shares().items():
            self.seconds["training" if name in self.curves else "evaluating"][kind] += share * seen.working


class _Phase:
    """Every sixth step of a phase, profiled."""

    def __init__(self) -> None:
        self.working = self.profiling = 0.0  # seconds: of all steps, and of what comes between them
        self._spent = dict.fromkeys((*KINDS, REST), 0.0)  # milliseconds of the steps that were profiled
        self._steps = 0
        self._profiler: profile | None = None  # while it runs
        self._began = time.perf_counter()

    def step(self) -> None:
        """One is done."""
        ended = time.perf_counter()
        took = ended - self._began
        self._steps += 1
        self.working += took
        if self._profiler is not None:
            self._profiler.stop()
            for kind, spent in time_by_kind(self._profiler, took * 1e3).items():
                self._spent[kind] += spent
            self._profiler = None
        elif self._steps % EVERY == EVERY - 1:
            self._profiler = profile(activities=[ProfilerActivity.CPU])
            self._profiler.start()
        self._began = time.perf_counter()
        self.profiling += self._began - ended

    def shares(self) -> dict[str, float]:
        """By kind, of the steps that were profiled; the last call. Raises ValueError if there was none."""
        if self._profiler is not None:
            self._profiler.stop()
        total = sum(self._spent.values())
        if not total:
            raise ValueError(f"a phase must have {EVERY} steps or more to be profiled, got {self._steps}")
        return {kind: spent / total for kind, spent in self._spent.items()}


def main() -> None:
    """Print and store the answer."""
    recorders: list[ProfilingRecorder] = []

    def recorder_of(*recorded) -> ProfilingRecorder:
        recorders.append(ProfilingRecorder(*recorded))
        return recorders[-1]

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        run_demo(Path(folder) / "demo", recorder_of=recorder_of)
        total = time.perf_counter() - begin
        table = json.loads((Path(folder) / "demo" / TABLE_JSON).read_text())
    (recorder,) = recorders
    total -= recorder.profiling
    spent = {f"{work}: {kind}": s for work, kinds in recorder.seconds.items() for kind, s in kinds.items() if s}
    spent[BETWEEN] = total - sum(spent.values())
    asked = sum(kinds[kind] for kinds in recorder.seconds.values() for kind in ASKED)
    report(
        "demo",
        "make demo: where its time goes",
        [
            Finding("the demo", Spread.of([total]), "s"),
            *(Finding(what, Spread.of([100 * seconds / total]), "%") for what, seconds in spent.items()),
            Finding(
                f"outside {', '.join(ASKED)}", Spread.of([100 * (1 - asked / total)]), "%", "at most", 100 * TARGET
            ),
        ],
        table=table,
    )
