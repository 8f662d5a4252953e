"""Measure what a whole training step costs: tokens/s and peak memory.

Models are SmolLM2-135M and one block of LLaMA2-7B's shape, with 2 micro-batches of 256 tokens per step. Everything
learns, or has a mask. Each competitor has its own process, so that its peak is its own. Their steps are interleaved:
all processes live, and one at a time is told to run a step. The paper's formulation runs after the others, alone.

A competitor's process is this file as a program. It takes orders, a line in and a line of JSON out:

step      seconds of an optimiser step
peak      bytes by which resident memory has peaked since before the model was made
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mft.memory.shapes import known_config
from mft_kernels.timing import Samples, time_told

from .bench_memory import process_bytes
from .harness import ROOT, Finding, Spread, ratio, report
from .training_steps import COMPETITORS, FULL, PAPER, TrainingStep, build, small_config

TOKENS, ACCUMULATION = 256, 2
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # for torch's large tensors, as the command mft sets it
PAPER_STEPS = 1  # alone and once: it takes ten times as long as the others, and their memory would go cold meanwhile


@dataclass(frozen=True)
class Budget:
    """Models by name, and how often each steps in one of the processes (pooled.py)."""

    models: Mapping[str, dict[str, Any]]
    tokens: int
    rounds: int


BLOCK = known_config("llama2-7b") | {"num_hidden_layers": 1, "vocab_size": 512}  # without the cost of a head
STORED = Budget({"SmolLM2-135M": known_config("smollm2-135m"), "a LLaMA2-7B block": BLOCK}, TOKENS, 3)
QUICK = Budget({"4 layers of SmolLM2-135M": known_config("smollm2-135m") | {"num_hidden_layers": 4}}, 128, 2)


class Worker:
    """A competitor's process."""

    def __init__(self, process: subprocess.Popen, name: str) -> None:
        self._process, self._name = process, name
        self._receive()  # ready

    def ask(self, order: str) -> Any:
        """Send an order. Returns for step: seconds; peak: bytes.

        Raises: RuntimeError if the process has died.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._name} must answer, it ended with {self._process.wait()}")
        return json.loads(line)


@contextmanager
def started(
    name: str, config: dict[str, Any], tokens: int, variables: Mapping[str, str] = HUGE_PAGES
) -> Iterator[Worker]:
    """Yield the worker after its first step, in these environment variables too. It ends when its input ends."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_train_step"]
    command += [name, json.dumps(config), str(tokens), str(ACCUMULATION), str(torch.get_num_threads())]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
    ) as process:
        yield Worker(process, name)


def measure(model: str, config: dict[str, Any], budget: Budget) -> tuple[list[Finding], list[dict]]:
    """Return the findings and one row per competitor."""
    samples, peaks = _ask([name for name in COMPETITORS if name != PAPER], budget.rounds, model, config, budget)
    for whole, part in zip((samples, peaks), _ask([PAPER], PAPER_STEPS, model, config, budget)):
        whole.update(part)
    findings, rows = [], []
    for name in COMPETITORS:
        rate = Spread.of([ACCUMULATION * budget.tokens / (ms * 1e-3) for ms in samples[name]])
        findings.append(Finding(f"{name}: {model}", rate, "tokens/s"))
        findings.append(Finding(f"{name}: {model}, peak memory", Spread.of([peaks[name] / 1e9]), "GB"))
        if name != FULL:
            findings.append(ratio(samples, name, FULL, suffix=f": {model}, time"))
            memory = Spread.of([peaks[name] / peaks[FULL]])
            findings.append(Finding(f"{name} / {FULL}: {model}, peak memory", memory))
        row = {"model": model, "competitor": name, "ms": vars(Spread.of(samples[name])), "tokens_per_s": vars(rate)}
        rows.append(row | {"peak_gb": peaks[name] / 1e9})
    return findings, rows


def _ask(
    names: Sequence[str], rounds: int, model: str, config: dict[str, Any], budget: Budget
) -> tuple[Samples, dict[str, int]]:
    """Return for each competitor: ms of interleaved steps, and peak bytes."""
    with ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = stack.enter_context(started(name, config, budget.tokens))
            print(f"{model}: {name} is ready", flush=True)
        orders = {name: lambda worker=worker: worker.ask("step") * 1e3 for name, worker in workers.items()}
        samples = time_told(orders, rounds)
        peaks = {name: worker.ask("peak") for name, worker in workers.items()}
    return samples, peaks


def main(quick: bool = False) -> None:
    """Print and store the answer."""
    budget = QUICK if quick else STORED
    findings, rows = [], []
    for model, config in budget.models.items():
        found, measured = measure(model, config, budget)
        findings += found
        rows += measured
    title = f"A training step of {ACCUMULATION} x {budget.tokens} tokens, bf16, {torch.get_num_threads()} threads"
    report("train_step", title, findings, competitors=rows)


def answer_orders(competitor: str, config: dict[str, Any], tokens: int, accumulation: int, threads: int) -> None:
    """Answer orders until the input ends."""
    torch.set_num_threads(threads)
    TrainingStep(competitor, build(small_config(128, 2)), 64)()  # loads all code before memory is measured
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    step = TrainingStep(competitor, build(config), tokens, accumulation)
    step()
    print(json.dumps("ready"), flush=True)
    for order in map(str.strip, sys.stdin):
        answer: float = process_bytes("VmHWM") - before
        if order == "step":
            start = time.perf_counter()
            step()
            answer = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    answer_orders(sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:]))
