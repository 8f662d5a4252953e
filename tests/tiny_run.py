"""Runs of the command line on a tiny model (conftest's cli): how they learn, and what they wrote."""

import json
import time

LEARN = ["train.lr=1e-2", "train.epochs=null", "train.steps=4", "train.batch_size=2", "mask.layers_to_transform=2-3"]


def wait_for_checkpoint(directory, process):
    while not list((directory / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def steps(directory, phase="mask fine-tune"):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["phase"] == phase]
