"""Run the blocks of docs/how-to/serving.md: masks are trained, served until a signal, and used by openai's client."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_run import succeed

from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
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


@pytest.fixture
def page(tiny_llama, tokenizer, tmp_path, monkeypatch):
    """Return the page's text, for a tiny base and a free port, and that port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pretrained.save_model(tiny_llama, tokenizer, tmp_path / "base")
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda dtype: tmp_path / "base")
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return DOC.read_text(encoding="utf-8").replace("8000", str(port)).replace("24-29", "2-3"), port


def served(words, port, ask):
    """Return what mft serve prints, and what ask returns once it answers; then it is stopped."""

    def asked():
        end = time.monotonic() + 20
        while not answers(port):
            assert time.monotonic() < end
            time.sleep(0.05)
        try:
            return ask()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asked)
        return succeed(*words), future.result()


def test_masks_are_loaded_with_an_admins_key_alone(page, tiny_llama, tmp_path):
    text, port = page
    save_masks(mask_model(tiny_llama.bfloat16(), MaskConfig(keep_ratio=0.9)), tmp_path / "runs" / "python")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    (keys,) = (block for block in blocks if "token_urlsafe" in block)
    (loading,) = (block for block in blocks if "load_lora_adapter" in block)
    shell(line for line in keys.splitlines() if "mft serve" not in line)
    serving, *rest = loading.splitlines()
    words = [*shlex.split(serving)[2:], "--port", str(port)]
    _, (by_admin, by_alice) = served(words, port, lambda: (shell(rest), shell(rest, "admin-keys", "api-keys")))
    assert by_admin == "".join(line for line in rest if line.startswith("Success"))
    assert by_alice.count("must be asked for with a key of --admin-keys-file, got 'alice'") == 2


def shell(lines, old="", new=""):
    """Run a block's commands in one shell, and return what they print."""
    script = "\n".join(line.removeprefix("$ ") for line in lines if not line.startswith("Success"))
    script = script.replace(old, new) if old else script
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_blocks_run(page):
    text, port = page
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (client,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}

    install, *trainings, serving = [shlex.split(line) for line in commands.splitlines()]
    assert install[:2] == ["pip", "install"]
    assert len(trainings) == 2
    for words in trainings:
        succeed(*words[1:], *SHORT)
    output, _ = served(serving[1:], port, lambda: exec(client, names))
    names["client"].close()
    assert names["made"].usage.completion_tokens > 0
    assert "serving smollm2-135m, python, problems on " in output
    assert len(re.findall(r" 200 (?:stop|length): ", output)) == 2
