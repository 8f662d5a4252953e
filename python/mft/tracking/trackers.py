"""Report a run to TensorBoard, trackio, MLflow or Weights & Biases by accelerate's trackers, besides metrics.jsonl.

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
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from mft.checks import install_command
from mft.files.atomic import write_whole
from mft.files.json_file import read_object

TENSORBOARD, WANDB, IDENTITY = "tensorboard", "wandb", "trackers.json"  # in the directory of a run
_MOST_IDENTITY = 1 << 12  # bytes
_WORDS = {
    "tensorboard": "tensorboard --logdir {directory}",
    "trackio": 'trackio show --project "{project}", run {run}',
    "mlflow": "experiment {project}, run {run}",
    "wandb": "project {project}, run {run}",
}
_INSTALL = {name: f"pip install {name}" for name in ("mlflow", "wandb")}  # the extra does not bring these


# A tracker that has started, and a function that returns whether an earlier process has reported a scalar for a step.
Started = tuple[GeneralTracker, Callable[[int, str], bool]]


def check_trackers(names: Iterable[str]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"report_to must name trackers that are installed, got {name}, whose package is missing: "
                f"{_INSTALL.get(name, install_command('trackers'))}, or leave it out"
            )


class Trackers:
    """The trackers of a run, from construction to close().

    config: {"section.key": value}. events: those in metrics.jsonl so far; None for a new run. say: prints a line.
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
        self._running: dict[str, Started] = {}
        names = list(names)
        run = _identity(directory) if names else ""
        if names:  # accelerate's trackers need its state; cpu: it does not look at the GPUs, unless torchrun started us
            PartialState(cpu="LOCAL_RANK" not in os.environ)
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
            for name, (tracker, has) in list(self._running.items()):
                new = {key: value for key, value in scalars.items() if not has(step, key)}
                if new:
                    self._guard(name, functools.partial(tracker.log, new, step))

    def close(self) -> None:
        for name, (tracker, _) in list(self._running.items()):
            self._guard(name, tracker.finish)
        self._running = {}

    def _guard(self, name: str, call: Callable[[], None]) -> None:
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


def _start_tensorboard(directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> Started:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard.summary import hparams

    place, last = directory / TENSORBOARD, max((event.get("step", 0) for event in events or ()), default=-1)
    told: set[tuple[int, str]] = set()
    if is_known := place.is_dir() and any(place.iterdir()):
        read = EventAccumulator(str(place), {"scalars": 0}).Reload()
        for key in read.Tags()["scalars"]:
            told |= {(point.step, key) for point in read.Scalars(key) if point.step <= last}
    # For a resumed run, purge_step hides what was reported after its checkpoint.
    tracker = TensorBoardTracker(TENSORBOARD, directory, purge_step=last + 1 if is_known else None)
    tracker.start()
    if not told:
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
        for summary in hparams(values, {"validation/loss": 0}):
            tracker.writer.file_writer.add_summary(summary)  # store_init_configuration writes a run of its own
        table = "\n".join(f"| {key} | {value} |" for key, value in values.items())
        tracker.log({"configuration": f"| key | value |\n|---|---|\n{table}"}, step=0)
    return tracker, lambda step, key: (step, key) in told


class _Trackio(TrackioTracker):
    def start(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().start()

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # self.run.finish() would be called again when the process ends


def _start_trackio(directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> Started:
    from trackio.sqlite_storage import SQLiteStorage

    # If the logs are on a Space, this finds nothing, and steps after the checkpoint may appear twice.
    rows = SQLiteStorage.get_logs(project, run) if events is not None else []
    told = {(row["step"], key) for row in rows for key in row}
    options: dict[str, Any] = {"config": dict(config), "resume": "allow", "embed": False, "auto_log_cpu": False}
    tracker = _Trackio(project, name=run, **options)
    tracker.start()
    return tracker, lambda step, key: (step, key) in told


def _start_mlflow(directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> Started:
    """Report to MLFLOW_TRACKING_URI: a server, or a database that mlflow opens itself."""
    from mlflow import MlflowClient

    client, told = MlflowClient(), set[tuple[int, str]]()
    known = client.get_experiment_by_name(project)
    found = client.search_runs([known.experiment_id], f"attributes.run_name = '{run}'") if known else []
    for key in found[0].data.metrics if found else ():
        told |= {(point.step, key) for point in client.get_metric_history(found[0].info.run_id, key)}
    tracker = MLflowTracker(run_name=run)
    # Set here, because MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_ID would precede the arguments and split a resumed run.
    tracker.experiment_name, tracker.run_id = project, found[0].info.run_id if found else None
    tracker.start()
    if not found:
        tracker.store_init_configuration(dict(config))
    return tracker, lambda step, key: (step, key) in told


def _start_wandb(directory: Path, project: str, run: str, config: Mapping[str, Any], events: Any) -> Started:
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    settings = wandb.Settings(silent=True, console="off")
    options = {"name": run, "id": run, "dir": str(directory), "config": dict(config), "resume": "allow"}
    tracker = WandBTracker(project, settings=settings, **options)
    tracker.start()
    following = tracker.run.starting_step if events is not None else 0
    return tracker, lambda step, key: step < following


_START: dict[str, Callable[..., Started]] = {
    "tensorboard": _start_tensorboard,
    "trackio": _start_trackio,
    "mlflow": _start_mlflow,
    "wandb": _start_wandb,
}
