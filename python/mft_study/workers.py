"""Where a study's jobs run: in this process, or in several new processes, each with one thread.

With one thread, sums always run in one order, so a result depends neither on the number of workers nor on which worker
computed it. Two processes of one thread are also faster than one process of two.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from mft_study.bases import Bases
from mft_study.config import StudyConfig
from mft_study.evidence.host import this_host
from mft_study.outcome import Outcome, Tested, outcome_from, outcome_values, tested_from, tested_values
from mft_study.units.job import Job
from mft_study.units.unit_run import run_test, run_unit
from mft_study.workspace import Workspace

Result = Outcome | Tested
_PATIENCE = 10.0  # seconds that a process may take to end
TOLD = (ValueError, RuntimeError, OSError)  # reported as a message; anything else is a bug and shows its traceback


class Workers(Protocol):
    """Takes up to count jobs at a time."""

    count: int

    def submit(self, job: Job) -> None: ...

    def next(self, patience: float | None = None) -> tuple[Job, Result] | None:
        """Wait for a job to end, at most patience seconds; None if none did. Raises: JobFailed."""
        ...


class JobFailed(RuntimeError):
    """A job failed; the message names it."""

    def __init__(self, job: Job, why: object) -> None:
        super().__init__(f"{job_words(job)}: {why}")
        self.job = job


@contextlib.contextmanager
def start_workers(study: StudyConfig, bases: Bases, workspace: Workspace) -> Iterator[Workers]:
    """Start study.workers workers. A single one is this process, with workspace."""
    threads = torch.get_num_threads()
    if study.workers == 1:
        torch.set_num_threads(1)
        try:
            yield _Here(workspace)
        finally:
            torch.set_num_threads(threads)
        return
    processes = _Processes(study, bases)
    try:
        yield processes
    finally:
        processes.close()


def job_words(job: Job) -> str:
    """Return the job as a line to print."""
    return f"{job.unit}{', on test' if job.on_test else ''}"


class _Here:
    count = 1

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._jobs = workspace, list[Job]()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def next(self, patience: float | None = None) -> tuple[Job, Result]:
        job = self._jobs.pop(0)
        try:
            return job, run_job(self._workspace, job)
        except TOLD as error:
            raise JobFailed(job, error) from error


class _Processes:
    def __init__(self, study: StudyConfig, bases: Bases) -> None:
        self.count = study.workers
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, Any] = {}
        self._jobs: dict[Connection, Job] = {}
        for _ in range(study.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, study, bases), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies closes the pipe
            self._workers[ours] = process

    def submit(self, job: Job) -> None:
        connection = next(connection for connection in self._workers if connection not in self._jobs)
        self._jobs[connection] = job
        try:
            connection.send(job)
        except BrokenPipeError:
            raise self._ended(connection) from None

    def next(self, patience: float | None = None) -> tuple[Job, Result] | None:
        connection: Any = next(iter(wait(list(self._jobs), patience)), None)
        if connection is None:
            return None
        try:
            values, error = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended(connection) from None
        job = self._jobs.pop(connection)
        if error is not None:
            raise JobFailed(job, error)
        return job, result_of(job, values)

    def _ended(self, connection: Connection) -> JobFailed:
        process = self._workers[connection]
        process.join()
        return JobFailed(
            self._jobs[connection],
            f"its process ended with exit code {process.exitcode}; a traceback stands above, unless the system stopped "
            "it (-9: out of memory?): the same command continues, workers=1 needs less",
        )

    def close(self) -> None:
        for connection, process in self._workers.items():
            connection.close()
            process.terminate()
            process.join(_PATIENCE)
            process.kill()
            process.join()


def _serve(connection: Connection, study: StudyConfig, bases: Bases) -> None:
    """A worker process: jobs come in, plain values go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a clean exit frees libraries' semaphores
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    workspace: Workspace | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway; a SystemExit in some __del__ would print
            return
        try:
            workspace = workspace or Workspace(study, bases)
            result = run_job(workspace, job)
        except TOLD as error:
            connection.send((None, str(error)))
            continue
        connection.send((values_of(result), None))


def _end_with_parent() -> None:
    """End this worker with its parent: if the parent is killed, nobody else stops it before its unit is done."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def values_of(result: Result) -> dict[str, Any]:
    """Return a result as plain values, which go from process to process."""
    return tested_values(result) if isinstance(result, Tested) else outcome_values(result)


def result_of(job: Job, values: dict[str, Any]) -> Result:
    """Return a job's result from its values."""
    return tested_from(values) if job.on_test else outcome_from(values)


def run_job(workspace: Workspace, job: Job) -> Result:
    """Run a job in this process."""
    result: Result = run_test(workspace, job) if job.on_test else run_unit(workspace, job)
    result.where = this_host()
    return result
