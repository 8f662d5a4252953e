"""Measure the server beside plain generation: SmolLM2-135M in bf16, 1, 8 and 32 requests at a time of 32 + 32 tokens.

In each round these answer the same prompts, each in its own process: transformers' generate of the base in one batch,
the server's engine without HTTP, and mft serve, from which each client streams an answer. The clients are threads of
this process and share the server's cores. The masks are random and keep 90 % of every linear layer. Each task holds its
own copy of the same ones, because speed does not depend on their values. The base names no end token, so that no answer
ends early.
"""

import argparse
import contextlib
import functools
import http.client
import inspect
import itertools
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mft.config import ModelConfig
from mft.masks.bank import load_mask_bank
from mft.models.pretrained import load_model, load_tokenizer, smollm2_directory
from mft.serving.batch.answer_text import AnswerText
from mft.serving.batch.generation import Generation, Piece
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.sampling import Sampling, SamplingOptions
from mft.serving.batch.scheduler import Scheduler
from mft.serving.passing_thread import in_passing_thread
from mft_kernels.timing import time_told

from .bench_generate import generate
from .bench_memory import process_bytes
from .harness import Finding, Spread, ratio, report
from .serve_load import TASKS, percentiles, server, write_masks

GENERATE, ENGINE, HTTP = "generate of the base", "ours, engine", "ours, over HTTP"
MOST = {1: 1.053, 4: 1.176}  # by tasks: times generate's time, at most, from 8 requests on: 0.95 and 0.85 of its speed
STEPS = 3  # of the batch, at most, to the first token of a short prompt while a long one is read
RUNNING = 6  # answers that run while it is read
WARMING = 4  # new tokens of the first call, which is not timed
MB = 1e6

Prompts = Sequence[Sequence[int]]
Answer = Callable[[Sequence[str], Prompts, int], float]


@dataclass(frozen=True)
class Budget:
    """Sizes of a process's answer.

    rows: requests at a time, of this many tokens of prompt and new ones. long, lasting: tokens of the long prompt, and
    of the answers that run while it is read. cache: MB, for --cache.
    """

    base: Callable[[], Path] = smollm2_directory
    rows: Sequence[int] = (1, 8, 32)
    prompt: int = 32
    new: int = 32
    long: int = 4000
    rounds: int = 2  # at least two, for percentiles
    lasting: int = 48
    cache: int = 256


STORED = Budget()


@dataclass
class Streamed:
    """A streamed answer: when it was asked for, and when each piece of it came, on one clock in seconds."""

    sent: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)


class Plain:
    """Plain generation by the base."""

    def __init__(self, base: str) -> None:
        self._model, _ = load_model(base)
        self._model.generation_config.eos_token_id = None

    def answer(self, tasks: Sequence[str], prompts: Prompts, new: int) -> float:
        """Answer all prompts in one batch. Returns: milliseconds."""
        began = time.perf_counter()
        made = generate(self._model, torch.tensor(prompts), new)
        took = time.perf_counter() - began
        check_counts([made.shape[1] - len(prompts[0])], new)
        return took * 1e3


class Engine:
    """The server's batch and scheduler without HTTP."""

    def __init__(self, base: str, masks: Mapping[str, Path], cache: int, rows: int) -> None:
        batch, self._tokenizer = in_passing_thread(lambda: self._load(base, masks, cache))
        self._scheduler = Scheduler(batch, rows=rows, waiting=0)
        self._scheduler.start()

    def answer(self, tasks: Sequence[str], prompts: Prompts, new: int) -> float:
        """Answer all prompts, which take the tasks in turn. Returns: milliseconds."""
        ended, began = threading.Semaphore(0), time.perf_counter()

        def take(piece: Piece) -> None:
            if piece.finish or piece.refused:
                ended.release()

        generations = []
        for number, prompt in enumerate(prompts):
            sampling = Sampling(prompt, SamplingOptions(temperature=0))
            task, text = tasks[number % len(tasks)], AnswerText(self._tokenizer, ())
            generations.append(Generation(task, prompt, new, sampling, text, (), take))
        self._scheduler.submit(generations)
        for _ in prompts:
            ended.acquire()
        took = time.perf_counter() - began
        check_counts([generation.tokens for generation in generations], new)
        return took * 1e3

    @staticmethod
    def _load(base: str, masks: Mapping[str, Path], cache: int) -> tuple[RunningBatch, Any]:
        model, tokenizer = load_model(base)
        return RunningBatch(load_mask_bank(model, masks), cache), tokenizer


_held: Any = None  # in a process of in_process


def _hold(threads: int, make: Callable[..., Any], *arguments: Any) -> None:
    global _held
    torch.set_num_threads(threads)
    _held = make(*arguments)


def _answer(tasks: Sequence[str], prompts: Prompts, new: int) -> float:
    return _held.answer(tasks, prompts, new)


@contextlib.contextmanager
def in_process(make: Callable[..., Any], *arguments: Any) -> Iterator[Answer]:
    """Yield the answer method of what make returns in a process of its own.

    Two threads of a process that compute, in turns, would each have a pool of OpenMP threads, and both become slow.
    """
    given = (torch.get_num_threads(), make, *arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_hold, initargs=given) as pool:
        yield lambda *asked: pool.submit(_answer, *asked).result()


class Clients:
    """Clients of a server, each a thread. answers: what was streamed, by the number of tasks."""

    def __init__(self, address: str, most: int) -> None:
        self._host, self._pool = address.removeprefix("http://"), ThreadPoolExecutor(most)
        self.answers: dict[int, list[Streamed]] = {}

    def answer(self, tasks: Sequence[str], prompts: Prompts, new: int) -> float:
        """Ask for an answer to each prompt, which take the tasks in turn. Returns: milliseconds."""
        began, answers = time.perf_counter(), [Streamed() for _ in prompts]
        names = [tasks[number % len(tasks)] for number in range(len(prompts))]
        list(self._pool.map(functools.partial(self._stream, new=new), names, prompts, answers))
        self.answers.setdefault(len(tasks), []).extend(answers)
        return (time.perf_counter() - began) * 1e3

    def first_beside(self, long: Sequence[int], task: str, prompts: Prompts, lasting: int) -> dict[str, float]:
        """Return when the last prompt has its first token, asked while long is read and the others are answered.

        In ms, in steps of the batch meanwhile, and the ms of such a step. lasting: tokens of the others' answers.
        """
        running, read, short = [Streamed() for _ in prompts[1:]], Streamed(), Streamed()
        ask = functools.partial(self._pool.submit, self._stream, task)
        sent = [ask(prompt, answer, lasting) for prompt, answer in zip(prompts, running)]
        wait_for(lambda: all(answer.times for answer in running))
        sent.append(ask(long, read, 1))
        seen = len(running[0].times)
        wait_for(lambda: len(running[0].times) >= seen + 2)
        short.sent = time.perf_counter()
        self._stream(task, prompts[-1], short, 1)
        for each in sent:
            each.result()
        times = [at for at in running[0].times if read.sent < at < max(read.times[0], short.times[0])]
        step = statistics.median(after - at for at, after in itertools.pairwise(times))
        first = short.times[0] - short.sent
        return {"first_ms": first * 1e3, "step_ms": step * 1e3, "steps": first / step}

    def _stream(self, task: str, prompt: Sequence[int], answer: Streamed, new: int) -> None:
        body = {"model": task, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        with contextlib.closing(http.client.HTTPConnection(self._host, timeout=300)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            last = b""
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    answer.times.append(time.perf_counter())
                    last = line
        check_counts([json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]], new)


def check_counts(counts: Sequence[int], new: int) -> None:
    """Raise RuntimeError unless every answer has as many tokens as generate's."""
    if any(count != new for count in counts):
        raise RuntimeError(f"answers must have {new} tokens each, got {counts}")


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until it holds. Raises: TimeoutError after a minute."""
    end = time.monotonic() + 60
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the server must stream within a minute, it did not")
        time.sleep(0.001)


def write_endless(folder: Path, base: Path) -> str:
    """Copy a model without its end tokens. Returns: the path of the copy."""
    shutil.copytree(base, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": []}))
    return str(folder)


@dataclass(frozen=True)
class Setting:
    """What a process measures. ids: of a long text. process: the server's."""

    tasks: Sequence[str]
    ids: Sequence[int]
    generate: Answer
    engine: Answer
    clients: Clients
    process: int

    def megabytes(self, name: str) -> float:
        """Return MB of the server's memory: VmRSS, or VmHWM, its peak since all was loaded."""
        return process_bytes(name, self.process) / MB

    def ways(self, prompts: Prompts, new: int) -> dict[str, Callable[[], float]]:
        """Return the competitors, each of which answers all prompts and returns its milliseconds."""
        found = {GENERATE: functools.partial(self.generate, (), prompts, new)}
        for many in (many for many in MOST if many <= len(prompts)):
            for name, answer in ((ENGINE, self.engine), (HTTP, self.clients.answer)):
                found[with_tasks(name, many)] = functools.partial(answer, self.tasks[:many], prompts, new)
        return found


@contextlib.contextmanager
def setting(budget: Budget) -> Iterator[Setting]:
    """Load the base for generate and for the engine, and start a server."""
    most, tasks = max(*budget.rows, RUNNING + 2), TASKS[: max(MOST)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = write_endless(root / "base", budget.base())
        masks = dict.fromkeys(tasks, write_masks(root, base, ["masks"], "bfloat16", keep_ratio=0.9)["masks"])
        ids = load_tokenizer(ModelConfig(base))(inspect.getsource(argparse))["input_ids"]
        options = ["--model", base, "--cache", f"{budget.cache}MB", "--rows", str(most)]
        options += [f"--masks={task}={directory}" for task, directory in masks.items()]
        with (
            in_process(Plain, base) as plain,
            in_process(Engine, base, masks, budget.cache * 10**6, most) as engine,
            server(options, root / "log") as (address, process),
        ):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak counts from here on
            yield Setting(tasks, ids, plain, engine, Clients(address, most), process.pid)


def main(quick: bool = False, budget: Budget = STORED) -> None:
    """Print and store the answer of this process."""
    if quick:
        budget = replace(budget, rows=budget.rows[:2])
    findings: list[Finding] = []
    cases: list[dict[str, Any]] = []
    with setting(budget) as it:
        loaded = it.megabytes("VmRSS")
        prompts = [it.ids[start : start + budget.prompt] for start in range(0, len(it.ids), budget.prompt)]
        for rows in budget.rows:
            for answer in it.ways(prompts[:rows], WARMING).values():
                answer()
            it.clients.answers.clear()
            found = measure(it.ways(prompts[:rows], budget.new), rows, budget, it.clients.answers, findings)
            cases += [case | {"peak_mb": it.megabytes("VmHWM")} for case in found]
        beside_long = functools.partial(it.clients.first_beside, it.ids[-budget.long :], it.tasks[0])
        reading = [beside_long(prompts[: RUNNING + 1], budget.lasting) for _ in range(budget.rounds)]
        peak = it.megabytes("VmHWM")
    beside = {name: Spread.of([each[name] for each in reading]) for name in reading[0]}
    findings.append(Finding("first token while a long prompt is read", beside["steps"], "steps", "at most", STEPS))
    beyond = Finding("peak memory beyond base and masks", Spread.of([peak - loaded]), "MB", "at most", budget.cache)
    memory = {"loaded_mb": loaded, "peak_mb": peak, "cache_mb": budget.cache}
    title = f"mft serve on SmolLM2-135M, bf16, {budget.prompt} + {budget.new} tokens per request"
    told = {name: vars(spread) for name, spread in beside.items()} | {"long": budget.long, "running": RUNNING}
    report("serve", title, [*findings, beyond], cases=cases, memory=memory, reading=told)


def measure(
    ways: Mapping[str, Callable[[], float]],
    rows: int,
    budget: Budget,
    streamed: dict[int, list[Streamed]],
    findings: list[Finding],
) -> list[dict[str, Any]]:
    """Let the ways answer in turns; add to findings. Returns: a case for each number of tasks."""
    samples = time_told(ways, budget.rounds)
    rate = {name: Spread.of([rows * budget.new * 1e3 / ms for ms in times]) for name, times in samples.items()}
    findings += [Finding(f"{name}: {counted(rows, 'request')}", spread, "tokens/s") for name, spread in rate.items()]
    cases = []
    for many, answers in sorted(streamed.items()):
        case: dict[str, Any] = {"rows": rows, "tasks": many, "rounds": budget.rounds, GENERATE: vars(rate[GENERATE])}
        goal = ("at most", MOST[many]) if rows >= 8 else ()
        for name in (ENGINE, HTTP):
            found = ratio(samples, with_tasks(name, many), GENERATE, *goal, suffix=f": {counted(rows, 'request')}")
            findings.append(found)
            case[name] = {"tokens_per_s": vars(rate[with_tasks(name, many)]), "ratio": vars(found.measured)}
            case[name]["target"] = found.bound
        case["answer"] = percentiles([answer.times[-1] - answer.sent for answer in answers])
        case["first"] = percentiles([answer.times[0] - answer.sent for answer in answers])
        cases.append(case)
    return cases


def with_tasks(name: str, tasks: int) -> str:
    """Return the name of the engine or of HTTP with this number of tasks."""
    return f"{name}, {counted(tasks, 'task')}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
