"""Workers in a Ray cluster, for machines that share no disk: jobs and files go out, results and weights come back.

Each worker is an actor, which keeps its workspace between jobs. Files that a job reads are put into Ray's object store
once, and fetched once per node into a folder that the node's actors share. If an actor dies, another one replaces it
and runs its job again.
"""

import contextlib
import dataclasses
import secrets
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mft.checks import install_command
from mft.files.atomic import write_whole
from mft_study.bases import Bases
from mft_study.config import StudyConfig
from mft_study.shared.alike import check_same, read_noted
from mft_study.store import ALIKE
from mft_study.units.job import Job
from mft_study.workers import TOLD, JobFailed, Result, Workers, result_of, run_job, values_of
from mft_study.workspace import Workspace

_TRIES = 3  # for a job whose actors die
_Files = dict[str, Any]  # references to contents in the object store, by path in the study's directory


def check_ray() -> None:
    """Raise ValueError if Ray is missing. It is called before anything is trained."""
    if find_spec("ray") is None:
        raise ValueError(f"--on ray must find the package ray, got none: {install_command('ray')}")


@contextlib.contextmanager
def start_on_ray(study: StudyConfig, bases: Bases, workspace: Workspace) -> Iterator[Workers]:
    """Start study.workers actors in the cluster of RAY_ADDRESS, or in a cluster that exists only in the block."""
    import ray

    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, include_dashboard=False)
    workers = _Actors(study, bases)
    try:
        yield workers
    finally:
        workers.close()
        if begun:
            ray.shutdown()


class _Actors:
    def __init__(self, study: StudyConfig, bases: Bases) -> None:
        import ray

        self._ray, self.count = ray, study.workers
        self._study, self._bases, self._directory = study, bases, bases.directory
        self._alike = read_noted(self._directory / ALIKE)
        self._folder = f"mft-study-{secrets.token_hex(4)}"  # of this command, on every node
        self._class = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        self._idle = [self._new() for _ in range(self.count)]
        self._jobs: dict[Any, tuple[Job, Any, int]] = {}  # by the reference to the result
        self._sent: _Files = {}

    def submit(self, job: Job) -> None:
        self._give(job, self._idle.pop(0), 1)

    def next(self, patience: float | None = None) -> tuple[Job, Result] | None:
        done, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=patience)
        if not done:
            return None
        job, actor, tries = self._jobs.pop(done[0])
        try:
            values, weights, error = self._ray.get(done[0])
        except self._ray.exceptions.RayActorError as lost:
            if tries == _TRIES:
                raise JobFailed(job, f"{tries} Ray actors that ran it died, the last with: {lost}") from lost
            self._give(job, self._new(), tries + 1)
            return None
        self._idle.append(actor)
        if error is not None:
            raise JobFailed(job, error)
        if weights is not None:
            write_whole(job.trained, weights.tobytes())
        return job, result_of(job, values)

    def close(self) -> None:
        for actor in [*self._idle, *(actor for _, actor, _ in self._jobs.values())]:
            self._ray.kill(actor)

    def _new(self) -> Any:
        return self._class.remote(self._study, str(self._directory), self._folder, self._alike)

    def _give(self, job: Job, actor: Any, tries: int) -> None:
        self._jobs[actor.run.remote(job, self._files_of(job))] = job, actor, tries

    def _files_of(self, job: Job) -> _Files:
        """Return references to the files that the job reads; each file is put into the object store once."""
        paths = list(job.reads)
        if self._study.scratch is not None:
            base = self._bases.path(job.unit.seed)
            first = self._bases.path(self._study.seeds[0])  # every workspace loads it first
            paths += [path for folder in {first, base} for path in folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(self._directory)) for path in paths]
        for name in names:
            if name not in self._sent:
                self._sent[name] = self._ray.put(np.fromfile(self._directory / name, np.uint8))
        return {name: self._sent[name] for name in names}


class _Actor:
    """A worker on a node. directory: the study's, where the command runs. folder: the folder of its files here."""

    def __init__(self, study: StudyConfig, directory: str, folder: str, alike: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._study, self._directory, self._alike = study, Path(directory), alike
        self._here = Path(tempfile.gettempdir()) / folder
        self._workspace: Workspace | None = None

    def run(self, job: Job, files: _Files) -> tuple[dict[str, Any] | None, Any, str | None]:
        """Run a job. Returns: (values of the result, trained weights if there are any, why it failed)."""
        import ray

        try:
            for name, reference in files.items():
                path = self._here / name
                if not path.is_file():
                    write_whole(path, ray.get(reference).tobytes())
            if self._workspace is None:
                self._workspace = Workspace(self._study, Bases(self._study, self._here))
                check_same(self._alike, self._workspace, "--on ray")
            local = job.with_paths(lambda path: self._here / path.relative_to(self._directory))
            own = local.trained.with_name(f"{local.trained.stem}-{secrets.token_hex(4)}.safetensors")
            result = run_job(self._workspace, local if job.on_test else dataclasses.replace(local, trained=own))
            weights = np.fromfile(own, np.uint8) if own.is_file() else None
            own.unlink(missing_ok=True)
            return values_of(result), weights, None
        except TOLD as error:
            return None, None, str(error)
