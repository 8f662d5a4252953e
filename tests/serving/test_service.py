"""The service with openai's own client: each task's tokens, streams, stops, refusals, and clients that leave."""

import http.client
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch
from tiny import make_llama
from tiny_run import free_port, listens

from mft.masks.bank import load_mask_bank
from mft.models.pretrained import save_model
from mft.serving.api.body import read_body
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.slabs import LEAST

PROMPTS = ["3 4 5", "7", "1 2 3 4 5 6 7 8 9", "40 41", "9 9 9 9", "12 13 14", "5 50", "33"]
MIXED = ["code", "tiny", "math", "code", "math", "tiny", "code", "math"]
LENGTHS = [16, 3, 9, 1, 16, 5, 12, 7]


def generated(bank, words, model, prompt, count):
    """Return what model.generate gives, as text."""
    ids = torch.tensor([words(prompt)["input_ids"]])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with bank.use(None if model == "tiny" else model):
        made = bank.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return words.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def complete(running, model="code", prompt="3 4 5", **options):
    return running.client.completions.create(model=model, prompt=prompt, **{"temperature": 0} | options)


def at_once(function, count=8):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


# ---------------------------------------------------------------------------------------------- tokens


def test_mixed_requests_at_once_get_the_tokens_that_generate_gives_each_alone(serve, words, until):
    running = serve(rows=3)
    found = at_once(lambda i: complete(running, MIXED[i], PROMPTS[i], max_tokens=LENGTHS[i]))
    expected = [generated(running.bank, words, *each) for each in zip(MIXED, PROMPTS, LENGTHS)]
    assert [each.choices[0].text for each in found] == expected
    assert len({generated(running.bank, words, model, "3 4 5", 16) for model in ("code", "math", "tiny")}) == 3
    assert {each.usage.completion_tokens for each in found} == {*LENGTHS}
    assert [each.usage.prompt_tokens for each in found] == [len(prompt.split()) for prompt in PROMPTS]
    assert {each.choices[0].finish_reason for each in found} == {"length"}
    until(lambda: running.scheduler.counts == (0, 0))


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_is_the_whole_answer_in_pieces(serve, words, chat):
    running = serve()
    options = {"model": "math", "temperature": 0, "max_tokens": 9}
    if chat:
        create = running.client.chat.completions.create
        options["messages"] = [{"role": "user", "content": "3 4"}, {"role": "assistant", "content": "5"}]
        expected = generated(running.bank, words, "math", "3 4 60 5 60", 9)
    else:
        create, options["prompt"] = running.client.completions.create, "3 4 5"
        expected = generated(running.bank, words, "math", "3 4 5", 9)
    whole = create(**options)
    chunks = list(create(**options, stream=True, stream_options={"include_usage": True}))
    last = chunks.pop()
    choices = [chunk.choices[0] for chunk in chunks]
    pieces = [(each.delta.content if chat else each.text) or "" for each in choices]
    assert "".join(pieces) == (whole.choices[0].message.content if chat else whole.choices[0].text) == expected
    assert len([piece for piece in pieces if piece]) == 9
    assert [each.finish_reason for each in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)


def test_an_answer_ends_before_a_stop_string_and_a_stream_gives_none_of_it(serve, words):
    running = serve()
    text = generated(running.bank, words, "code", "3 4 5", 16)
    stop = " ".join(text.split()[3:5])
    expected = text[: text.index(stop)]
    assert expected
    found = complete(running, stop=["no such", stop])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
    assert found.usage.completion_tokens == 5
    assert "".join(chunk.choices[0].text for chunk in complete(running, stop=stop, stream=True)) == expected
    assert complete(running, stop=f"{text} more").choices[0].text == text  # text that was held back comes at the end


def test_the_models_end_token_ends_an_answer(serve):
    every = complete(serve(), "tiny").choices[0].text.split()
    model = make_llama(initializer_range=0.3)
    model.generation_config.eos_token_id = [0, int(every[4])]
    found = complete(serve(model=model), "tiny")
    assert found.choices[0].text.split() == every[: every.index(every[4])]
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_gives_its_answer_beside_any_others_and_without_one_answers_differ(serve):
    running = serve()
    options = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 12}
    alone = complete(running, seed=7, **options).choices[0].text
    beside = at_once(lambda i: complete(running, seed=[7, None][i % 2], **options).choices[0].text)
    assert {*beside[::2]} == {alone}
    assert len({*beside[1::2]}) > 1
    greedy = complete(running).choices[0].text
    assert complete(running, temperature=2, top_p=1e-9).choices[0].text == greedy  # one token always remains
    assert complete(running, temperature=1e-30).choices[0].text == greedy


# ---------------------------------------------------------------------------------------------- what is refused


def post(running, body, route="/v1/completions", **headers):
    """Return (status, response) of a request sent as it is."""
    connection = http.client.HTTPConnection(running.address.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json"} | headers
    connection.request("POST", route, body if isinstance(body, bytes) else json.dumps(body), headers)
    response = connection.getresponse()
    status, data = response.status, json.loads(response.read())
    connection.close()
    return status, data


COMPLETION = {"model": "code", "prompt": "3 4"}
CHAT = {"model": "code", "messages": [{"role": "user", "content": "3"}]}
REFUSED = [
    ({"model": "cod"}, 404, "model", "model must be one of tiny, code, math, got 'cod'; did you mean code?"),
    ({"model": 3}, 400, "model", "model must be a valid string, got 3 (int)"),
    ({"prompt": None}, 400, "prompt", "prompt must be given"),
    ({"prompt": ""}, 400, "prompt", "prompt must hold at least one token, got none"),
    ({"prompt": ["3", ""]}, 400, "prompt[1]", "prompt[1] must hold at least one token, got none"),
    ({"prompt": ["3"] * 13}, 400, "prompt", "at most 12 answers (--rows and --waiting), got 13 (13 times 1)"),
    ({"prompt": [3, 61]}, 400, "prompt", "prompt must hold tokens from 0 to 60, got 61"),
    ({"prompt": "3 " * 64}, 400, "prompt", "at most 63 tokens, so that one more fits into 64 (--length), got 64"),
    ({"prompt": "3" * 999}, 400, "prompt", "so that one more fits into 64 (--length), got 199 or more"),
    ({"max_tokens": 63}, 400, "max_tokens", "must be at most 62, the number that the 2 tokens of prompt leave of 64 "),
    ({"temperature": "hot"}, 400, "temperature", "temperature must be a valid number, got 'hot' (str)"),
    ({"top_p": 0}, 400, "top_p", "top_p must be greater than 0, got 0"),
    ({"stop": [""]}, 400, "stop[0]", "stop[0] must have at least 1 character, got '' (str)"),
    ({"n": 13}, 400, "n", "n must ask for at most 12 answers (--rows and --waiting), got 13 (1 times 13)"),
    ({"best_of": 2}, 400, "best_of", "best_of must be left out or as large as n (1), got 2"),
    ({"top_k": -2}, 400, "top_k", "top_k must be greater than or equal to -1, got -2 (int)"),
    ({"min_p": 1.1}, 400, "min_p", "min_p must be less than or equal to 1, got 1.1 (float)"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "must be greater than or equal to 0.01, got 0 (int)"),
    ({"presence_penalty": 3}, 400, "presence_penalty", "presence_penalty must be less than or equal to 2, got 3"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", "must be greater than or equal to -2, got -3 (int)"),
    ({"logprobs": 21}, 400, "logprobs", "logprobs must be less than or equal to 20, got 21 (int)"),
    ({"logit_bias": {"3": 1}}, 400, "logit_bias", "logit_bias must have at most 0 items, got {'3': 1} (dict)"),
    ({"stream_options": {"usage": True}}, 400, "stream_options.usage", "stream_options.usage must be left out"),
]
PICTURE, SYSTEM = [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "system", "content": "3"}]
REFUSED_CHATS = [
    ({"messages": []}, 400, "messages", "messages must have at least 1 item, got [] (list)"),
    ({"messages": PICTURE}, 400, "messages[0].content", "must be a text, or a list of {type: text, text: ...}"),
    ({"messages": SYSTEM}, 400, "messages", "messages must be what the chat template takes: no system here"),
    ({"tools": [{}]}, 400, "tools", "tools must have at most 0 items, got [{}] (list)"),
    ({"tool_choice": "required"}, 400, "tool_choice", "tool_choice must be 'none' or 'auto', got 'required' (str)"),
    ({"response_format": {"type": "json"}}, 400, "response_format.type", "'json_object' or 'json_schema', got 'json'"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "must be given with type"),
    ({"modalities": ["audio"]}, 400, "modalities[0]", "modalities[0] must be 'text', got 'audio' (str)"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "reasoning_effort must be left out"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "top_logprobs must be 0 unless logprobs is true, got 3"),
    ({"continue_final_message": True}, 400, "continue_final_message", "unless the last message is the assistant's"),
]
HARMLESS = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "me"}
HARMLESS |= {"prompt_cache_key": "key", "prompt_cache_retention": "24h", "parallel_tool_calls": False, "tools": []}
HARMLESS |= {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto", "functions": []}
HARMLESS |= {"function_call": "none", "logprobs": False, "top_logprobs": 0, "n": 1, "logit_bias": {}}


def test_a_bad_request_is_told_the_parameter_the_rule_and_the_value(serve, until):
    running = serve()
    for route, whole, cases in (("completions", COMPLETION, REFUSED), ("chat/completions", CHAT, REFUSED_CHATS)):
        for changes, status, param, message in cases:
            found, body = post(running, whole | changes, f"/v1/{route}")
            assert (found, body["error"]["param"], body["error"]["type"]) == (status, param, "invalid_request_error")
            assert message in body["error"]["message"], body
            assert f"{status}: {body['error']['message']}" in running.lines[-1]
    assert post(running, b"{")[1]["error"]["message"].startswith("the body must be JSON")
    assert post(running, [])[1]["error"]["message"].startswith("the body must be ")
    assert post(running, b" " * (1 << 24) + b"{}")[0] == 413
    assert post(running, b'{"model": "code", "prompt": "3", "a\\n\\u001b[2Jb": 1}')[0] == 400
    assert " POST /v1/completions 400: a\\n\\x1b[2Jb must be left out" in running.lines[-1]
    assert post(running, b'{"model": "code", "prompt": "\\ud800"}')[0] == 400
    assert len(json.dumps(post(running, {"k" * 10_000: 1, **COMPLETION, "model": "m" * 9999}))) < 1000
    assert post(running, {}, "/v1/models")[0] == 405
    assert post(running, COMPLETION | {"user": "u", "n": None})[0] == 200
    until(lambda: running.scheduler.counts == (0, 0))


def test_keys_that_ask_for_nothing_change_no_answer(serve):
    create = serve().client.chat.completions.create
    options = {"model": "code", "messages": CHAT["messages"], "temperature": 0, "max_tokens": 8}
    assert create(**options, **HARMLESS).choices == create(**options).choices


def test_a_body_of_another_type_or_size_is_refused_before_it_is_read(serve):
    running = serve()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"):
        status, body = post(running, COMPLETION, **{"Content-Type": kind})
        assert status == 415
        assert body["error"]["message"] == f"Content-Type must be application/json, got '{kind}' (str)"
    assert post(running, COMPLETION, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200
    most = 65536 + 32 * 64
    whole = json.dumps(COMPLETION).encode()
    assert post(running, whole.ljust(most))[0] == 200
    message = "the body must be at most 67584 bytes, 64 KiB and 32 bytes per token of --length, got "
    assert post(running, whole.ljust(most + 1))[1]["error"]["message"] == f"{message}67585"
    chunks = {"Transfer-Encoding": "chunked"}
    data = b"%x\r\n%s\r\n0\r\n\r\n" % (most + 1, whole.ljust(most + 1))
    status, body = post(running, data, **chunks)
    assert (status, body["error"]["message"]) == (413, f"{message}more")


def test_bodies_are_read_beside_the_event_loop(serve, monkeypatch):
    """While one body takes long, another client learns that the service is alive."""
    from mft.serving.api import service

    running, begun, go_on = serve(), threading.Event(), threading.Event()

    def read(kind, data):
        begun.set()
        assert go_on.wait(20)
        return read_body(kind, data)

    monkeypatch.setattr(service, "read_body", read)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, running, COMPLETION)
        assert begun.wait(20)
        assert running.client.models.list().data
        go_on.set()
        assert asked.result()[0] == 200


def test_a_chat_with_a_model_that_has_no_template_is_refused(serve, words, monkeypatch):
    monkeypatch.setattr(words, "chat_template", None)
    status, body = post(serve(), CHAT, "/v1/chat/completions")
    assert (status, body["error"]["param"]) == (400, "messages")
    assert "messages must go to a model with a chat template, got one without" in body["error"]["message"]


def test_one_request_too_many_is_refused_and_the_others_are_answered(serve, gate, until):
    running = serve(rows=2, waiting=3)
    gate.clear()
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(complete, running, max_tokens=4) for _ in range(5)]
        until(lambda: sum(running.scheduler.counts) == 5)
        message = r"requests must be at most 5 at once, 2 answered \(--rows\) and 3 waiting \(--waiting\), got 1 more"
        with pytest.raises(openai.RateLimitError, match=message) as error:
            complete(running)
        assert (error.value.code, error.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "1")
        gate.set()
        assert len({each.result().choices[0].text for each in asked}) == 1
    assert complete(running).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_longer_than_a_request_may_is_refused_and_frees_its_place(serve, gate, until, stream):
    running = serve(rows=1, timeout=0.5)
    gate.clear()

    def ask(_):
        found = complete(running, max_tokens=60, stream=stream)
        return [*found] if stream else found

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, i) for i in range(2)]
        until(lambda: running.scheduler.counts == (1, 1))
        time.sleep(0.5)
        gate.set()
        for each in asked:
            message = r"a request must be answered within 0\.5 s \(--timeout\), got \d tokens by then: ask for fewer"
            with pytest.raises(openai.APIError, match=message):
                each.result()
    until(lambda: running.scheduler.counts == (0, 0) and len(running.lines) == 2)  # a stream has its line after its end
    assert sorted(re.sub(r".* code (504 a request) .*: 3 \+ (\d) .*", r"\1 \2", line) for line in running.lines) == [
        "504 a request 0",
        "504 a request 2",
    ]
    assert complete(running).choices[0].text


def test_an_answer_has_as_many_tokens_as_the_server_says_if_the_request_does_not(serve):
    running = serve(max_tokens=20)
    chat = running.client.chat.completions.create
    messages = CHAT["messages"]
    assert complete(running).usage.completion_tokens == 20
    assert chat(model="code", messages=messages, temperature=0).usage.completion_tokens == 20
    assert complete(running, max_tokens=21).usage.completion_tokens == 21
    assert complete(running, prompt="3 " * 60).usage.completion_tokens == 4


class Hole:
    """A tokenizer without a word for one of its ids, which raises as a Python tokenizer does."""

    def __init__(self, words, hole):
        self._words, self._hole = words, hole

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._words, name)

    def __len__(self):
        return len(self._words)

    def __call__(self, text, **options):
        if text == "unreadable":
            raise KeyError(text)
        return self._words(text, **options)

    def decode(self, tokens, **options):
        if self._hole in tokens:
            raise TypeError("sequence item 0: expected str instance, NoneType found")
        return self._words.decode(tokens, **options)


FAILED = "the server must answer, got an internal error for this request: its log has the traceback"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_decoded_ends_alone(serve, words, caplog, until, stream):
    running = serve()
    texts = [generated(running.bank, words, "code", prompt, 16).split() for prompt in PROMPTS]
    hole = next(word for word in texts[0][2:] if not any(word in text for text in texts[1:]))
    running = serve(tokenizer=Hole(words, int(hole)), rows=8)

    def ask(i):
        try:
            made = complete(running, prompt=PROMPTS[i], stream=stream and not i)
            return " ".join(chunk.choices[0].text for chunk in made) if stream and not i else made.choices[0].text
        except openai.APIError as error:
            return str(error)

    found = at_once(ask)
    assert FAILED in found[0]
    assert [text.split() for text in found[1:]] == texts[1:]
    assert post(running, COMPLETION | {"prompt": "unreadable"})[1]["error"]["message"] == FAILED
    assert "one answer failed, the others go on" in caplog.text
    assert "expected str instance, NoneType found" in caplog.text
    until(lambda: running.scheduler.counts == (0, 0))
    until(lambda: [line for line in running.lines if f" code 500 {FAILED}: 3 + " in line])


def test_a_prompt_that_the_model_cannot_read_ends_its_answer_alone(serve, words, monkeypatch, until):
    running, step = serve(rows=8), RunningBatch.step

    def fail(batch, rows=None):
        if any(row.tokens == [33] for row in rows or batch.rows):
            raise IndexError("index out of range in self")
        return step(batch, rows)

    monkeypatch.setattr(RunningBatch, "step", fail)
    found = at_once(lambda i: post(running, COMPLETION | {"prompt": PROMPTS[i], "temperature": 0}))
    assert PROMPTS[7] == "33"
    assert found[7] == (500, {"error": {"message": FAILED, "type": "server_error", "param": None, "code": None}})
    expected = [generated(running.bank, words, "code", prompt, 16) for prompt in PROMPTS[:7]]
    assert [body["choices"][0]["text"] for _, body in found[:7]] == expected
    until(lambda: running.scheduler.counts == (0, 0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_fails_ends_the_service_and_nobody_waits(serve, monkeypatch):
    running, told = serve(rows=1), []
    running.fails = True

    def fail(batch, _=None):
        running.scheduler.retire(batch.rows[0].task, lambda: told.append("unused"))
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(RunningBatch, "step", fail)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(complete, running, model, max_tokens=4) for model in ("code", "math")]
        for each in asked:
            with pytest.raises(openai.APIError, match="the server must be running, got one that|Connection error"):
                each.result()
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert told == ["unused"]  # so that an unload ends too


def test_rows_that_outgrow_the_cache_wait_for_it_before_those_that_came_later(serve, words, gate, until):
    cache = 4 * LEAST * serve().scheduler._batch.slabs.token_bytes  # four short rows, or two that have grown
    running = serve(rows=4, length=256, cache=cache)
    asked = [(" ".join(["3"] * (LEAST - 12 + i)), 40 if i < 4 else 2) for i in range(5)]
    gate.clear()
    with ThreadPoolExecutor(5) as pool:
        answers = []
        for prompt, count in asked:
            answers.append(pool.submit(complete, running, prompt=prompt, max_tokens=count))
            until(lambda: sum(running.scheduler.counts) == len(answers))
        gate.set()
        found = [each.result().choices[0].text for each in answers]
    assert found == [generated(running.bank, words, "code", *each) for each in asked]
    until(lambda: len(running.events) == 5)
    assert [each["completion_tokens"] for each in running.events].index(2) >= 2
    assert all(each["queue_seconds"] < each["first_token_seconds"] for each in running.events)


# ---------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("place", ["running", "waiting"])
def test_a_client_that_does_not_wait_for_its_answer_frees_its_place(serve, gate, until, place):
    running = serve(rows=1)
    steps = gate.steps
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        if place == "waiting":
            before = pool.submit(complete, running, max_tokens=2)
            until(lambda: running.scheduler.counts == (1, 0))
        with pytest.raises(openai.APITimeoutError):
            complete(running, max_tokens=60, timeout=0.2)
        until(lambda: running.lines)
        assert " code 499 cancelled: 3 + " in running.lines[0]
        assert place == "running" or running.scheduler.counts == (1, 0)
        gate.set()
        assert place == "running" or before.result().usage.completion_tokens == 2
    until(lambda: running.scheduler.counts == (0, 0))
    assert gate.steps <= steps + 1


# ---------------------------------------------------------------------------------------------- stopping


def test_a_service_that_is_to_stop_answers_what_it_has_taken_and_nobody_new(serve, gate, until):
    running = serve()
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, running, max_tokens=4)
        until(lambda: running.scheduler.counts == (1, 0))
        running.server.should_exit = True
        until(lambda: running.scheduler.is_closing)
        with pytest.raises(openai.APIConnectionError):
            complete(running)
        gate.set()
        assert asked.result().usage.completion_tokens == 4
    running.thread.join(10)
    assert not running.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_longer_than_the_grace_is_cut_with_a_reason(serve, gate, until, stream):
    running = serve(grace=0.2)
    gate.clear()

    def ask():
        found = complete(running, max_tokens=60, stream=stream)
        return [*found] if stream else found

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        until(lambda: running.scheduler.counts == (1, 0))
        running.server.should_exit = True
        until(lambda: running.scheduler.is_cut)
        gate.set()
        with pytest.raises(openai.APIError, match="the server must be running, got one that is stopping"):
            asked.result()
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert "503 the server must be running" in running.lines[0]


def test_the_verb_serves_until_a_signal_comes(cli, exports, tmp_path, words, until):
    """In this process, as a signal would arrive."""
    model, port = save_model(make_llama(initializer_range=0.3), words, tmp_path / "base"), free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20)

    def ask():
        until(lambda: listens(port))
        service = SimpleNamespace(address=f"http://127.0.0.1:{port}")
        statuses = [post(service, {}, Host=name)[0] for name in ("other.example", f"masks.example:{port}", "[::1]")]
        assert statuses == [403, 400, 400]
        message = post(service, {"model": str(model), "prompt": "3"})[1]["error"]["message"]
        assert message == f"model must be one of base, code, math, got {str(model)!r}"
        try:
            stream = client.completions.create(model="code", prompt="3 4 5", max_tokens=16, temperature=0, stream=True)
            pieces = [next(stream).choices[0].text]
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        pieces += [chunk.choices[0].text for chunk in stream]
        return "".join(pieces)

    masks = [word for task in exports for word in ("--masks", f"{task}={exports[task]}")]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        options = ("--dtype", "float32", "--port", port, "--allow-host", "masks.example")
        code, output = cli("serve", "--model", str(model), *masks, *options)
        text = asked.result()
    client.close()
    assert code == 0, output
    assert f"serving base, code, math on http://127.0.0.1:{port}/v1" in output
    assert text == generated(load_mask_bank(make_llama(initializer_range=0.3), exports), words, "code", "3 4 5", 16)
    assert output.splitlines()[-1].endswith(" info stopped")
