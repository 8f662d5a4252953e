"""Runs that report: what TensorBoard and trackio then contain, read with their own readers."""

import json
import os
import sys
import time

import pytest
from tiny_run import LEARN, assert_same_masks, events_of, in_a_fork, steps

from mft.tracking import metrics
from mft.tracking.trackers import Scalars, Trackers
from mft.training.checkpoint import write_checkpoint

pytest.importorskip("tensorboard")
pytest.importorskip("trackio")
LONG = [*LEARN, "train.steps=8", "train.lr=5e-2", "mask.keep_ratio=0.8"]  # its fourth step is the best
EVALUATED = [*LONG, "train.betas=[0.9,0.999]", "train.eval_every=2", "train.keep_best=true"]
BOTH = "report_to=tensorboard,trackio"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Set trackio's directory, which it reads from the environment once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield


def in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    return {key: [(point.step, point.value) for point in read.Scalars(key)] for key in read.Tags()["scalars"]}


def in_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((run / "trackers.json").read_text())["run"]
    found = {}
    for row in SQLiteStorage.get_logs("mft", name):
        for key, value in row.items():
            if "/" in key:
                found.setdefault(key, []).append((row["step"], value))
    return found


def expected(run):
    """Return {scalar: [(step, value), ...]} of the record."""
    events, found = events_of(run), {}
    for event in events:
        if event["phase"] in ("before, validation", "validation"):
            names = {"validation/loss": "loss", "validation/accuracy": "accuracy"}
        else:
            names = {
                "mask fine-tune": {"train/loss": "loss", "train/lr": "lr"},
                "flips": {"mask/flips_from_start": "from_start", "mask/flips_a_step": "a_step"},
            }.get(event["phase"], {})
        for key, name in names.items():
            found.setdefault(key, []).append((event["step"], event[name]))
    return found


def reported(run):
    return [in_tensorboard(run), in_trackio(run)]


def die_before_the_checkpoint_of_step_6(cli, *settings, wait=lambda: None):
    """Step 6 and its evaluation are reported before."""

    def write(root, step, *arguments, **options):
        if step == 6 and root.name == "checkpoints":
            wait()
            os._exit(9)
        return write_checkpoint(root, step, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mft.training.saver.write_checkpoint", write)
        assert in_a_fork(lambda: cli("train", *settings, "checkpoint_minutes=0")[0]) == 9


def test_a_killed_run_goes_on_in_the_same_runs_with_every_step_once(cli, tmp_path):
    output = cli.done("train", *EVALUATED, "checkpoint_minutes=0", "output_dir=straight")

    def wait():
        while in_trackio(tmp_path / "run").get("train/loss", [(0, 0)])[-1][0] < 6:
            time.sleep(0.1)  # trackio writes twice a second

    die_before_the_checkpoint_of_step_6(cli, *EVALUATED, BOTH, wait=wait)
    run, wanted = tmp_path / "run", expected(tmp_path / "straight")
    # TensorBoard reads files in order of their names, in which the second precedes the process's number.
    (killed,) = (run / "tensorboard").iterdir()
    while time.time() < int(killed.name.split(".")[3]) + 1:
        time.sleep(0.05)
    for found in reported(run):
        assert found["train/loss"][-1][0] == 6
    output = cli.done("train", "--resume", "run")
    assert "trackio show" in output
    for found in reported(run):
        assert found.pop("train/tokens_per_second")[-1][0] == 8
        assert found.keys() == wanted.keys()
        for key, points in wanted.items():
            assert [step for step, _ in found[key]] == [step for step, _ in points], key
            assert [value for _, value in found[key]] == pytest.approx([value for _, value in points]), key
    assert steps(run) == steps(tmp_path / "straight")
    assert_same_masks(run, tmp_path / "straight")
    tables = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("run", "straight")]
    assert tables[0] == tables[1]
    assert (tables[0]["step"] < 6, tables[0]["steps"]) == (True, 8)


def test_what_is_exported_is_the_best_and_said_to_be(cli, tmp_path):
    output = cli.done("train", *EVALUATED, "memory=resident")
    table, events = json.loads((tmp_path / "run" / "table.json").read_text()), events_of(tmp_path / "run")
    losses = {event["step"]: event["loss"] for event in events if event["phase"] == "validation"}
    best = min(losses, key=losses.get)
    assert table["step"] == best < 8
    assert table["after"]["loss"] == losses[best]
    assert f"the best step is {best} of 8, with a validation loss of " in output
    assert f"after step {best}, the best of 8" in (tmp_path / "run" / "table.md").read_text()
    assert not (tmp_path / "run" / "best").exists()


def test_where_the_last_step_is_the_best_nothing_changes(cli, tmp_path):
    few = [*LEARN, "train.steps=8", "mask.keep_ratio=0.8"]
    output = cli.done("train", *few, "train.eval_every=4", "train.keep_best=true")
    assert "the best step is 8 of 8" in output
    cli("train", *few, "output_dir=plain")
    for name in ("table.md", "table.json", "masks/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_fine_tune_stops_early_as_a_finished_run_and_exports_its_best(cli, tmp_path):
    stop = ["train.eval_every=1", "train.keep_best=true", "train.patience=2", "train.min_delta=9", "train.log_every=5"]
    output = cli.done("finetune", *LEARN, "train.steps=8", "train.lr=1", *stop)
    assert "stopped early after step 3 of 8: 2 evaluations without a loss below" in output
    run = tmp_path / "run"
    assert [event["step"] for event in events_of(run) if event["phase"] == "full fine-tune"] == [3]
    assert "(stopped early, of 8)" in (run / "table.md").read_text()
    table = json.loads((run / "table.json").read_text())
    losses = [event["loss"] for event in events_of(run) if event["phase"] == "validation"]
    assert table["after"]["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert (table["step"], table["steps"], table["of"]) == (losses.index(min(losses)) + 1, 3, 8)
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "model", "plot.png", "table.json", "table.md")
    }


def test_a_tracker_that_fails_is_given_up_and_the_run_is_not(cli, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    add_scalar = SummaryWriter.add_scalar

    def fail(self, key, value, global_step):
        if global_step == 3:
            raise OSError("No space left on device")
        add_scalar(self, key, value, global_step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    output = cli.done("train", *LEARN, BOTH)
    error = "OSError: No space left on device"
    words = f"report_to: tensorboard has failed and receives nothing more ({error}); the run goes on"
    assert output.count(words) == 1
    assert [step for step, _ in in_tensorboard(tmp_path / "run")["train/loss"]] == [1, 2]
    assert [step for step, _ in in_trackio(tmp_path / "run")["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in in_trackio(tmp_path / "run")["validation/loss"]] == [0, 4]
    assert (tmp_path / "run" / "masks").is_dir()


def test_a_tracker_that_cannot_begin_ends_the_run_before_it_trains(cli, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-store://host")
    output = cli.refused("train", *LEARN, "report_to=mlflow")
    assert "report_to: mlflow could not begin (UnsupportedModelRegistryStoreURIException: " in output


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow", "wandb"])
def test_a_missing_package_is_told_before_anything_is_written(cli, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    output = cli.refused("train", *LEARN, f"report_to={name}")
    assert f"report_to must name trackers that are installed, got {name}, whose package is missing: pip" in output
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = {"train.lr": 1e-2, "mask.threshold": None, "mask.mode": "value", "train.betas": (0.9, 0.99)}
    Trackers(["tensorboard"], tmp_path, "mft", config, None, lambda line: None).close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (values["train.lr"].number_value, values["mask.mode"].string_value) == (1e-2, "value")
    assert (values["mask.threshold"].string_value, values["train.betas"].string_value) == ("None", "(0.9, 0.99)")


def test_the_share_dropped_is_a_scalar_where_it_is_known():
    step = {"step": 1, "loss": 2.0, "lr": 1e-3, "tokens": 8, "seconds": 0.0}
    assert Scalars()(step | {"dropped": 0.25}) == (1, {"train/loss": 2.0, "train/lr": 1e-3, "mask/dropped": 0.25})
    assert Scalars()(step) == (1, {"train/loss": 2.0, "train/lr": 1e-3})


def test_speed_is_that_of_training_between_the_steps_that_are_written():
    scalars = Scalars()
    step = {"phase": "mask fine-tune", "loss": 2.0, "lr": 1e-3, "tokens": 100}
    assert scalars(step | {"step": 5, "seconds": 10.0})[1]["train/tokens_per_second"] == 50
    assert scalars(step | {"step": 10, "seconds": 15.0})[1]["train/tokens_per_second"] == 100
    evaluation = {"phase": "validation", "loss": 1.0, "accuracy": 0.5}
    assert scalars(evaluation | {"step": 10})[0] == 10
    assert scalars(evaluation | {"step": 4}) is None  # the best step, evaluated again when it is exported
    assert scalars(evaluation | {"step": 12, "dpo/margin": 0.3})[1]["validation/dpo/margin"] == 0.3


def test_a_run_that_goes_on_shows_the_objectives_losses_of_before():
    before = {"phase": "validation", "step": 2, "loss": 4.0, "accuracy": 0.5, "dpo/loss": 0.6, "dpo/accuracy": 0.7}
    plain = {"phase": "validation", "step": 2, "loss": 4.0, "accuracy": 0.5}
    assert metrics.Recorder(events=[before]).validation == {2: 0.6}
    assert metrics.Recorder(events=[plain]).validation == {2: 4.0}


@pytest.mark.slow
def test_wandb_takes_a_run_offline(cli, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = cli.done("train", *LEARN, "report_to=wandb")
    assert "has failed" not in output
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    for word in (b"train/loss", b"validation/accuracy", b"mask.keep_ratio"):
        assert word in content


def in_mlflow(name):
    """Return {metric: [(step, value)]} of the only run, and its parameters."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    points = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: [(p.step, p.value) for p in found] for key, found in points.items()}, run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # mlflow's, about its own files
def test_mlflow_takes_a_run_and_what_it_lacks_once_that_goes_on(cli, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    die_before_the_checkpoint_of_step_6(cli, *LONG, "train.eval_every=2", "report_to=mlflow", "project=p")
    assert in_mlflow("p")[0]["train/loss"][-1][0] == 6
    output = cli.done("train", "--resume", "run")
    assert "mlflow: experiment p, run run-" in output
    assert "has failed" not in output
    found, run = in_mlflow("p")
    for key, points in expected(tmp_path / "run").items():
        assert found[key] == [(step, pytest.approx(value)) for step, value in points], key
    assert run.data.params["mask.keep_ratio"] == "0.8"
    assert run.info.status == "FINISHED"
