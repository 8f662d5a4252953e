"""The routes of a vLLM server, on an engine that only records calls: the order of a switch, its failures, strangers."""

import asyncio
import importlib.util
import json
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("starlette")

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from mft.vllm.serve import read_keys

USE, UPDATE = "/v1/mft/use", "/v1/mft/update"


@pytest.fixture(autouse=True)
def vllm_or_its_two_classes(monkeypatch):
    """Without vLLM, put what endpoint.py imports from it in its place."""
    if importlib.util.find_spec("vllm") is None:
        name = ""
        for part in ("vllm", "distributed", "weight_transfer", "base"):
            name = f"{name}.{part}".lstrip(".")
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].WeightTransferInitRequest = sys.modules[name].WeightTransferUpdateRequest = dict
        monkeypatch.delitem(sys.modules, "mft.vllm.endpoint", raising=False)


class Noted:
    """An engine. fails: the call that raises; refuses: the call that returns False; hangs: the call without an answer,
    after which the engine is dead.
    """

    def __init__(self, fails=None, refuses=None, hangs=None):
        self.calls, self.errored, self._fails, self._refuses, self._hangs = [], False, fails, refuses, hangs

    def __getattr__(self, name):
        async def call(*_, **__):
            self.calls.append(name)
            if name == self._hangs:
                self.errored = True
                await asyncio.Event().wait()
            if name == self._fails:
                raise Exception("Call to update_weights method failed: mft: no such task")
            return name != self._refuses

        return call


def ask(engine, body=b'{"task": "code"}', path=USE, headers=(), length=None, **more):
    """Return (status, answer) of a POST, the task that the server then reports, and whether the body was read.

    headers: in place of those that a program sends. more: the server's arguments.
    """
    from mft.vllm.endpoint import MaskEndpoint

    given = {"host": "127.0.0.1:8000", "content-type": "application/json", "content-length": str(length or len(body))}
    given |= dict(headers)
    sent, read = [], []

    async def call(app, method, path, headers):
        async def receive():
            read.append(method)
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b""}
        await app(scope, receive, send)
        start, answer = sent[-2:]
        return start["status"], json.loads(answer["body"])

    async def asked():
        endpoint, app = MaskEndpoint(), Starlette()
        endpoint.attach_router(app)
        models = SimpleNamespace(lora_requests={"code": SimpleNamespace(lora_int_id=1)})
        state = SimpleNamespace(openai_serving_models=models)
        await endpoint.init_state(engine, state, Namespace(host="127.0.0.1", mft_tasks={"code": "runs/code"}, **more))
        answer = await call(app, "POST", path, given)
        tasks = await call(app, "GET", "/v1/mft/tasks", {"authorization": "Bearer sk-1234567"})
        return *answer, tasks[1]["task"], "POST" in read

    return asyncio.run(asked())


def test_a_switch_pauses_updates_empties_the_cache_and_goes_on():
    engine = Noted()
    status, _, task, _ = ask(engine)
    assert (status, task) == (200, "code")
    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert engine.calls[1:] == ["pause_generation", *update, "reset_prefix_cache", "resume_generation"]


def test_a_switch_that_fails_goes_on_with_the_old_task():
    engine = Noted(fails="update_weights")
    status, answer, task, _ = ask(engine)
    assert (status, answer["error"]["message"], task) == (400, "no such task", None)
    assert engine.calls[-1] == "resume_generation"


def test_a_switch_whose_weights_are_written_has_its_name_also_if_the_cache_stays():
    status, answer, task, _ = ask(Noted(refuses="reset_prefix_cache"))
    assert (status, task) == (503, "code")
    assert "must empty its prefix cache" in answer["error"]["message"]


def test_with_a_task_for_each_request_there_is_no_switch():
    engine = Noted()
    status, answer, task, was_read = ask(engine, mft_per_request=True)
    assert (status, task) == (400, None)
    assert was_read  # else a client that is still sending loses its connection, and with it the answer
    assert answer["error"]["message"].startswith("task must come with each request")
    assert engine.calls == ["init_weight_transfer_engine"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (USE, b""),
        (USE, b"[]"),
        (USE, b'{"task": "code", "more": 1}'),
        (USE, b'{"task": 3}'),
        (USE, b'{"task": ["code"]}'),
        (USE, b'{"task": "cod"}'),
        (UPDATE, b'{"task": "code"}'),
        (UPDATE, b'{"task": null, "flips": {}}'),
        (UPDATE, b'{"task": 3, "flips": {}}'),
        (UPDATE, b'{"task": "new", "flips": null}'),
    ],
)
def test_another_body_is_refused_before_the_engine_is_asked(path, body):
    engine = Noted()
    status, answer, _, _ = ask(engine, body, path)
    assert status == answer["error"]["code"] == 400
    assert " must be " in answer["error"]["message"]
    assert engine.calls == ["init_weight_transfer_engine"]


@pytest.mark.parametrize("path", [USE, UPDATE])
@pytest.mark.parametrize(
    ("status", "words", "headers"),
    [
        (415, "Content-Type must be application/json, got 'text/plain' (str)", {"content-type": "text/plain"}),
        (415, "Content-Type must be application/json, got '' (str)", {"content-type": ""}),
        (
            403,
            "Host must be a name of this machine's loopback, such as localhost, got 's.org'",
            {"host": "s.org"},
        ),
        (403, "Origin must be one that --allowed-origins names", {"origin": "http://stranger.example"}),
        (403, "Origin must be one that --allowed-origins names", {"origin": "null"}),
        (413, "the body must be at most ", {"content-length": str(1 << 40)}),
    ],
)
def test_a_page_of_another_site_switches_nothing(path, status, words, headers):
    """vLLM allows all origins by default, so a browser lets any page send JSON."""
    engine = Noted()
    got, answer, task, was_read = ask(engine, path=path, headers=headers, allowed_origins=["*"])
    assert (got, answer["error"]["code"], task, was_read) == (status, status, None, False)
    assert words in answer["error"]["message"]
    assert engine.calls == ["init_weight_transfer_engine"]


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ({"host": "localhost"}, {}),
        ({"host": "[::1]:8000"}, {}),
        ({"origin": "http://ui.example"}, {"allowed_origins": ["http://ui.example"]}),
        ({"content-type": "Application/JSON; charset=utf-8"}, {}),
    ],
)
def test_what_the_operator_allows_may_switch(headers, more):
    assert ask(Noted(), headers=headers, **more)[0] == 200


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "users").write_text("alice sk-1234567\n")
    (tmp_path / "admins").write_text("root sk-7654321\n")
    return read_keys(tmp_path / "users", tmp_path / "admins")


@pytest.mark.parametrize(
    ("path", "sent", "status", "words"),
    [
        (USE, "", 401, "Authorization must be Bearer and one of the server's keys"),
        (USE, "Bearer sk-2", 401, "got another key"),
        (USE, "Bearer sk-1234567", 403, "a switch must be asked for with a key of --admin-keys-file, got 'alice'"),
        (USE, "Bearer sk-7654321", 200, None),
        (UPDATE, "Bearer sk-1234567", 403, "got 'alice' of --api-keys-file"),
        ("/invocations", "", 401, "got none"),  # of vLLM, outside of /v1
    ],
)
def test_with_keys_only_admins_switch(keys, caplog, path, sent, status, words):
    with caplog.at_level("INFO", "uvicorn.error"):
        got, answer, task, _ = ask(Noted(), path=path, headers={"authorization": sent}, mft_keys=keys)
    assert (got, task) == (status, None if words else "code")
    assert words is None or words in answer["error"]["message"]
    name = {"Bearer sk-1234567": " (alice)", "Bearer sk-7654321": " (root)"}.get(sent, "")
    assert f"{name} POST {path} {status}" in caplog.text


def test_with_keys_health_needs_none_and_no_websocket_passes(keys):
    async def opened(path, kind):
        from mft.vllm.endpoint import MaskEndpoint

        realtime = WebSocketRoute("/v1/realtime", lambda socket: socket.accept())
        endpoint, app, sent = MaskEndpoint(), Starlette(routes=[realtime]), []
        endpoint.attach_router(app)
        await endpoint.init_state(Noted(), None, Namespace(mft_tasks={"code": "runs/code"}, mft_keys=keys))

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "method": "GET", "path": path, "headers": [], "query_string": b""}
        await app(scope, receive, send)
        return sent[0]

    assert asyncio.run(opened("/health", "http"))["status"] == 404  # of an app without vLLM's routes
    assert asyncio.run(opened("/v1/models", "http"))["status"] == 401
    assert asyncio.run(opened("/v1/realtime", "websocket"))["type"] == "websocket.close"


def test_a_body_longer_than_it_said_is_refused():
    status, answer, task, _ = ask(Noted(), b'{"task": "code"}'.ljust(1 << 15), length=1)
    assert (status, task) == (413, None)
    assert answer["error"]["message"] == "the body must be at most 16384 bytes, got more"


@pytest.mark.parametrize("call", ["pause_generation", "update_weights", "reset_prefix_cache"])
def test_an_engine_that_dies_in_a_switch_is_said_and_not_waited_for(call):
    status, answer, task, _ = ask(Noted(hangs=call))
    assert (status, task) == (503, "code" if call == "reset_prefix_cache" else None)
    assert answer["error"]["message"].startswith("vLLM's engine must run, got a dead one")
