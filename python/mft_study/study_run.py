"""Run a study to its end: units as they become ready, then test. An interrupted study continues where it stopped."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mft.data.formats import PREFERENCE
from mft.data.sources import SPLITS, form_of, open_source
from mft.evaluation.evaluated_base import check_exact
from mft.rewards.questions import questions_of
from mft.rewards.train_rewards import check_installed
from mft_study.bases import Bases
from mft_study.config import REWARDS, StudyConfig
from mft_study.evidence.power import power_lines, shortage_lines
from mft_study.evidence.sums import document_hashes
from mft_study.outcome import Findings, Outcome, Tested, Unit
from mft_study.shared.alike import check_alike, check_processor
from mft_study.shared.leases import Pace
from mft_study.shared.on_ray import check_ray, start_on_ray
from mft_study.store import Store, check_place, claim_of_base, open_store
from mft_study.study_plan import (
    chosen_settings,
    chosen_units,
    notes,
    open_ends,
    parts_of,
    ready,
    sorted_outcomes,
    source_of,
    starts_of,
    teachers_of,
    units_declared,
    why_no_setting,
    work_left,
    work_of,
)
from mft_study.study_progress import Shown, show_progress
from mft_study.units.job import Job
from mft_study.workers import JobFailed, Result, Workers, job_words, start_workers
from mft_study.workspace import Workspace

LOCAL, RAY = "local", "ray"
ON = {LOCAL: start_workers, RAY: start_on_ray}  # where the workers run, by name
_SAME = 0.01  # nats per token: how far rounding may move the loss of a model that is read from its file again


def run_study(
    study: StudyConfig,
    directory: Path,
    *,
    console: Console,
    overwrite: bool = False,
    again: bool = False,
    joins: bool = False,
    same_processor: bool = False,
    on: str = LOCAL,
    pace: Pace | None = None,
    begin: Callable[[], object] = lambda: None,
    report: Callable[[Findings], None] = lambda findings: None,
) -> Findings:
    """Run the parts of the study that directory does not hold yet, and return all findings.

    Results depend neither on study.workers nor on interruptions.

    Args:
        again: Open the reserve even if this study has opened it before.
        joins: Work together with other processes that join, on any machine that shares the disk, all at one pace.
        same_processor: Refuse units that ran on another kind of processor.
        on: Where the workers run, a name in ON.
        begin: Called when model and data have been checked, just before anything is written.
        report: Called with the findings while directory is held, by one of the processes.
    Raises:
        RuntimeError: A unit failed, which the message names. What was done before is kept.
        ValueError: As open_store, or if another process of the study has other packages, weights or data.
    """
    check_exact(study.model, "compare")
    if on == RAY:
        check_ray()

    def say(words: str) -> None:
        console.print(words, style="dim", highlight=False, soft_wrap=True, markup=False)

    check_place(study, directory, overwrite=overwrite, joins=joins)
    for arm in study.arms.values():
        arm.check_installed()
    if study.objective == REWARDS:
        check_installed()
    _check_sources(study)
    bases = Bases(study, directory)
    workspace = _load_workspace(study, bases) if study.scratch is None else None
    begin()
    with open_store(study, directory, overwrite=overwrite, joins=joins, say=say, pace=pace) as store:
        if workspace is None:
            with show_progress(console) as shown:
                _make_base(bases, store, study.seeds[0], shown)
            workspace = _load_workspace(study, bases)
        check_alike(workspace, store.directory, store.claims)
        lines = [f"{domain}: {note}" for domain in study.domains for note in workspace.splits(domain).notes]
        for domain in study.questions:
            notes_of_train = [note for note in workspace.questions(domain).notes if not note.startswith(SPLITS[1:])]
            lines += [f"{domain}, questions: {note}" for note in notes_of_train]
        documents = {domain: len(set(workspace.splits(domain).test["document"])) for domain in study.domains}
        for line in shortage_lines(study, documents):
            console.print(line, style="bold", highlight=False, soft_wrap=True, markup=False)
        for line in [*lines, _units_words(study), *power_lines(study, documents, store.directory)]:
            say(line)
        with ON[on](study, bases, workspace) as workers, show_progress(console) as shown:
            run = _Run(study, store, workers, shown, bases, same_processor)
            try:
                run.train()
                openings, reserve = run.test(again=again)
            except KeyboardInterrupt:
                console.print(
                    f"interrupted: {len(run.outcomes)} units are kept in {directory}, the same command continues",
                    highlight=False,
                    soft_wrap=True,
                )
                raise
        found = _findings(study, run, lines, _hashes(study, workspace))
        found = dataclasses.replace(found, test_openings=openings, reserve_openings=reserve)
        store.clear_scratch()
        store.report_once(list(run.tested), run.chosen, lambda: report(found))
        return found


def _make_base(bases: Bases, store: Store, seed: int, shown: Shown) -> None:
    """Train the base model of a seed in one process; the others wait for it."""
    store.claims.call_once(
        claim_of_base(bases.path(seed)), lambda: bases.is_made(seed), lambda: bases.make(seed, shown.step)
    )


@dataclass(frozen=True)
class _Begun:
    """A running job, the name of the claim on it, and where its result goes, as chosen when the job began."""

    job: Job
    claim: str
    path: Path
    trained: Path
    at: float


class _Run:
    """One pass of the scheduler; outcomes and tested hold what is known, by unit."""

    def __init__(
        self, study: StudyConfig, store: Store, workers: Workers, shown: Shown, bases: Bases, same_processor: bool
    ) -> None:
        self.study, self.store, self.workers, self.shown, self.bases = study, store, workers, shown, bases
        self.claims, self._same_processor = store.claims, same_processor
        self.outcomes: dict[Unit, Outcome] = {}
        self.tested: dict[Unit, Tested] = {}
        self._running: dict[Unit, _Begun] = {}
        self._look()

    def train(self) -> None:
        """Run units until none is left."""
        while self._step(ready(self.study, self.outcomes.values())):
            pass

    def test(self, *, again: bool) -> tuple[int, list[str]]:
        """Evaluate the chosen units on test; return how many sets of models it has seen, and who opened the reserve."""
        units = chosen_units(self.study, self.outcomes.values())
        reserve = self.store.open_reserve(units, self.chosen, again=again)
        openings = self.store.open_test(units, self.chosen)
        self._look_at_tests(units)
        while self._step([unit for unit in units if unit not in self.tested], on_test=True):
            if self.claims.shares:
                self._look_at_tests(units)
        return openings, reserve

    def _look(self) -> None:
        """Read all outcomes found so far, and choose by them. _is_behind: another process has found more since."""
        known, self._is_behind = len(self.outcomes), False
        self.outcomes = {outcome.unit: outcome for outcome in self.store.outcomes()}
        if self._same_processor:
            check_processor(list(self.outcomes.values()))
        self.chosen = chosen_settings(self.study, self.outcomes.values())
        self.shown.count_kept(len(self.outcomes) - known)

    def _look_at_tests(self, units: list[Unit]) -> None:
        known = len(self.tested)
        for unit in units:
            tested = self.tested.get(unit) or self.store.tested(unit, self.chosen)
            if tested is not None:
                self.tested[unit] = tested
        if self._same_processor:
            check_processor(list(self.tested.values()))
        self.shown.count_kept(len(self.tested) - known)

    def _step(self, waiting: list[Unit], *, on_test: bool = False) -> bool:
        """Give units to idle workers and wait for one result, or for others; False if there is nothing to do."""
        for unit in waiting:
            self._submit(unit, on_test)
        if not self._running:
            if not waiting:
                return False
            if not self._is_behind:
                self.claims.wait()
            self._look()
            return True
        try:
            ended = self.workers.next(self.claims.look)
        except JobFailed as error:
            self._drop(error)
            self._look()
            return True
        if ended is None:
            self._look()
            return True
        job, result = ended
        begun = self._running.pop(job.unit)
        if isinstance(result, Tested):
            self._take_tested(result, begun)
        else:
            self._take_outcome(result, begun)
        self.claims.release(begun.claim)
        self.shown.set_left(*work_left(self.study, self.outcomes.values(), self.tested))
        work = work_of(self.study, job.unit, on_test=on_test)
        self.shown.count_finished(f"{job_words(job)}: {_result_words(result)}", time.perf_counter() - begun.at, work)
        return True

    def _drop(self, error: JobFailed) -> None:
        """Drop a failed job, to plan it again, if others deleted its files or took over its claim; otherwise raise."""
        begun = self._running.pop(error.job.unit)
        whole = self.claims.holds(begun.claim) and all(path.is_file() for path in begun.job.reads)
        if whole or not self.claims.shares:
            raise error
        self.claims.release(begun.claim)

    def _submit(self, unit: Unit, on_test: bool, *, lost: bool = False) -> None:
        """Give a unit to a worker, if one is idle and no other process has claimed the unit.

        Runs whose weights the unit lacks are repeated first. lost: only the unit's own weights are needed.
        """
        if len(self._running) == self.workers.count or unit in self._running:
            return
        job, needed = self._job(unit, on_test)
        if gone := [run for path, run in needed.items() if not path.is_file()]:
            for run in gone:
                self._submit(run, False, lost=True)
            return
        path = self.store.test_path(unit, self.chosen) if on_test else self.store.path(unit, self.chosen)
        result = job.trained if lost else path
        claim = f"test-{path.stem}" if on_test else path.stem
        if not self.claims.take(claim, result.is_file):
            if result.is_file():
                self._is_behind = True
                if not lost and not on_test:
                    self.store.check_outcome(unit, path)
            return
        _make_base(self.bases, self.store, unit.seed, self.shown)
        trained = job.trained
        if not on_test:
            job = dataclasses.replace(job, trained=self.claims.scratch_path(trained))
        self._running[unit] = _Begun(job, claim, path, trained, time.perf_counter())
        self.workers.submit(job)

    def _job(self, unit: Unit, on_test: bool) -> tuple[Job, dict[Path, Unit]]:
        """Return a unit's job, and the runs that it needs, by the files of their weights."""
        study, chosen = self.study, self.chosen
        starts, parts, source = starts_of(study, chosen, unit), parts_of(study, unit), source_of(study, chosen, unit)
        teachers = None if on_test else teachers_of(study, chosen, unit)
        own = [unit] if on_test and study.arms[unit.arm].leaves_weights else []
        needed = [*starts, *parts, *([] if source is None else [source]), *(teachers or []), *own]
        at = {run: self.store.trained_path(run, chosen) for run in (*needed, unit)}
        job = Job(
            unit,
            tuple(at[run] for run in starts),
            at[unit],
            tuple((run, at[run]) for run in parts),
            None if source is None else (source, at[source]),
            None if teachers is None else tuple(at[run] for run in teachers),
            on_test,
            tuple(at[run] for run in needed),
        )
        return job, {at[run]: run for run in needed}

    def _take_outcome(self, outcome: Outcome, begun: _Begun) -> None:
        self.store.tell_outcome(outcome, begun.path, begun.job.trained, begun.trained)
        known = len(self.outcomes.keys() | {outcome.unit})
        self.outcomes[outcome.unit] = outcome
        if self.claims.shares or any(outcome.unit.arm in self.study.needs(arm) for arm in self.study.arms):
            # The chosen run of this arm decides which outcomes of the arms after it still belong to the study.
            self.outcomes = {kept.unit: kept for kept in self.store.outcomes()}
            self.shown.count_kept(len(self.outcomes) - known)
        self.chosen = chosen_settings(self.study, self.outcomes.values())
        self.store.prune(self.outcomes.values(), self.chosen)

    def _take_tested(self, tested: Tested, begun: _Begun) -> None:
        before, now = self.outcomes[tested.unit].loss, tested.validation.evaluation.loss
        if not abs(now - before) < _SAME:
            raise RuntimeError(
                f"{tested.unit}: its file must give the validation loss that its run had, {before:.4f}, got {now:.4f}: "
                f"delete {begun.trained}, and it is trained again"
            )
        self.store.tell_tested(tested, begun.path)
        self.tested[tested.unit] = tested


def _check_sources(study: StudyConfig) -> None:
    """Raise ValueError unless all data, and questions for rewards, can be read, before a base is trained."""
    given = [("domains", domain, data) for domain, data in study.domains.items()]
    given += [("questions", domain, data) for domain, data in study.questions.items()]
    rewarded = given if study.objective == REWARDS else []
    if study.scratch is not None:
        for data in (study.scratch.data, *study.general.values(), *(data for *_, data in given)):
            open_source(data)
    for section, domain, data in rewarded:
        form = form_of(open_source(data).load()["train"]) if data.sources is None else None
        if form in ("text", PREFERENCE):
            what = "plain text" if form == "text" else "preference pairs"
            raise ValueError(
                f"{section}.{domain}.source must have questions with answers for objective: rewards, got {what} in "
                f"{data.source!r}: leave this domain out, as --config rewards does"
            )


def _load_workspace(study: StudyConfig, bases: Bases) -> Workspace:
    """Return the workspace with all data loaded. Raises: ValueError that says what is wrong with model or data."""
    workspace = Workspace(study, bases)
    for name in study.general:
        workspace.general(name)
    for domain in study.domains:
        workspace.splits(domain)
        questions = workspace.questions(domain).train
        if study.objective == REWARDS:
            questions_of(questions, workspace.tokenizer, study.rewards)
    return workspace


def _units_words(study: StudyConfig) -> str:
    """Return a line that says how many units the arms' grids have."""
    units = units_declared(study)
    each = f" in each of {len(study.domains)} domains" if len(study.domains) > 1 else ""
    return (
        f"units{each}: {sum(units.values())} ({', '.join(f'{arm} {count}' for arm, count in units.items())}), and at "
        f"most {study.extensions} more for an arm whose best lies at an end of its grid"
    )


def _result_words(result: Result) -> str:
    if isinstance(result, Tested):
        return "evaluated"
    if result.diverged is not None:
        return f"diverged ({result.diverged})"
    exact = None if result.measured is None else result.measured.exact
    return f"validation {result.loss:.4f}" + ("" if exact is None else f", {100 * exact:.1f} % exact")


def _hashes(study: StudyConfig, workspace: Workspace) -> dict[tuple[str, str, str], dict[int, int]]:
    """Return hashes of the documents of validation and test; see Findings.documents."""
    found = {}
    for domain in study.domains:
        texts = {domain: workspace.splits(domain)} | {
            text: workspace.general(text) for text in study.general_of(domain)
        }
        for text, splits in texts.items():
            for split in SPLITS[1:]:
                found[domain, split, text] = document_hashes(getattr(splits, split))
    return found


def _findings(
    study: StudyConfig,
    run: _Run,
    lines: list[str],
    documents: dict[tuple[str, str, str], dict[int, int]],
) -> Findings:
    outcomes = sorted_outcomes(study, run.outcomes.values())
    without = why_no_setting(study, outcomes)
    present = {domain: [arm for arm in study.arms if arm not in without[domain]] for domain in study.domains}
    tables: Any = [{domain: {arm: {} for arm in arms} for domain, arms in present.items()} for _ in range(3)]
    validation, test, general = tables
    for tested in run.tested.values():
        unit = tested.unit
        for seed in study.all_seeds if study.is_one_model(unit.arm) else [unit.seed]:
            validation[unit.domain][unit.arm][seed] = tested.validation
            test[unit.domain][unit.arm][seed] = tested.test
            general[unit.domain][unit.arm][seed] = tested.general
    said, ends = lines + notes(study, outcomes), open_ends(study, outcomes)
    found = Findings(study, outcomes, run.chosen, validation, test, said, general, ends, documents)
    return dataclasses.replace(found, without_result=without, tested=list(run.tested.values()))
