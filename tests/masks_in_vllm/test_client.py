"""The calls of mft.vllm on an LLM, their order, and the error for each failure; here the LLM only records calls."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from served import Served, is_plain, same_bits, scattered
from tiny import make_llama

import mft.vllm
from mft.masks.convert import masked_modules
from mft.vllm.mask_flips import read_flips
from mft.vllm.remote import change_server
from mft.vllm.slices import Slices
from mft.vllm.task_masks import Tasks
from mft.vllm.worker_errors import mark_errors, sentence_of, unmark_errors

CAUSE = "please check the stack trace above for the root cause"
WRAPPED = f"Call to collective_rpc method failed: Worker failed with error '{{}}', {CAUSE}"


class Noted:
    """An LLM that records calls; ``update`` is its worker's answer to update_weights."""

    def __init__(self, update=lambda info: None, busy=False, empties=True, dead=False):
        self.calls, self._update, self._empties = [], update, empties
        core = SimpleNamespace(resources=SimpleNamespace(engine_dead=dead))
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: busy, engine_core=core)

    def init_weight_transfer_engine(self, request):
        self.calls.append(("init", request["init_info"]))

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, request):
        self.calls.append("update")
        self._update(request["update_info"])

    def finish_weight_update(self, version):
        self.calls.append(("finish", version))

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return self._empties


def test_a_switch_updates_then_empties_the_prefix_cache():
    llm = Noted()
    mft.vllm.add_tasks(llm, {"code": "runs/code"})
    mft.vllm.use(llm, "code")
    mft.vllm.use(llm, None)
    init = ("init", {"tasks": {"code": "runs/code"}, "force": False})
    assert llm.calls == [
        init,
        *("start", "update", ("finish", "code"), "reset"),
        *("start", "update", ("finish", "base"), "reset"),
    ]


@pytest.mark.parametrize(
    ("llm", "kind", "words"),
    [
        ({"busy": True}, ValueError, "answered all requests before its masks change"),
        ({"empties": False}, RuntimeError, "must empty its prefix cache"),
        # vLLM does not answer the call.
        ({"update": lambda info: threading.Event().wait(), "dead": True}, RuntimeError, "must run, got a dead one"),
    ],
    ids=["it answers", "its cache stays", "its engine dies"],
)
def test_a_switch_that_cannot_be_is_an_error(llm, kind, words):
    llm = Noted(**llm)
    with pytest.raises(kind, match=words):
        mft.vllm.use(llm, "code")
    assert llm.calls == [] or kind is RuntimeError


def test_what_a_worker_refuses_arrives_as_its_sentence():
    def refuse(info):
        try:
            with mark_errors():
                raise ValueError("task must be one of the server's (a, b), got 'c's'")
        except ValueError as error:
            raise Exception(WRAPPED.format(error)) from None  # like vLLM

    with pytest.raises(ValueError, match=r"^task must be one of the server's \(a, b\), got 'c's'$"):
        mft.vllm.use(Noted(refuse), "c's")


def test_other_failures_stay_what_they_are_and_a_dead_engine_says_what_to_do():
    with pytest.raises(ZeroDivisionError), unmark_errors():
        _ = 1 / 0
    assert sentence_of(Exception("Call to update_weights method failed: out of memory")) is None
    dead = type("EngineDeadError", (Exception,), {})
    with pytest.raises(RuntimeError, match="engine must run, got a dead one .*: start it again"), unmark_errors():
        raise dead


def test_a_stream_sends_the_merged_model_in_flips_and_says_its_bytes(capsys):
    served = Served(make_llama(torch.bfloat16))
    before = served.weights()
    tasks = Tasks(Slices(served, is_plain).find)

    def update(info):
        if "flips" in info:
            tasks.flip(info["task"], read_flips(info["flips"]))
        else:
            tasks.use(info["task"])

    model = scattered(make_llama(torch.bfloat16), 0.1, seed=0)
    stream = mft.vllm.MaskStream(Noted(update), "policy", model)
    sizes = []
    for _ in range(3):
        sizes.append(stream.update())
        merged = {name: layer.merged_weight() for name, layer in masked_modules(model).items()}
        assert same_bits(served.weights(), before | merged)
        layer = next(iter(masked_modules(model).values()))
        layer.scores.data.view(-1)[:5] *= -3
    assert sizes[0] > 20 * sizes[1]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"policy, step 0: {sizes[0]:,d} bytes for 28 of 28 layers (")
    assert out[1].startswith(f"policy, step 1: {sizes[1]:,d} bytes for 1 of 28 layers (")


def test_a_step_that_was_refused_is_sent_again():
    def refuse(info):
        raise Exception(WRAPPED.format("mft: no"))

    llm = Noted(refuse)
    stream = mft.vllm.MaskStream(llm, "policy", scattered(make_llama(), 0.1, seed=0))
    with pytest.raises(ValueError, match="no"):
        stream.update()
    assert stream.step == 0
    llm._update = lambda info: None
    assert stream.update() > 0


def test_a_server_is_asked_over_http():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known = b"code" in body
            self.send_response(200 if known else 400)
            self.end_headers()
            self.wfile.write(b"{}" if known else b'{"error": {"message": "task must be one of the server\'s"}}')
            asked.append((self.path, body, self.headers["Authorization"]))

        def log_message(self, *_):
            pass

    asked = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        mft.vllm.use(address, "code")
        change_server(f"{address}/", {"task": "code", "flips": {}}, "sk-1234567")
        with pytest.raises(ValueError, match="^task must be one of the server's$"):
            mft.vllm.use(address, "cod")
        server.shutdown()
    assert asked[:2] == [
        ("/v1/mft/use", b'{"task": "code"}', None),
        ("/v1/mft/update", b'{"task": "code", "flips": {}}', "Bearer sk-1234567"),
    ]
    with pytest.raises(RuntimeError, match=r"must answer, got .*: is python -m mft.vllm running\?"):
        mft.vllm.use(address, "code")
    with pytest.raises(ValueError, match="server's address such as http://127.0.0.1:8000, got 'localhost'"):
        mft.vllm.use("localhost", "code")
