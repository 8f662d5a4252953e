"""Where does `make demo` spend its time, and what does its table say?

The demo itself, each phase under the profiler. What the profiler needs to add its events up comes after the phase and
is not counted.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mft.demo import run_demo
from mft.recorder import Recorder
from mft.run_directory import TABLE_JSON

from .harness import Finding, Spread, report
from .step_profile import KINDS, REST, profiled

ASKED = ("products", "attention", "optimiser")  # the rest shall be at most TARGET of the time
TARGET = 0.05
BETWEEN = "between the phases: loading, merging, generating"


class ProfilingRecorder(Recorder):
    """Also adds up seconds by kind of work, of training and of evaluating."""

    def __init__(self, *recorded) -> None:
        super().__init__(*recorded)
        self.seconds = {work: dict.fromkeys((*KINDS, REST), 0.0) for work in ("training", "evaluating")}
        self.adding_up = 0.0  # seconds

    @contextlib.contextmanager
    def training(self, *phase) -> Iterator[Callable]:
        with self._profiled("training"), super().training(*phase) as on_step:
            yield on_step

    def evaluate(self, *phase, **options):
        with self._profiled("evaluating"):
            return super().evaluate(*phase, **options)

    @contextlib.contextmanager
    def _profiled(self, work: str) -> Iterator[None]:
        with profiled() as spent:
            yield
            begin = time.perf_counter()
        self.adding_up += time.perf_counter() - begin
        for kind, milliseconds in spent.items():
            self.seconds[work][kind] += milliseconds / 1e3


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
    total -= recorder.adding_up
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
