"""The routes of a vLLM server, on an engine that only records calls: the order of a switch, and its failures."""

import asyncio
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from real_base import missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Noted:
    """An engine. fails: the call that raises; hangs: the call without an answer, after which the engine is dead."""

    def __init__(self, fails=None, hangs=None):
        self.calls, self.errored, self._fails, self._hangs = [], False, fails, hangs

    def __getattr__(self, name):
        async def call(*_, **__):
            self.calls.append(name)
            if name == self._hangs:
                self.errored = True
                await asyncio.Event().wait()
            if name == self._fails:
                raise Exception("Call to update_weights method failed: mft: no such task")
            return True

        return call


def ask(engine, task="code", **more):
    """Return (status, body) of POST /v1/mft/use, and the task that the server then reports. more: its arguments."""
    from mft.vllm.endpoint import MaskEndpoint

    class Request:
        read = False

        async def body(self):
            Request.read = True
            return json.dumps({"task": task}).encode()

    async def asked():
        endpoint = MaskEndpoint()
        models = SimpleNamespace(lora_requests={"code": SimpleNamespace(lora_int_id=1)})
        state = SimpleNamespace(openai_serving_models=models)
        await endpoint.init_state(engine, state, Namespace(mft_tasks={"code": "runs/code"}, **more))
        answer = await endpoint.use(Request())
        assert Request.read  # else a client that is still sending loses its connection, and with it the answer
        return answer.status_code, json.loads(answer.body), json.loads((await endpoint.tasks()).body)["task"]

    return asyncio.run(asked())


def test_a_switch_pauses_updates_empties_the_cache_and_goes_on():
    engine = Noted()
    status, _, task = ask(engine)
    assert (status, task) == (200, "code")
    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert engine.calls[1:] == ["pause_generation", *update, "reset_prefix_cache", "resume_generation"]


def test_a_switch_that_fails_goes_on_with_the_old_task():
    engine = Noted(fails="update_weights")
    status, body, task = ask(engine)
    assert (status, body["error"]["message"], task) == (400, "no such task", None)
    assert engine.calls[-1] == "resume_generation"


def test_with_a_task_for_each_request_there_is_no_switch():
    engine = Noted()
    status, body, task = ask(engine, mft_per_request=True)
    assert (status, task) == (400, None)
    assert body["error"]["message"].startswith("task must come with each request")
    assert engine.calls == ["init_weight_transfer_engine"]


@pytest.mark.parametrize("call", ["pause_generation", "update_weights", "reset_prefix_cache"])
def test_an_engine_that_dies_in_a_switch_is_said_and_not_waited_for(call):
    status, body, task = ask(Noted(hangs=call))
    assert (status, task) == (503, None)
    assert body["error"]["message"].startswith("vLLM's engine must run, got a dead one")
