"""Runs of the command line on a tiny model (conftest's cli): how they learn, and what they wrote."""

import json
import os
import time
from pathlib import Path

LEARN = ["train.lr=1e-2", "train.epochs=null", "train.steps=4", "train.batch_size=2", "mask.layers_to_transform=2-3"]


class Forked:
    """mft in a child of this process, for who needs no fresh one: that imports for six seconds.

    Args: call: conftest's cli. What of subprocess.Popen tests use is called so here.
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


def wait_for_checkpoint(directory, process):
    while not list((directory / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def steps(directory, phase="mask fine-tune"):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["phase"] == phase]
