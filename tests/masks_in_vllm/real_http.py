"""What tests of the real server share: its command, its start, and a request."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request

from real_base import SETTINGS, TOKENS

PORT = 18731
ADDRESS = f"http://127.0.0.1:{PORT}"
BASE = os.environ.get("MFT_VLLM_BASE", "")


def command(*arguments):
    # fp32: the number of requests in a batch changes how bf16 rounds, and then a token now and then
    words = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    return [sys.executable, "-m", "mft.vllm", BASE, *arguments, *words, "--port", str(PORT), "--host", "127.0.0.1"]


@contextlib.contextmanager
def running(tasks, log, *arguments):
    """Meanwhile a server answers, with these directories of masks by task."""
    given = [word for task, place in tasks.items() for word in ("--masks", f"{task}={place}")]
    with log.open("w") as sink:
        started = command(*given, *arguments)
        process = subprocess.Popen(started, env={**os.environ, **SETTINGS}, stdout=sink, stderr=sink)
        try:
            wait_until_up(process, log)
            yield process
        finally:
            process.terminate()
            process.wait(60)


def wait_until_up(process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{ADDRESS}/health", timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-4000:])


def task_in_use():
    with urllib.request.urlopen(f"{ADDRESS}/v1/mft/tasks", timeout=60) as answer:
        return json.load(answer)["task"]


def complete(prompt, model=BASE):
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{ADDRESS}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["text"]
