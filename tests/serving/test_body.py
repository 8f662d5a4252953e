"""Reading a request's body: the first fault ends reading, and a refusal is one sentence."""

import json
import re
import time
import tracemalloc

import pytest

from mft.serving.api.body import MOST_MESSAGES, ChatBody, CompletionBody, most_bytes, read_body
from mft.serving.refusal import Refused

COMPLETION = {"model": "code", "prompt": "3"}
CHAT = {"model": "code", "messages": [{"role": "user", "content": "3"}]}
LENGTH = 8192


def refusal(kind, data):
    with pytest.raises(Refused) as caught:
        read_body(kind, data)
    return caught.value


MANY = {
    "zeros for messages": (ChatBody, '{"model": "m", "messages": [', "0,", "0]}"),
    "empty messages": (ChatBody, '{"model": "m", "messages": [', "{},", "{}]}"),
    "zeros for stop strings": (CompletionBody, '{"model": "m", "prompt": "3", "stop": [', "0,", "0]}"),
    "stop strings": (CompletionBody, '{"model": "m", "prompt": "3", "stop": [', '"a",', '"a"]}'),
    "prompts": (CompletionBody, '{"model": "m", "prompt": [', '"a",', '"a"]}'),
    "lists for tokens": (CompletionBody, '{"model": "m", "prompt": [', "[],", "[]]}"),
    "unknown keys": (CompletionBody, "{", '"%d":0,', '"model": "m", "prompt": "3"}'),
    "unknown keys of a message": (ChatBody, '{"model": "m", "messages": [{', '"%d":0,', '"role": "user"}]}'),
    "biases": (CompletionBody, '{"model": "m", "prompt": "3", "logit_bias": {', '"%d":"",', '"1":1}}'),
    "parts of a text": (ChatBody, '{"model": "m", "messages": [{"role": "user", "content": [', "0,", "0]}]}"),
}


@pytest.mark.parametrize("case", MANY)
def test_a_body_full_of_faults_takes_little_more_memory_than_its_json(case):
    kind, begin, item, end = MANY[case]
    size, parts = len(begin) + len(end), [begin]
    while size + len(item) + 5 < most_bytes(LENGTH):
        parts.append(item % len(parts) if "%d" in item else item)
        size += len(parts[-1])
    data = "".join((*parts, end)).encode()
    assert most_bytes(LENGTH) * 0.9 < len(data) <= most_bytes(LENGTH)
    began = time.monotonic()
    tracemalloc.start()
    refusal(kind, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * len(data)  # {} takes 64 bytes, but 3 in the body
    assert time.monotonic() - began < 5


def test_messages_may_be_2048():
    messages = CHAT["messages"] * MOST_MESSAGES
    assert len(read_body(ChatBody, json.dumps(CHAT | {"messages": messages}).encode()).messages) == MOST_MESSAGES
    found = refusal(ChatBody, json.dumps(CHAT | {"messages": messages * 2}).encode())
    assert found.message.startswith("messages must have at most 2048 items, got [")
    assert found.param == "messages"


FAULTS = [
    *((CompletionBody, COMPLETION | {key: value}) for key in CompletionBody.model_fields for value in (
        *("", "a" * 999, 0, -1, 10**30, 1.5, 1e308, True, [], [""], ["a"] * 9, ["a" * 999], [1.5], [[[]]], {}),
        *({"a": 1}, {"include_usage": 3}, {"include_obfuscation": True}),
    )),
    *((ChatBody, CHAT | {"messages": value}) for value in (
        *("", 0, {}, [], [[]], [""], [{}], [{"role": 3, "content": "3"}], [{"role": "user"}], [{"name": 3}]),
        *([{"role": "user", "content": value}] for value in (0, [0], {}, [{"type": "text", "text": [3]}])),
    )),
    *((ChatBody, value) for value in (0, "", [], CHAT | {"logprobs": True})),
]  # fmt: skip


SENTENCE = re.compile(r"(the body|[a-z_]+(\[0\])?(\.[a-z_]+)?) must (be|have) (False|'system'|[a-z])")


def test_what_refuses_a_body_is_a_sentence_that_names_the_key():
    messages = set()
    for kind, body in FAULTS:
        try:
            read_body(kind, json.dumps(body).encode())
        except Refused as refused:
            messages.add(refused.message)
    assert len(messages) > 100
    assert [each for each in messages if not SENTENCE.match(each) or " should " in each] == []
