"""Masks that come and go while requests are answered: vLLM's routes for adapters."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from tiny import make_llama

from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.serving.api import adapter_routes
from mft.serving.batch.scheduler import Scheduler
from mft.serving.refusal import Refused

ASKED = {"prompt": "3 4 5", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def root(exports):
    """Return the directory of exports: code, math, and other (of another base)."""
    root = Path(exports["code"]).parent
    save_masks(mask_model(make_llama(initializer_range=0.2), MaskConfig.paper(keep_ratio=0.5)), root / "other")
    return root


def post(running, route, **body):
    return httpx.post(f"{running.address}/v1/{route}_lora_adapter", json=body, timeout=20)


def load(running, name, path, **keys):
    return post(running, "load", lora_name=name, lora_path=str(path), **keys)


def unload(running, name):
    return post(running, "unload", lora_name=name)


def told(response):
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


def names(running):
    return [model.id for model in running.client.models.list()]


def test_masks_are_loaded_by_name_and_unloaded_again(serve, root):
    running = serve(load_from=root)
    before = running.text("code")
    response = load(running, "again", "code")
    assert (response.status_code, response.text) == (200, "Success: again is loaded.")
    assert names(running) == ["tiny", "code", "math", "again"]
    assert running.text("again") == before != running.text("math")
    response = unload(running, "again")
    assert (response.status_code, response.text) == (200, "Success: again is unloaded.")
    assert names(running) == ["tiny", "code", "math"]
    with pytest.raises(openai.NotFoundError, match="model must be one of tiny, code, math, got 'again'"):
        running.text("again")
    assert load(running, "x/y:z", root / "math").status_code == 200  # an absolute path, and a name of the user's choice
    assert running.text("x/y:z") == running.text("math")
    assert [event["event"] for event in running.events if event.get("model") == "again"][::2] == ["loaded", "unloaded"]


def test_unloading_waits_for_the_requests_of_the_task_and_takes_no_more(serve, root, gate, until):
    running = serve(rows=1, load_from=root)
    expected = {model: running.text(model) for model in ("code", "math")}
    gate.clear()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(running.text, model) for model in ("code", "code", "math")]
        until(lambda: running.scheduler.counts == (1, 2))
        unloading = pool.submit(unload, running, "code")
        until(lambda: names(running) == ["tiny", "math"])
        with pytest.raises(openai.NotFoundError):
            running.text("code")
        assert told(unload(running, "code"))[0] == 404
        assert told(load(running, "code", "code"))[2] == (
            "lora_name must be free, got 'code', which is being unloaded: try again later"
        )
        time.sleep(0.1)
        assert not unloading.done()
        assert "code" in running.bank.tasks
        gate.set()
        assert [each.result() for each in asked] == [expected["code"], expected["code"], expected["math"]]
        assert unloading.result().status_code == 200
    assert running.bank.tasks == ("math",)
    assert load(running, "code", "code").status_code == 200
    assert running.text("code") == expected["code"]


def test_a_client_that_leaves_is_not_waited_for(serve, root, gate, until):
    running = serve(rows=1, load_from=root)
    gate.clear()
    stream = running.client.completions.create(model="code", **ASKED | {"max_tokens": 60}, stream=True)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(unload, running, "code")
        until(lambda: "code" not in names(running))
        stream.close()
        until(lambda: running.lines)
        gate.set()
        assert unloading.result().status_code == 200
    assert gate.steps < 10


def test_the_scheduler_itself_takes_no_request_of_an_unloaded_task_nor_one_when_it_ends():
    scheduler, told = Scheduler(SimpleNamespace(bank=SimpleNamespace(tasks=["code"])), rows=2, waiting=0), []
    code, gone, base = (SimpleNamespace(key="", task=task) for task in ("code", "gone", None))
    scheduler.submit([code])
    scheduler.retire("code", lambda: told.append("code"))
    for each in (code, gone):
        with pytest.raises(Refused, match="which has just been unloaded"):
            scheduler.submit([each])
    assert told == []
    scheduler.cancel(code)
    assert told == ["code"]
    scheduler.close()
    with pytest.raises(Refused, match="got one that is stopping"):
        scheduler.submit([base])


def test_masks_are_replaced_in_place_once_the_new_ones_are_read(serve, root):
    running = serve(load_from=root)
    math = running.text("math")
    assert load(running, "code", "other", load_inplace=True).status_code == 400
    assert running.text("code") != math
    assert load(running, "code", "math", load_inplace=True).status_code == 200
    assert running.text("code") == math
    assert names(running) == ["tiny", "math", "code"]


BAD = [
    ("code", "code", 400, "lora_name", "lora_name must be new, got 'code', which has already been loaded: unload it"),
    ("tiny", "code", 400, "lora_name", "lora_name must be another name than the base's, got 'tiny'"),
    ("", "code", 400, "lora_name", "lora_name must name a task by 1 to 128 letters, digits and . _ : / -, the first"),
    ("a b", "code", 400, "lora_name", "the first a letter or a digit, got 'a b'"),
    ("../a", "code", 400, "lora_name", "got '../a'"),
    ("a\nb", "code", 400, "lora_name", "got 'a\\nb'"),
    ("a" * 129, "code", 400, "lora_name", "got 'aaa"),
    ("a" * 257, "code", 400, "lora_name", "lora_name must have at most 256 characters, got 'aaa"),
    ("new", "cod", 404, "lora_path", "lora_path must be a directory, got 'cod'; did you mean"),
    ("new", "", 400, "lora_path", "lora_path must have at least 1 character, got ''"),
    ("new", ".", 400, "lora_path", "(--load-from), as must its files, got '.'"),
    ("new", "../..", 400, "lora_path", "(--load-from), as must its files, got '../..'"),
    ("new", "code/../../../etc", 400, "lora_path", "(--load-from), as must its files, got 'code/../../../etc'"),
    ("new", "/etc", 400, "lora_path", "(--load-from), as must its files, got '/etc'"),
    ("new", "/nowhere", 400, "lora_path", "(--load-from), as must its files, got '/nowhere'"),
    ("new", "a\0b", 400, "lora_path", "(--load-from), as must its files, got 'a\\x00b'"),
    ("new", "link", 400, "lora_path", "(--load-from), as must its files, got 'link'"),
    ("new", "run", 400, "lora_path", "(--load-from), as must its files, got 'run'"),
    ("new", "circle", 404, "lora_path", "lora_path must be a directory, got 'circle'"),
    ("new", "circle/masks", 404, "lora_path", "lora_path must be a directory, got 'circle/masks'"),
    ("new", "a" * 999, 400, "lora_path", "(--load-from), as must its files, got 'aaa"),
    ("new", "linked", 400, "lora_path", "(--load-from), as must its files, got 'linked'"),
    ("new", "linked-run", 400, "lora_path", "(--load-from), as must its files, got 'linked-run'"),
    ("new", "empty", 404, "lora_path", "empty"),
    ("new", "other", 400, "lora_path", "the masks were learned on other weights of the same shapes"),
]


def test_what_cannot_be_loaded_is_one_message_and_nothing_is_lost(serve, root, tmp_path):
    (root / "empty").mkdir()
    (root / "link").symlink_to("/etc")
    (root / "run").mkdir()
    (root / "run" / "masks").symlink_to("/etc")
    (root / "circle").symlink_to(root / "circle")
    outside = shutil.copytree(root / "code", tmp_path / "outside")
    for inside in (root / "linked", root / "linked-run" / "masks"):  # inside, their files outside
        inside.mkdir(parents=True)
        for file in outside.iterdir():
            (inside / file.name).symlink_to(file)
    running = serve(load_from=root)
    for name, path, status, param, message in BAD:
        found = told(load(running, name, path))
        assert (*found[:2], message in found[2]) == (status, param, True), found
    assert names(running) == ["tiny", "code", "math"]
    assert running.text("code") != running.text("math")


def test_clients_load_so_many_tasks_and_an_unknown_name_is_answered_with_a_few(serve, root, monkeypatch):
    monkeypatch.setattr(adapter_routes, "MOST_TASKS", 25)
    running = serve(load_from=root)
    loaded = [load(running, f"task{i}", "code").status_code for i in range(23)]
    assert loaded == [200] * 23
    assert told(load(running, "more", "code")) == (
        400,
        "lora_name",
        "lora_name must be one of at most 25 tasks, got one more: unload another first",
    )
    assert load(running, "task0", "math", load_inplace=True).status_code == 200
    status, _, message = told(unload(running, "more"))
    assert status == 404
    assert message.startswith("lora_name must be one of tiny, code, math, task1, ")
    assert ", task17 and 6 more (GET /v1/models), got 'more'" in message


def test_an_unknown_name_and_the_bases_are_not_unloaded(serve, root):
    running = serve(load_from=root)
    message = "lora_name must be one of tiny, code, math, got 'cod'; did you mean code?"
    assert told(unload(running, "cod")) == (404, "lora_name", message)
    message = "lora_name must be a task's name, got the base's, 'tiny'"
    assert told(unload(running, "tiny")) == (400, "lora_name", message)
    assert told(post(running, "unload", lora_nam="code"))[1:] == (
        "lora_nam",
        "lora_nam must be left out, because it is not a known key here (lora_name); did you mean lora_name?",
    )


def test_clients_change_nothing_unless_the_server_lets_them(serve):
    running = serve()
    for response in (load(running, "a", "code"), unload(running, "code")):
        status, param, message = told(response)
        assert (status, param) == (403, None)
        assert message == (
            "loading and unloading must be switched on at the server, got a server without it: start it with "
            "--load-from DIRECTORY"
        )
    assert names(running) == ["tiny", "code", "math"]


def test_tasks_come_and_go_beneath_running_requests(serve, root):
    """A task that stays gives the same answers throughout; a task that goes gives its answers or a 404."""
    running = serve(rows=4, waiting=32, load_from=root)
    expected, over, counts = {model: running.text(model) for model in ("code", "math")}, threading.Event(), [0, 0]

    def ask(_):
        while not over.is_set():
            assert running.text("code") == expected["code"]
            try:
                assert running.text("math") == expected["math"]
                counts[0] += 1
            except openai.NotFoundError:
                counts[1] += 1

    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(ask, i) for i in range(4)]
        for _ in range(6):
            assert unload(running, "math").status_code == 200
            assert load(running, "math", "math").status_code == 200
            time.sleep(0.02)
        over.set()
        for each in asked:
            each.result()
    assert min(counts) > 0


def test_what_waits_to_be_unloaded_ends_with_the_service(serve, root, gate, until):
    running = serve(rows=1, load_from=root, grace=0.2)
    gate.clear()
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(running.text, "code")
        until(lambda: running.scheduler.counts == (1, 0))
        unloading = pool.submit(unload, running, "code")
        until(lambda: running.scheduler.is_retiring("code"))
        running.server.should_exit = True
        until(lambda: running.scheduler.is_cut)
        gate.set()
        with pytest.raises(openai.InternalServerError):
            asked.result()
        assert unloading.result().status_code == 200
