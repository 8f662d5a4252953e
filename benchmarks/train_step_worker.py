"""One competitor of `train_step` in its own process, which takes orders: a line in, a line of JSON out.

step      seconds of an optimiser step
peak      bytes by which resident memory has peaked since before the model was made
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import torch

from .bench_memory import process_bytes
from .training_steps import TrainingStep, build, small_config


def main(competitor: str, config: dict, tokens: int, accumulation: int, threads: int) -> None:
    """Answer orders until the input ends."""
    torch.set_num_threads(threads)
    TrainingStep(competitor, build(small_config(128, 2)), 64)()  # loads all code before memory is measured
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    step = TrainingStep(competitor, build(config), tokens, accumulation)
    step()
    _answer("ready")
    for line in sys.stdin:
        if line.strip() == "step":
            start = time.perf_counter()
            step()
            _answer(time.perf_counter() - start)
        elif line.strip() == "peak":
            _answer(process_bytes("VmHWM") - before)
        else:
            raise ValueError(f"the order must be step or peak, got {line!r}")


def _answer(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:]))
