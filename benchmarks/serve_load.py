"""Load-test mft serve with openai's own client on loopback: python -m benchmarks.serve_load [--model smollm2-135m]

Starts a server of a tiny model with five tasks. Several threads send whole answers, streams, clients that leave, loads
and unloads. After half of the requests, keys and masks are reloaded by SIGHUP. It fails in each of these cases: an
answer differs from the one to the same request sent alone; the server refuses what it must not; the server's log and
the clients count differently; or peak memory grows over 5,000 requests or more. Linux only: it reads /proc.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch

from .bench_memory import process_bytes
from .harness import environment
from .records import RESULTS
from .tables import markdown

TASKS = ("code", "math", "news", "mail", "song")
WORDS = 512
PROMPTS = ("3 4 5", "7", "1 2 3 4 5 6 7 8 9 10 11 12", "40 41 42 43", "9 9 9 9 9 9 9 9", "12 13 14")
TEMPLATE = "{% for message in messages %}{{ message.content + ' 60 ' }}{% endfor %}"
DTYPE = "float32"  # in bf16 two tokens are more often equally likely, and a mixed batch may give the other one
TOKENS = 16  # per answer
LONG = 200  # per answer whose client leaves
HASTY = 0.02  # seconds after which an impatient client leaves
MOST_GROWTH = 16 << 20  # bytes by which peak memory may grow between a tenth of the requests and all of them
LEAST = 5000  # requests from which memory may not grow: the first ones fill caches
SPREAD = 100  # one of this many requests unloads a task and loads it again


@dataclass
class Target:
    """A server. directories: each task's masks, as a client names them."""

    address: str
    process: int
    directories: dict[str, str]
    key: str = "none"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.key, max_retries=0, timeout=120)


@dataclass
class Load:
    """What was sent and what came back; threads share it. seconds: by kind of request."""

    target: Target
    alone: dict[tuple[str, str, bool], str] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)  # peak memory after so many requests
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, models: Sequence[str]) -> None:
        """Store the answer to each prompt sent alone. Answers under load must equal it."""
        with self.target.client() as client:
            for model, prompt, chat in itertools.product(models, PROMPTS, (False, True)):
                self.alone[model, prompt, chat] = "".join(ask(client, model, prompt, chat=chat))
        self.sent["answered"] += len(self.alone)
        if len({self.alone[model, PROMPTS[0], False] for model in models}) < len(models):
            self.fail(f"each of {', '.join(models)} must have an answer of its own, got {self.alone}")

    def send(self, client: openai.OpenAI, number: int) -> None:
        models = list(dict.fromkeys(model for model, _, _ in self.alone))
        model, prompt = models[number % len(models)], PROMPTS[number // len(models) % len(PROMPTS)]
        if number % SPREAD == SPREAD - 1:
            tasks = list(self.target.directories)
            self.change(client, tasks[number // SPREAD % len(tasks)])
            return
        kind = KINDS[number % len(KINDS)]
        try:
            kind(self, client, model, prompt)
        except openai.NotFoundError as error:
            self.count("unloaded just then" if error.code == "model_not_found" else "")
        except openai.APIError as error:
            self.fail(f"{number}, {kind.__name__}: {error!r}")

    def change(self, client: openai.OpenAI, task: str) -> None:
        """Unload a task and load it again; another thread may do the same at the time."""
        for route, keys in (("unload", {}), ("load", {"lora_path": self.target.directories[task]})):
            began = time.monotonic()
            try:
                client.post(f"/{route}_lora_adapter", body={"lora_name": task, **keys}, cast_to=str)
                self.took(route, began)
            except (openai.NotFoundError, openai.BadRequestError):
                self.count(f"{route} of a task that was changing")

    def took(self, what: str, began: float) -> None:
        with self.lock:
            self.sent[what] += 1
            self.seconds.setdefault(what, []).append(time.monotonic() - began)

    def count(self, what: str) -> None:
        with self.lock:
            self.sent[what] += 1

    def fail(self, message: str) -> None:
        with self.lock:
            self.wrong.append(message)

    def hold(self, model: str, prompt: str, text: str, *, chat: bool) -> None:
        self.count("answered")
        if text != self.alone[model, prompt, chat]:
            self.fail(f"{model} {prompt!r}: {text!r} for {self.alone[model, prompt, chat]!r}")


def ask(client: Any, model: str, prompt: str, *, chat: bool, stream: bool = False, **options: Any) -> Iterator[str]:
    """Yield the text of a greedy answer in pieces."""
    given = {"model": model, "temperature": 0, "max_tokens": TOKENS, "stream": stream} | options
    if chat:
        made = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **given)
        for chunk in made if stream else (made,):
            choice = chunk.choices[0]
            yield (choice.delta if stream else choice.message).content or ""
        return
    made = client.completions.create(prompt=prompt, **given)
    for chunk in made if stream else (made,):
        yield chunk.choices[0].text


def whole(load: Load, client: openai.OpenAI, model: str, prompt: str) -> None:
    began = time.monotonic()
    text = "".join(ask(client, model, prompt, chat=False))
    load.took("whole answer", began)
    load.hold(model, prompt, text, chat=False)


def stream(load: Load, client: openai.OpenAI, model: str, prompt: str) -> None:
    began, pieces = time.monotonic(), []
    for piece in ask(client, model, prompt, chat=True, stream=True):
        if piece and not "".join(pieces):
            load.took("first piece of a stream", began)
        pieces.append(piece)
    load.took("whole stream", began)
    load.hold(model, prompt, "".join(pieces), chat=True)


def leave_stream(load: Load, client: Any, model: str, prompt: str) -> None:
    options: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": LONG, "stream": True}
    with client.completions.create(**options) as made:
        next(iter(made))
    load.count("left a stream")


def leave_answer(load: Load, client: openai.OpenAI, model: str, prompt: str) -> None:
    with contextlib.suppress(openai.APITimeoutError):
        "".join(ask(client, model, prompt, chat=False, max_tokens=LONG, timeout=HASTY))
    load.count("left an answer")


# The kinds of ten successive requests.
KINDS: tuple[Callable[[Load, openai.OpenAI, str, str], None], ...] = (
    *(whole, whole, stream, whole, leave_stream, stream, whole, stream, leave_answer, stream),
)


def run(load: Load, requests: int, clients: int, halfway: Callable[[], None] = lambda: None) -> None:
    """Send this number of requests from this number of threads."""
    numbers, lock = iter(range(requests)), threading.Lock()

    def work() -> None:
        with load.target.client() as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                if number % max(1, requests // 10) == 0 and number:
                    load.memory[number] = process_bytes("VmHWM", load.target.process)
                    print(
                        f"after {number:,} requests: peak memory {load.memory[number] / (1 << 20):.1f} MiB", flush=True
                    )
                if number == requests // 2:
                    halfway()
                load.send(client, number)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    load.memory[requests] = process_bytes("VmHWM", load.target.process)


# ---------------------------------------------------------------------------------------------- the server


def write_masks(folder: Path, base: str, tasks: Sequence[str], dtype: str, keep_ratio: float) -> dict[str, Path]:
    """Write random masks of a base into folder/task. Returns: their directories by task."""
    from mft.config import MaskConfig, ModelConfig
    from mft.masks.convert import mask_model
    from mft.masks.export import save_masks
    from mft.models.pretrained import load_model

    for seed, task in enumerate(tasks):
        model, _ = load_model(ModelConfig(name=base, dtype=dtype))
        save_masks(mask_model(model, MaskConfig.paper(keep_ratio=keep_ratio, seed=seed)), folder / task)
    return {task: folder / task for task in tasks}


def write_inputs(root: Path, base: str) -> None:
    """Write masks of a base for five tasks, a list of them and a file of keys."""
    masks = write_masks(root / "masks", base, TASKS, DTYPE, keep_ratio=0.5)
    (root / "masks.txt").write_text("".join(f"{task}={directory}\n" for task, directory in masks.items()))
    (root / "keys").write_text("sk-load-test\n")
    (root / "keys").chmod(0o600)


def write_tiny_base(root: Path) -> str:
    """Write a tiny base model. Returns: its path."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from .training_steps import build, small_config

    words = Tokenizer(models.WordLevel({"<end>": 0} | {str(i): i for i in range(1, WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "base")
    # The weights are so large that masks decide which token is the likeliest.
    build(small_config(64, 4) | {"initializer_range": 0.3}, torch.float32).save_pretrained(root / "base")
    return str(root / "base")


@contextlib.contextmanager
def server(arguments: Sequence[str | Path], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run mft serve and yield (its address, the process); it must end by SIGTERM with exit code 0."""
    command = [sys.executable, "-m", "mft", "serve", *map(str, arguments), "--port", "0", "--log-format", "json"]
    environ = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with log.open("wb") as output:
        # Warnings go to the same file, whose other lines are JSON.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environ)
    try:
        end = time.monotonic() + 300
        while not (ready := re.search(r'"address": "([^"]+)"', log.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"mft serve must start, got\n{log.read_text()}")
            time.sleep(0.1)
        yield ready[1], process
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            sys.exit(f"mft serve must end with 0 by SIGTERM, got {process.returncode}\n{log.read_text()[-5000:]}")
    finally:
        process.kill()
        process.wait()


def check_log(load: Load, log: Path) -> None:
    """Compare the log with what the clients counted."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    counted = Counter(line["status"] for line in lines if line["event"] == "answer")
    left = load.sent["left a stream"] + load.sent["left an answer"]
    late = counted[200] - load.sent["answered"]  # answers that ended before their clients left
    if not 0 <= late <= left or late + counted[499] > left:
        load.fail(f"the log must have {load.sent['answered']} answers and at most {left} cancelled, got {counted}")
    if set(counted) - {200, 499} or '"traceback"' in log.read_text() or "Traceback" in log.read_text():
        load.fail(f"the log must have no error, got {counted}")
    if not any(line["event"] == "reloaded" for line in lines):
        load.fail("the log must say that SIGHUP reloaded, got no such line")


# ---------------------------------------------------------------------------------------------- the record


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the percentiles in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"requests": len(seconds), "p50_ms": round(cuts[49] * 1000, 1), "p99_ms": round(cuts[98] * 1000, 1)}


def table(load: Load) -> str:
    """Return the latencies as Markdown."""
    found = {what: percentiles(seconds) for what, seconds in sorted(load.seconds.items()) if len(seconds) > 1}
    rows = [[what, f"{own['requests']:,}", str(own["p50_ms"]), str(own["p99_ms"])] for what, own in found.items()]
    return markdown(["measured", "requests", "p50, ms", "p99, ms"], rows)


def main() -> None:
    """Run the test, print and store the results; exit code 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16, help="threads, each with its own connection")
    parser.add_argument("--model", default="tiny", help="known to mft, such as smollm2-135m; default: a tiny one")
    parser.add_argument("--out", type=Path, help="a JSON file; by default in benchmarks/results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, log = write_tiny_base(root) if given.model == "tiny" else given.model, root / "log"
        write_inputs(root, base)
        files = ["--masks-file", root / "masks.txt", "--load-from", root / "masks", "--admin-keys-file", root / "keys"]
        options = ["--model", base, "--dtype", DTYPE, "--length", "512", "--timeout", "120"]
        with server([*files, *options], log) as (address, process):
            directories = {task: task for task in TASKS}
            load = Load(Target(address, process.pid, directories, "sk-load-test"))
            load.prepare(("base" if given.model == "tiny" else base, *TASKS))
            loaded, began = process_bytes("VmRSS", process.pid), time.monotonic()
            run(load, given.requests, given.clients, lambda: process.send_signal(signal.SIGHUP))
            took = time.monotonic() - began
        check_log(load, log)
    early = load.memory[min(load.memory)]
    growth = load.memory[given.requests] - early
    if given.requests >= LEAST and growth > MOST_GROWTH:
        load.fail(f"peak memory must grow by at most {MOST_GROWTH:,} bytes, got {growth:,}")
    record = {
        "environment": {
            **environment(),
            "command": shlex.join(["python", "-m", "benchmarks.serve_load", *sys.argv[1:]]),
        },
        "model": given.model,
        "requests": given.requests,
        "clients": given.clients,
        "tokens": TOKENS,
        "seconds": round(took, 1),
        "sent": dict(sorted(load.sent.items())),
        "latencies": {what: percentiles(each) for what, each in sorted(load.seconds.items()) if len(each) > 1},
        "bytes_after_loading": loaded,
        "peak_bytes": {str(number): size for number, size in sorted(load.memory.items())},
        "wrong": load.wrong[:20],
    }
    out = given.out or RESULTS / ("serve-load.json" if given.model == "tiny" else f"serve-load-{given.model}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{given.requests:,} requests in {took:.0f} s: {dict(load.sent)}\n{table(load)}")
    print("\n".join((*load.wrong[:20], f"{len(load.wrong)} faults")))
    sys.exit(bool(load.wrong))


if __name__ == "__main__":
    main()
