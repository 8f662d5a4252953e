"""The real vLLM over HTTP: switches under load, where each answer comes from a single task, and what is refused."""

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("transformers")

import torch
from real_base import PROMPTS, SETTINGS, make_tasks, masked_base, missing
from real_http import ADDRESS, command, complete, running, task_in_use

import mft.vllm
from mft.masks.export import save_masks

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return make_tasks(tmp_path_factory.mktemp("real"), torch.float32, merged=False)


@pytest.fixture(scope="module")
def server(tasks, tmp_path_factory):
    with running(tasks, tmp_path_factory.mktemp("log") / "server.log") as process:
        yield process


def test_switches_under_load_lose_no_request_and_mix_no_tasks(server):
    alone = {}
    for task in ("code", "maths", None):
        mft.vllm.use(ADDRESS, task)
        assert task_in_use() == task
        alone[task] = [complete(prompt) for prompt in PROMPTS]
    assert len({tuple(texts) for texts in alone.values()}) == 3

    answers, stopped = [], threading.Event()

    def ask(number):
        while not stopped.is_set():
            at = number % len(PROMPTS)
            answers.append((at, complete(PROMPTS[at])))
            number += 1

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(4)]
        for turn in range(6):
            mft.vllm.use(ADDRESS, ("code", "maths", None)[turn % 3])
            time.sleep(1)
        stopped.set()
        for each in asked:
            each.result()
    assert len(answers) > 10
    mixed = [text for at, text in answers if text not in {texts[at] for texts in alone.values()}]
    assert mixed == []
    for task in ("maths", "code", None):
        mft.vllm.use(ADDRESS, task)
        assert [complete(prompt) for prompt in PROMPTS] == alone[task]


def test_a_stream_of_flips_comes_over_http(server, capsys):
    model = masked_base(1, torch.float32)
    mft.vllm.use(ADDRESS, "maths")
    wanted = [complete(prompt) for prompt in PROMPTS]
    size = mft.vllm.MaskStream(ADDRESS, "policy", model).update()
    assert f"policy, step 0: {size:,d} bytes for 210 of 210 layers" in capsys.readouterr().out
    assert task_in_use() == "policy"
    assert [complete(prompt) for prompt in PROMPTS] == wanted
    mft.vllm.use(ADDRESS, None)


def test_a_killed_engine_is_said_and_the_server_ends(server):
    """This must be the last test: it ends the server."""
    import psutil

    [engine] = [each for each in psutil.Process(server.pid).children() if "EngineCore" in " ".join(each.cmdline())]
    engine.kill()
    with pytest.raises(RuntimeError, match=r"must run, got a dead one .*: start it again|must answer"):
        mft.vllm.use(ADDRESS, "maths")
    assert server.wait(60) is not None


@pytest.mark.parametrize(
    ("base_seed", "words"), [(None, "--masks must name a directory, 'code' is"), (5, "expected base sha256:")]
)
def test_a_wrong_start_is_one_line_and_exit_code_2(tmp_path, base_seed, words):
    if base_seed is not None:
        model = masked_base(base_seed, torch.float32)
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[0, 0] += 1
        save_masks(model, tmp_path / "masks")
    started = command("--masks", f"code={tmp_path / 'masks'}")
    done = subprocess.run(started, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
