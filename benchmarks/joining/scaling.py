"""Measure a study with one process, and with several that join: python -m benchmarks.joining.scaling [DIRECTORY].

The study has 24 runs and 12 tests of a small Llama, and is made below DIRECTORY. All ways must give the same table.
On a busy machine, only the processor times can be compared.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mft.config import DataConfig, TrainConfig
from mft_study.config import ScratchConfig
from mft_study.evidence.host import this_host
from mft_study.from_scratch import train_from_scratch

STUDY = """
model: {{name: {model}, dtype: float32}}
mask: {{layers_to_transform: 2-3, init: magnitude, keep_ratio: 0.98}}
domains: {{code: {{source: {data}, sequence_length: 128, max_train_tokens: 24576, max_eval_tokens: 8192}}}}
full: {{batch_size: 8}}
stage: {{batch_size: 8}}
arms:
  full: {{kind: full, lrs: [1e-3, 2e-3, 4e-3], epochs: [2]}}
  control: {{kind: control, lrs: [2e-3, 4e-3, 8e-3, 1.6e-2], epochs: [2]}}
  LoRA: {{kind: lora, lrs: [1e-3, 4e-3, 1.6e-2, 3.2e-2], epochs: [2]}}
  MFT: {{kind: mask, mode: value, threshold: 0, lrs: [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], epochs: [2]}}
seeds: [0, 1, 2]
extensions: 0
checkpoints: 1
"""
WAYS = {  # by name, the options of each process
    "1 process": [["workers=1"]],
    "1 process with --join": [["workers=1", "--join"]],
    "2 processes with --join": [["workers=1", "--join"]] * 2,
    "1 process of 2 workers": [["workers=2"]],
    "1 process of 2 workers with --join": [["workers=2", "--join"]],
}

TIMES = ("seconds", "seconds_tried", "equal_budgets")  # the keys of a table that depend on how long runs took


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        place = Path(name)
        os.environ["MFT_CACHE"] = str(place / "cache")
        torch.set_num_threads(1)  # as a study does: several wait for each other on a busy machine
        data, config = place / "data.jsonl", place / "study.yaml"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()))
        source, train = DataConfig(str(data), sequence_length=128), TrainConfig(lr=5e-3, steps=40, batch_size=4)
        train_from_scratch(ScratchConfig(vocab_size=512, data=source, train=train), place / "model")
        config.write_text(STUDY.format(model=place / "model", data=data))
        _measure(config, place / "warm-up", [["workers=1", "seeds=[0]", "arms.MFT.lrs=[4e-3]"]])  # fills the cache
        print(f"{this_host().kind}; load before: {os.getloadavg()[0]:.1f}\n")
        print("| way | seconds | seconds of processors | of those, beyond 1 process |\n|---|---:|---:|---:|")
        first, tables = None, []
        for number, (way, processes) in enumerate(WAYS.items()):
            wall, busy, table = _measure(config, place / f"run-{number}", processes)
            first = first or busy
            tables.append(table)
            print(f"| {way} | {wall:.1f} | {busy:.1f} | {100 * (busy / first - 1):+.1f} % |", flush=True)
        assert all(table == tables[0] for table in tables), "two ways found different numbers"
        print("\nall ways gave the same table")


def _texts() -> list[str]:
    """Return code of the standard library in pieces of 30 lines."""
    lines = [line for module in (argparse, inspect, typing) for line in inspect.getsource(module).splitlines(True)]
    return ["".join(lines[first : first + 30]) for first in range(0, len(lines), 30)]


def _measure(config: Path, directory: Path, processes: Sequence[Sequence[str]]) -> tuple[float, float, Any]:
    """Run a study. Returns: (seconds until its last process ended, their processor seconds, its table)."""
    begin, before = time.perf_counter(), os.times()
    running = []
    for options in processes:
        command = [sys.executable, "-m", "mft", "compare", "--config", str(config), f"output_dir={directory}", *options]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    assert not any(codes), codes
    wall, after = time.perf_counter() - begin, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, busy, _without_times(json.loads((directory / "table.json").read_text())["domains"])


def _without_times(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_times(value) for name, value in values.items() if name not in TIMES}
    return [_without_times(value) for value in values] if isinstance(values, list) else values


if __name__ == "__main__":
    main()
