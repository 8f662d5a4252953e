"""mft train and mft finetune, stopped and resumed: after signals and kills, and with arguments that must be refused."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import equal
from tiny_run import (
    LEARN,
    Forked,
    assert_same_masks,
    events_of,
    in_a_fork,
    killed_after,
    killed_before,
    steps,
    wait_for_checkpoint,
)

from mft.training.flips import PHASE
from mft.training.run_lock import hold

SLOW = [*LEARN, "train.steps=16", "checkpoint_minutes=0", "mask.keep_ratio=0.8"]


def start(verb, *arguments):
    """Start a process of its own, in the current directory."""
    options = [] if "--resume" in arguments else ["--config", "config.yaml"]
    command = [sys.executable, "-m", "mft", verb, *options, *arguments]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the last bits depend on it
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | threads
    )


def finish(process, code):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "own"), [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)], ids=["SIGTERM", "SIGINT"]
)
def test_a_run_told_to_stop_saves_and_goes_on(cli, tmp_path, number, code, own):
    cli("train", *SLOW, "output_dir=straight", "checkpoint_minutes=null")
    process = start("train", *SLOW) if own else Forked(cli, "train", *SLOW)
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(number)
    output = finish(process, code)
    step = int(re.search(r"stopped by SIG\w+ after step (\d+) of 16; saved: ", output).group(1))
    assert "go on with mft train --resume run" in output
    output = cli.done("train", "--resume", "run")
    assert f"goes on after step {step}" in output
    assert steps(tmp_path / "run") == steps(tmp_path / "straight")
    assert_same_masks(tmp_path / "run", tmp_path / "straight")
    assert sorted(os.listdir(tmp_path / "run")) == sorted([*os.listdir(tmp_path / "straight")])
    assert (tmp_path / "run" / "table.json").read_text() == (tmp_path / "straight" / "table.json").read_text()


@pytest.mark.slow
def test_a_run_whose_terminal_closes_saves_and_goes_on(cli, tmp_path):
    """Nothing can be written to a closed terminal, so neither the bar nor a line may end the run."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "mft", "train", "--config", "config.yaml", *SLOW])
    while not list(tmp_path.glob("run/checkpoints/step-*/manifest.json")):
        os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    output = cli.done("train", "--resume", "run")
    assert re.search(r"goes on after step \d+", output)


@pytest.mark.parametrize(
    "way",
    [
        "plain",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("in_place", "resident", "quantized", "layerwise")),
    ],
)
def test_the_metrics_of_a_run_that_goes_on_are_those_of_a_straight_one(cli, tmp_path, monkeypatch, way):
    """Flips included: every third step counts from the one that counted before, which is before the checkpoint."""
    monkeypatch.setattr("mft.training.training_run.POINTS", 4)
    few = [*LEARN, "train.steps=10", f"memory={way}", "mask.init=magnitude", "checkpoint_minutes=0"]
    cli.done("train", *few, "output_dir=straight")
    killed_after(cli, 6, "train", *few)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    cli.done("train", "--resume", "run", "--config", "run/config.yaml")
    events = events_of(tmp_path / "run", timed=False)
    assert events == events_of(tmp_path / "straight", timed=False)
    assert [event["step"] for event in events if event["phase"] == PHASE] == ([3, 6, 9, 10] if way == "plain" else [])


def test_a_killed_fine_tune_goes_on(cli, tmp_path):
    few = [*LEARN, "train.steps=16", "checkpoint_minutes=0"]
    cli("finetune", *few, "output_dir=straight")
    process = Forked(cli, "finetune", *few)
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    output = cli.refused("train", "--resume", "run")
    assert "got run, a run of mft finetune: mft finetune --resume run" in " ".join(output.split())
    output = cli.done("finetune", "--resume", "run")
    assert steps(tmp_path / "run", "full fine-tune") == steps(tmp_path / "straight", "full fine-tune")
    assert equal(*(load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "straight")))


@pytest.fixture
def stopped(cli, tmp_path):
    """Return a run that died at its third step, after a checkpoint."""
    killed_after(cli, 3, "train", *SLOW)
    return tmp_path / "run"


def test_what_has_changed_is_refused_unless_forced(stopped, cli, tmp_path):
    output = cli.refused("train", *SLOW)
    assert "already holds a run" in output
    assert "go on with --resume run" in output
    output = cli.refused("train", "--resume", "run", "train.lr=2e-2", "mask.seed=1")
    assert "mask.seed was 0, now 1; train.lr was 0.01, now 0.02" in output
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace('"text": "1 ', '"text": "2 '))
    output = cli.refused("train", "--resume", "run")
    assert re.search(r"must be of this very run, but data was \w+, now \w+: undo the change, or pass --force", output)
    output = cli.done("train", "--resume", "run", "--force", "train.lr=2e-2")
    assert "goes on after step" in output


def test_without_a_checkpoint_that_verifies_nothing_is_begun(stopped, cli):
    (checkpoint,) = (stopped / "checkpoints").glob("step-*")
    state = checkpoint / "state.json"
    state.write_bytes(state.read_bytes()[:-3])
    output = cli.refused("train", "--resume", "run")
    assert re.search(
        r"state.json: expected bytes \d+, got \d+: restore .*; no other checkpoint verifies: --overwrite starts", output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "--resume must name the output_dir of a run, nowhere has no config.yaml"),
        (["--force"], "--force must come with --resume"),
        (["--resume", "run", "--overwrite"], "--overwrite must not come with --resume"),
        (["checkpoint_minutes=-1"], "checkpoint_minutes must be at least 0"),
    ],
)
def test_wrong_requests_are_told(cli, arguments, message):
    output = cli.refused("train", *arguments)
    assert message in output


# ---------------------------------------------------------------------------------------------- killed at a place


def files(run):
    """Return files by name; of metrics.jsonl, only what a resumed run shares with an uninterrupted one."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return found | {"metrics.jsonl": steps(run) or steps(run, "full fine-tune")}


SHORT = [*LEARN, "train.steps=3", "checkpoint_minutes=0", "mask.keep_ratio=0.8"]
BEFORE_FINISHING = "mft.training.outputs.evaluation_tables"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_what_is_lost_beside_a_checkpoint_is_made_anew_from_it(cli, tmp_path, damage):
    cli("train", *SHORT)
    wanted = files(tmp_path / "run")
    killed_before(cli, BEFORE_FINISHING, "train", *SHORT, "--overwrite")
    for name in ("config.yaml", "metrics.jsonl"):
        damage(tmp_path / "run" / name)
    output = cli.done("train", "--resume", "run")
    assert "goes on after step 3" in output
    assert files(tmp_path / "run") == wanted


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("train", "mft.tracking.metrics.plot_curves"),
        ("train", "safetensors.torch.save"),
        ("train", "mft.training.run_checkpoints.remove"),
        ("finetune", "transformers.PreTrainedTokenizerBase.save_pretrained"),
    ],
)
def test_a_run_killed_while_it_finishes_finishes_again(cli, tmp_path, verb, place):
    """Half-written files are also removed."""
    cli(verb, *SHORT)
    wanted = files(tmp_path / "run")
    killed_before(cli, place, verb, *SHORT, "--overwrite")
    code, output = cli(verb, "--resume", "run")
    if place == "mft.training.run_checkpoints.remove":  # it removes checkpoints once the result is there
        assert (code, "has its masks/ already" in output) == (2, True)
    else:
        assert code == 0, output
    assert files(tmp_path / "run") == wanted
    assert sorted(os.listdir(tmp_path / "run")) == sorted({name.partition("/")[0] for name in wanted})


@pytest.mark.parametrize("begun", [BEFORE_FINISHING, "mft.training.training_run.train_masks", None])
def test_what_another_process_finishes_meanwhile_stays(cli, tmp_path, monkeypatch, begun):
    """A run begins, or resumes with or without a checkpoint; another finishes the same run before it gets the lock."""
    if begun is not None:
        killed_before(cli, begun, "train", *SHORT)
    arguments = ("train", *SHORT) if begun is None else ("train", "--resume", "run")
    lock = fcntl.flock

    def late(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        assert in_a_fork(lambda: cli(*arguments)[0]) == 0
        late.found = files(tmp_path / "run")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    output = cli.refused(*arguments)
    assert ("run already holds a run" if begun is None else "run has its masks/ already") in output
    assert files(tmp_path / "run") == late.found


def test_nothing_is_deleted_without_the_lock(cli, tmp_path):
    (tmp_path / "run" / "masks").mkdir(parents=True)
    with hold(tmp_path / "run"):
        for verb in ("train", "finetune", "sensitivity"):
            output = cli.refused(verb, *([] if verb != "sensitivity" else ["--config", "config.yaml"]), "--overwrite")
            assert "is in use by" in output
    assert (tmp_path / "run" / "masks").is_dir()
