"""Run the blocks of docs/how-to/serving.md: masks are trained, served until a signal, and used by openai's client."""

import os
import re
import shlex
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_run import succeed

from mft.models import pretrained

pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.slow

DOC = Path(__file__).parents[3] / "docs" / "how-to" / "serving.md"
SHORT = ["train.steps=2", "data.max_train_tokens=2048", "data.max_eval_tokens=1024", "data.sequence_length=64"]


def answers(port):
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def test_the_blocks_run(tiny_llama, tokenizer, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = DOC.read_text(encoding="utf-8").replace("8000", str(port)).replace("24-29", "2-3")
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (client,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pretrained.save_model(tiny_llama, tokenizer, tmp_path / "base")
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda dtype: tmp_path / "base")
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def ask(names):
        end = time.monotonic() + 20
        while not answers(port):
            assert time.monotonic() < end
            time.sleep(0.05)
        try:
            exec(client, names)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        return names

    install, *trainings, serving = [shlex.split(line) for line in commands.splitlines()]
    assert install[:2] == ["pip", "install"]
    assert len(trainings) == 2
    for words in trainings:
        succeed(*words[1:], *SHORT)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, {})
        output = succeed(*serving[1:])
        names = asked.result()
    names["client"].close()
    assert names["made"].usage.completion_tokens > 0
    assert "serving smollm2-135m, python, problems on " in output
    assert len(re.findall(r" 200 (?:stop|length): ", output)) == 2
