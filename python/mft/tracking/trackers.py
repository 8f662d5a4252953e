"""Report a run to TensorBoard, trackio, MLflow or Weights & Biases, in addition to metrics.jsonl, by their own writers.

    an event of metrics.jsonl              scalars, at its step
    a training step                        train/loss, train/lr, train/tokens_per_second, and mask/dropped if masks
                                           have a threshold
    an evaluation on validation            validation/loss, validation/accuracy, and what an objective measures, such
                                           as validation/dpo/margin
    a count of flips                       mask/flips_from_start, mask/flips_a_step

The run's configuration is reported first. For a resumed run, a tracker keeps what it has from before the checkpoint.
Events before the checkpoint that it lacks are sent again, and no step is reported twice. Only metrics.jsonl is the
complete record: if a tracker fails during training, it is dropped and the run continues.
"""

import contextlib
import functools
import importlib.util
import io
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mft.checks import install_command
from mft.files.atomic import write_whole
from mft.files.json_file import read_object

TENSORBOARD, WANDB, IDENTITY = "tensorboard", "wandb", "trackers.json"  # in the directory of a run
_MOST_IDENTITY = 1 << 12  # bytes
_MLFLOW_TAG, _MLFLOW_AT_ONCE = "mft_run", 100  # _MLFLOW_AT_ONCE: most parameters in one call
_WORDS = {
    "tensorboard": "tensorboard --logdir {directory}",
    "trackio": 'trackio show --project "{project}", run {run}',
    "mlflow": "experiment {project}, run {run}",
    "wandb": "project {project}, run {run}",
}
_INSTALL = {name: f"pip install {name}" for name in ("mlflow", "wandb")}  # the extra does not bring these


class Tracker(Protocol):
    """A tracker that has started."""

    def has(self, step: int, key: str) -> bool:
        """Return whether an earlier process has reported this scalar for this step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Iterable[str]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"report_to must name trackers that are installed, got {name}, whose package is missing: "
                f"{_INSTALL.get(name, install_command('trackers'))}, or leave it out"
            )


class Trackers:
    """The trackers of a run. They start when this object is made, and end with close().

    Args:
        directory: the run's directory. project, config: see RunConfig; config is {"section.key": value}.
        events: the events in metrics.jsonl so far; None for a new run.
        say: prints a line.
    Raises: RuntimeError that names the tracker that cannot start.
    """

    def __init__(
        self,
        names: Iterable[str],
        directory: Path,
        project: str,
        config: Mapping[str, Any],
        events: list[dict[str, Any]] | None,
        say: Callable[[str], None],
    ) -> None:
        self._say, self._scalars = say, Scalars()
        self._running: dict[str, Tracker] = {}
        names = list(names)
        run = _identity(directory) if names else ""
        for name in names:
            try:
                self._running[name] = _START[name](directory, project, run, config, events)
            except Exception as error:  # whatever a tracker's package raises
                self.close()
                raise RuntimeError(
                    f"report_to: {name} could not begin ({_first_line(error)}): fix that, or leave it out of report_to"
                ) from error
            say(f"{name}: {_WORDS[name].format(directory=directory / TENSORBOARD, project=project, run=run)}")
        for event in events or ():
            self.tell(event)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Report an event of metrics.jsonl to all trackers."""
        found = self._scalars(event)
        if found is not None:
            step, scalars = found
            for name, tracker in list(self._running.items()):
                new = {key: value for key, value in scalars.items() if not tracker.has(step, key)}
                if new:
                    self._guarded(name, functools.partial(tracker.log, step, new))

    def close(self) -> None:
        for name, tracker in list(self._running.items()):
            self._guarded(name, tracker.close)
        self._running = {}

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - no error of a tracker is worth hours of training
            del self._running[name]
            self._say(
                f"report_to: {name} has failed and receives nothing more ({_first_line(error)}); the run goes on, "
                "and metrics.jsonl has everything"
            )


class Scalars:
    """Maps each event of metrics.jsonl to (step, the scalars to report), or to None if nothing is reported."""

    def __init__(self) -> None:
        self._step, self._seconds = 0, 0.0  # of the previous training step
        self._validated = -1  # the step of the latest evaluation

    def __call__(self, event: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
        step = event.get("step")
        if step is None:
            return None
        if "lr" in event:
            # Every step has the same number of tokens; with train.log_every, some steps are missing.
            tokens, seconds = event["tokens"] * (step - self._step), event["seconds"] - self._seconds
            self._step, self._seconds = step, event["seconds"]
            speed = {"train/tokens_per_second": tokens / seconds} if seconds > 0 else {}
            dropped = {"mask/dropped": event["dropped"]} if "dropped" in event else {}
            return step, {"train/loss": event["loss"], "train/lr": event["lr"]} | speed | dropped
        if "accuracy" in event:
            if step <= self._validated:  # the exported step was evaluated during training
                return None
            self._validated = step
            measured = {f"validation/{key}": value for key, value in event.items() if "/" in key}
            return step, {"validation/loss": event["loss"], "validation/accuracy": event["accuracy"]} | measured
        if "from_start" in event:
            return step, {"mask/flips_from_start": event["from_start"], "mask/flips_a_step": event["a_step"]}
        return None


def _identity(directory: Path) -> str:
    """Return the run's name in trackers that hold many runs. It is made once and kept in the run's directory."""
    path = directory / IDENTITY
    if not path.exists():
        name = f"{directory.absolute().name}-{secrets.token_hex(3)}"
        write_whole(path, json.dumps({"run": name}) + "\n")
    return str(read_object(path, _MOST_IDENTITY)["run"])


def _first_line(error: Exception) -> str:
    words = str(error).strip()
    return f"{type(error).__name__}: {words.splitlines()[0]}" if words else type(error).__name__


# ---------------------------------------------------------------------------------------------- one by one


class _TensorBoard:
    def __init__(self, directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        place, last = directory / TENSORBOARD, max((event.get("step", 0) for event in events or ()), default=-1)
        self._told: set[tuple[int, str]] = set()
        if is_known := place.is_dir() and any(place.iterdir()):
            read = EventAccumulator(str(place), {"scalars": 0}).Reload()
            for key in read.Tags()["scalars"]:
                self._told |= {(point.step, key) for point in read.Scalars(key) if point.step <= last}
        # For a resumed run, this hides what was reported after its checkpoint.
        self._writer: Any = SummaryWriter(str(place), purge_step=last + 1 if is_known else None)
        if not self._told:
            values = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
            for summary in hparams(values, {"validation/loss": 0}):
                self._writer._get_file_writer().add_summary(summary)  # add_hparams writes a run of its own
            table = "\n".join(f"| {key} | {value} |" for key, value in values.items())
            self._writer.add_text("configuration", f"| key | value |\n|---|---|\n{table}", 0)

    def has(self, step: int, key: str) -> bool:
        return (step, key) in self._told

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()  # so that a killed process has saved what it reported

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        # If the logs are on a Space, this finds nothing, and steps after the checkpoint may appear twice.
        told = SQLiteStorage.get_logs(project, run) if events is not None else []
        self._told, self._trackio = {(row["step"], key) for row in told for key in row}, trackio
        with _unheard():
            self._run = trackio.init(
                project=project, name=run, config=dict(config), resume="allow", embed=False, auto_log_cpu=False
            )

    def has(self, step: int, key: str) -> bool:
        return (step, key) in self._told

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        with _unheard():
            self._trackio.finish()  # self._run.finish() would be called again when the process ends


class _Mlflow:
    """Reports to MLFLOW_TRACKING_URI: a server, or a database that mlflow opens itself."""

    def __init__(self, directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(project)
        experiment = self._client.create_experiment(project) if known is None else known.experiment_id
        found = self._client.search_runs([experiment], f"tags.{_MLFLOW_TAG} = '{run}'")
        is_new = not found
        begun = self._client.create_run(experiment, tags={_MLFLOW_TAG: run}, run_name=run) if is_new else found[0]
        self._run, self._told = begun.info.run_id, dict[str, set[int]]()
        params = [Param(key, str(value)) for key, value in config.items()] if is_new else []
        for first in range(0, len(params), _MLFLOW_AT_ONCE):
            self._client.log_batch(self._run, params=params[first : first + _MLFLOW_AT_ONCE])

    def has(self, step: int, key: str) -> bool:
        if key not in self._told:
            self._told[key] = {point.step for point in self._client.get_metric_history(self._run, key)}
        return step in self._told[key]

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(key, value, now, step) for key, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb:
    def __init__(self, directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        self._run = wandb.init(
            project=project,
            name=run,
            id=run,
            dir=str(directory),
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._next = self._run.starting_step if events is not None else 0

    def has(self, step: int, key: str) -> bool:
        return step < self._next

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


_START: dict[str, Callable[..., Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
    "wandb": _Wandb,
}


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Hide what is printed in the block."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
