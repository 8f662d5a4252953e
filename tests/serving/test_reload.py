"""SIGHUP: keys and masks are read again; faulty ones change nothing."""

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from tiny import make_llama
from tiny_run import free_port, listens

from mft.models.pretrained import save_model
from mft.serving.api.api_keys import ApiKeys
from mft.serving.log import Log, TextLines
from mft.serving.reload import MasksFile, Reload

ASKED = {"prompt": "3 4 5", "temperature": 0, "max_tokens": 8}


@pytest.fixture
def listed(tmp_path, exports):
    """Write a masks file with code and math, each with a directory of its own."""
    for task, directory in exports.items():
        shutil.copytree(directory, tmp_path / task)
    path = tmp_path / "masks.txt"
    path.write_text(f"# tasks\ncode={tmp_path / 'code'}\n\n  math = {tmp_path / 'math'}\n")
    return path


def hang_up(running, masks_file, keys=None):
    """Do what the server does after a signal."""
    reload = Reload(running.log)

    async def run():
        reload.begin(running.tasks, keys, masks_file)
        await reload.run()

    asyncio.run_coroutine_threadsafe(run(), running.server.loop).result(20)


@pytest.fixture
def running(serve, monkeypatch):
    """Return a server whose event loop is known."""
    from mft.serving.server import Server

    startup = Server.startup

    async def remember(server, sockets=None):
        server.loop = asyncio.get_running_loop()
        await startup(server, sockets)

    monkeypatch.setattr(Server, "startup", remember)
    return serve(rows=1)


def test_masks_that_are_listed_otherwise_come_and_go(running, listed, tmp_path):
    file, math, code = MasksFile(listed), running.text("math"), running.text("code")
    listed.write_text(f"math={tmp_path / 'code'}\nnew={tmp_path / 'math'}")
    hang_up(running, file)
    assert set(running.tasks.names) == {"tiny", "math", "new"}
    assert (running.text("math"), running.text("new")) == (code, math)
    assert running.lines[-3].startswith("serving tiny, ")
    before = list(running.lines)
    hang_up(running, file)
    assert running.lines[len(before) :][0].startswith("SIGHUP: ")
    assert not any("loaded " in line for line in running.lines[len(before) :])  # nothing has changed


def test_of_lists_that_overlap_the_newest_wins(running, listed, tmp_path, monkeypatch):
    """While an older list still loads math, the newer one takes both tasks off and adds another one."""
    file, keys = MasksFile(listed), tmp_path / "keys"
    keys.write_text("sk-one")
    keys.chmod(0o600)
    known, begun, go_on, read = ApiKeys(keys, pytest.fail), threading.Event(), threading.Event(), running.bank.read

    def wait(directory, **options):
        begun.set()
        assert go_on.wait(20)
        return read(directory, **options)

    monkeypatch.setattr(running.bank, "read", wait)
    reload = Reload(running.log)

    async def run():
        reload.begin(running.tasks, known, file)
        listed.write_text(f"math={tmp_path / 'code'}\ncode={tmp_path / 'math'}")
        runs = [asyncio.ensure_future(reload.run())]
        await asyncio.to_thread(begun.wait, 20)
        keys.write_text("sk-two")
        for lines in ("faulty", f"new={tmp_path / 'math'}"):
            listed.write_text(lines)
            runs += [asyncio.ensure_future(reload.run()) for _ in range(3)]
            await asyncio.sleep(0.05)
        assert known.find("sk-two")  # keys wait for no masks
        go_on.set()
        await asyncio.gather(*runs)

    asyncio.run_coroutine_threadsafe(run(), running.server.loop).result(20)
    assert running.tasks.names == ("tiny", "new")
    assert file.loaded == {"new": str(tmp_path / "math")}
    assert not any("stay" in line for line in running.lines)


def test_a_faulty_list_changes_nothing(running, listed, tmp_path):
    file, code = MasksFile(listed), running.text("code")
    message = "the masks stay as they were: --masks-file must name each task once, got 'code' twice in line 2 of "
    listed.write_text(f"code={tmp_path}/math\ncode={tmp_path}/math")
    hang_up(running, file)
    assert running.lines[-1].startswith(message)
    assert running.events[-1]["level"] == "ERROR"
    listed.unlink()
    hang_up(running, file)
    assert running.tasks.names == ("tiny", "code", "math")
    assert running.text("code") == code


def test_masks_that_cannot_be_read_leave_the_old_ones_and_the_others_are_loaded(running, listed, tmp_path):
    file, math = MasksFile(listed), running.text("math")
    (tmp_path / "empty").mkdir()
    listed.write_text(f"math={tmp_path / 'empty'}\nnew={tmp_path / 'math'}\ncode={tmp_path / 'code'}")
    hang_up(running, file)
    assert running.text("math") == running.text("new") == math
    assert any(line.startswith("math stays as it was: ") for line in running.lines)
    listed.write_text(f"math={tmp_path / 'empty'}\nnew={tmp_path / 'math'}\ncode={tmp_path / 'code'}")
    shutil.copytree(tmp_path / "code", tmp_path / "empty", dirs_exist_ok=True)
    hang_up(running, file)  # retries what failed before
    assert running.text("math") == running.text("code") != math


def test_keys_are_read_again_and_a_faulty_file_leaves_the_old_ones(running, tmp_path):
    path = tmp_path / "keys"
    path.write_text("sk-one")
    path.chmod(0o600)
    keys = ApiKeys(path, pytest.fail)
    path.write_text("sk-two")
    hang_up(running, None, keys)
    assert (keys.find("sk-one"), bool(keys.find("sk-two"))) == (None, True)
    path.write_text("")
    hang_up(running, None, keys)
    assert keys.find("sk-two")
    assert running.lines[-1].startswith("the keys stay as they were: --api-keys-file must hold at least one key")
    assert "sk-two" not in "".join(running.lines)


def test_a_signal_reaches_the_verb_whose_requests_go_on(cli, listed, tmp_path, words, until, gate):
    """In this process: SIGHUP with one row running, then SIGTERM."""
    model = save_model(make_llama(initializer_range=0.3), words, tmp_path / "base")
    keys, port = tmp_path / "keys", free_port()
    keys.write_text("sk-one\n")
    keys.chmod(0o644)
    (admins := tmp_path / "admins").write_text("root sk-root-1")
    admins.chmod(0o600)
    address = f"http://127.0.0.1:{port}"

    def models(key):
        response = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"})
        return [each["id"] for each in response.json()["data"]] if response.status_code == 200 else response.status_code

    def ask():
        until(lambda: listens(port))
        try:
            assert models("sk-one") == ["base", "code", "math"]
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="sk-one", max_retries=0, timeout=20)
            gate.clear()
            stream = client.completions.create(model="math", stream=True, **ASKED | {"max_tokens": 400})
            next(stream)
            keys.write_text("two sk-two-22 math\n")
            admins.write_text("root sk-root-2")
            listed.write_text(f"more={tmp_path / 'code'}\nmath={tmp_path / 'math'}")
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: models("sk-root-2") == ["base", "math", "more"])
            assert (models("sk-one"), models("sk-root-1"), models("sk-two-22")) == (401, 401, ["math"])
            gate.set()
            finish = [chunk.choices[0].finish_reason for chunk in stream][-1]
            client.close()
            return finish
        finally:
            gate.set()
            os.kill(os.getpid(), signal.SIGTERM)

    options = ["--model", str(model), "--masks-file", str(listed), "--api-keys-file", str(keys)]
    options += ["--admin-keys-file", str(admins)]
    options += ["--dtype", "float32", "--port", port, "--log-format", "json", "--log-zone", "UTC"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        code, output = cli("serve", *options)
        assert asked.result() == "stop"
    assert code == 0, output
    lines = [json.loads(line) for line in output.splitlines()]
    events = [line["event"] for line in lines]
    assert events[:4] == ["warning", "loading", "cache", "ready"]
    assert events[-1] == "stopped"
    assert {"reloading", "reloaded", "loaded", "unloaded", "answer", "refusal"} <= set(events)
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert not any(key in output for key in ("sk-one", "sk-two", "sk-root"))


def test_a_signal_before_the_server_is_ready_is_kept():
    """While the model loads there is nothing to change yet, and SIGHUP must not end the process."""
    lines = []
    reload = Reload(Log(TextLines(None), "info", lines.append))
    with reload.catching_hang_up():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        assert lines == []

        async def ready():
            reload.begin(None, None, None)
            await asyncio.sleep(0.05)

        asyncio.run(ready())
    assert len(lines) == 1
