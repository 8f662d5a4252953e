"""Runs of the command line on a tiny model (conftest's cli): how they learn, and what they write."""

import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import counting_lines, equal, save_llama
from typer.testing import CliRunner

from mft.tracking.metrics import METRICS, Steps
from mft.training.checkpoint import newest_checkpoint
from mft.training.saver import Saver, Stopped

LEARN = ["train.lr=1e-2", "train.epochs=null", "train.steps=4", "train.batch_size=2", "mask.layers_to_transform=2-3"]


def invoke(*arguments, lines=""):
    """Return (exit code, output) of mft on these arguments; lines: what the user types."""
    from mft.cli.app import app

    result = CliRunner().invoke(app, list(map(str, arguments)), input=lines)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def expecting(code, call=invoke):
    """Return a function that returns the output of ``call``, which must end with this exit code."""

    def called(*arguments, **options):
        found, output = call(*arguments, **options)
        assert found == code, output
        return output

    return called


succeed, refused = expecting(0), expecting(2)


class Forked:
    """Run mft in a fork of this process, for tests that need no fresh one, whose imports take six seconds.

    Its methods are those of subprocess.Popen that tests use. Args: call: conftest's cli.
    """

    def __init__(self, call, *arguments, **environment):
        self.pid, self.returncode = os.fork(), None
        if not self.pid:
            code = 1
            try:
                os.environ.update(environment)
                code, output = call(*arguments)
                Path(f"output of {os.getpid()}").write_text(output)
            finally:
                os._exit(code)

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        self.poll(0)
        written = Path(f"output of {self.pid}")
        return written.read_text() if written.exists() else "", None


def write_run(directory, more=""):
    """Write the tiny model, its data, and a configuration of a run in the directory run; more: its further sections."""
    save_llama(directory / "model")
    (directory / "data.jsonl").write_text(counting_lines())
    (directory / "config.yaml").write_text(
        f"model: {{name: {directory}/model, dtype: float32}}\n"
        f"data: {{source: {directory}/data.jsonl, sequence_length: 12}}\noutput_dir: run\n{more}"
    )


def wait_for_checkpoint(directory, process):
    while not list((directory / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def free_port():
    """Return a free port for MASTER_PORT, where several processes meet."""
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return str(any_port.getsockname()[1])


def listens(port):
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", int(port))) == 0


def events_of(directory, *, timed=True):
    """Return a run's metrics; with timed=False, without their times."""
    events = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    return events if timed else [{key: value for key, value in event.items() if key != "seconds"} for event in events]


def steps(directory, phase="mask fine-tune"):
    return [(event["step"], event["loss"]) for event in events_of(directory) if event["phase"] == phase]


def merged(cli, run):
    """Return the weights that mft merge makes of this run's masks."""
    cli.done("merge", run, f"{run}-merged")
    return load_file(Path(f"{run}-merged", "model.safetensors"))


def assert_same_masks(*runs):
    assert equal(*(load_file(run / "masks" / "adapter_model.safetensors") for run in runs))


def in_a_fork(work):
    """Return the exit code of a child process that calls ``work``; 9 if it was killed there."""
    if torch.cuda.is_available():
        pytest.skip("a process that has used CUDA cannot be forked")
    child = os.fork()
    if not child:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_main(command):
    """Return the exit code of the command line's main; call it in a child process that ends afterwards."""
    from mft.cli.app import main

    sys.argv = ["mft", *command]
    code = 1
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # noqa: BLE001  (the child must end here, as the interpreter would)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def stop_after(step):
    """Return an on_step that sends SIGTERM to this process after the step."""
    return lambda report: report.step == step and os.kill(os.getpid(), signal.SIGTERM)


def assert_goes_on_bit_for_bit(run, make, root, step):
    """Assert that run(model, on_step, saver), stopped by SIGTERM after ``step``, goes on as if it had not stopped."""
    straight, resumed, heard = make(), make(), []
    expected = run(straight)
    with pytest.raises(Stopped) as stopped:
        run(make(), on_step=stop_after(step), saver=Saver(root, math.inf))
    assert stopped.value.code == 128 + signal.SIGTERM
    checkpoint, skipped = newest_checkpoint(root)
    assert (checkpoint.step, skipped) == (step, [])
    reports = run(resumed, on_step=lambda report: heard.append(report.step), saver=Saver(root, math.inf, checkpoint))
    assert heard == list(range(step + 1, expected[-1].step + 1))
    assert [report.loss for report in reports] == [report.loss for report in expected]
    assert equal(resumed.state_dict(), straight.state_dict())
    assert newest_checkpoint(root)[0].step == expected[-1].step


class Killed(BaseException):
    """An exception that no code catches."""


def killed_after(call, step, *arguments):
    """Run ``call`` in this process until it has recorded ``step``; there it dies."""
    record = Steps.__call__

    def die(self, report):
        record(self, report)
        if report.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "__call__", die)
        with pytest.raises(Killed):
            call(*arguments)


def killed_before(call, place, *arguments):
    """Run ``call`` in a child that dies where it would call ``place`` ("module.function")."""

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, lambda *_, **__: os._exit(9))
            return call(*arguments)[0]

    assert in_a_fork(work) == 9
