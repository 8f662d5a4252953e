"""What clients ask for besides a text: several answers, log-probabilities, echoes, chats that go on, and JSON."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from tiny import make_llama

from mft.models.pretrained import save_model

PROMPTS = ["3 4 5", "7", "9 9 9 9"]


def complete(running, prompt=PROMPTS[0], **options):
    return running.client.completions.create(model="code", prompt=prompt, **{"temperature": 0} | options)


def chat(running, *messages, **options):
    asked = [{"role": role, "content": content} for role, content in messages]
    return running.client.chat.completions.create(model="code", messages=asked, **{"temperature": 0} | options)


def own_logprobs(running, tokens):
    """Return log-probabilities (n - 1, V) of the tokens after the first, from the model itself."""
    with running.bank.use("code"), torch.no_grad():
        return running.bank.model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


# ---------------------------------------------------------------------------------------------- several answers


def test_several_prompts_and_choices_are_those_of_each_alone_in_their_order(serve):
    running = serve(rows=3, waiting=9)
    options = {"temperature": 1.5, "seed": 5, "max_tokens": 6}
    found = complete(running, PROMPTS, n=3, **options)
    alone = [complete(running, prompt, n=3, **options) for prompt in PROMPTS]
    assert [each.index for each in found.choices] == list(range(9))
    assert [each.text for each in found.choices] == [each.text for one in alone for each in one.choices]
    assert len({each.text for each in found.choices[:3]}) == 3
    assert found.choices[3].text == complete(running, PROMPTS[1], **options).choices[0].text
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3 + 1 + 4, 54)
    ids = [[int(word) for word in prompt.split()] for prompt in PROMPTS]
    assert complete(running, ids, n=3, **options).choices == found.choices
    chunks = list(complete(running, PROMPTS, n=3, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].usage == found.usage
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    for each in found.choices:
        own = [piece for piece in pieces if piece.index == each.index]
        assert "".join(piece.text for piece in own) == each.text
        assert [piece.finish_reason for piece in own if piece.finish_reason] == ["length"]


def test_chats_stream_a_role_for_each_choice(serve):
    chunks = list(chat(serve(), ("user", "3"), n=2, max_tokens=2, stream=True))
    assert [(each.choices[0].index, each.choices[0].delta.role) for each in chunks[:2]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    assert sorted(each.choices[0].index for each in chunks if each.choices[0].finish_reason) == [0, 1]


def test_all_answers_of_a_request_find_a_place_or_none_does(serve, gate, until):
    running = serve(rows=1, waiting=3)
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, running, n=2, max_tokens=3)
        until(lambda: sum(running.scheduler.counts) == 2)
        with pytest.raises(openai.RateLimitError, match="requests must be at most 4 at once, .* got 3 more"):
            complete(running, PROMPTS)
        assert sum(running.scheduler.counts) == 2
        gate.set()
        assert len(asked.result().choices) == 2


def test_a_client_that_leaves_its_stream_frees_the_rows_of_all_its_answers(serve, gate, until):
    running = serve(rows=2)
    stream = complete(running, PROMPTS, n=2, max_tokens=50, stream=True)
    next(stream)
    gate.clear()
    stream.close()
    until(lambda: len(running.lines) == 6)
    before = gate.steps
    gate.set()
    until(lambda: running.scheduler.counts == (0, 0))
    assert gate.steps <= before + 1  # of 49: only a step that had begun when it left
    assert all(" 499 cancelled: " in line for line in running.lines)


def test_one_answer_that_fails_refuses_its_request_and_frees_the_others(serve, until):
    model = make_llama(initializer_range=0.3)
    with torch.no_grad():
        model.model.embed_tokens.weight[33] = float("nan")
    running = serve(model=model)
    with pytest.raises(openai.InternalServerError, match="the model's logits must be numbers, got NaN"):
        complete(running, ["3", "33"], max_tokens=50)
    until(lambda: running.scheduler.counts == (0, 0))
    with pytest.raises(openai.InternalServerError, match="the model's logits must be numbers, got NaN"):
        complete(running, "33 3", max_tokens=0, echo=True, logprobs=1)


# ---------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_an_echo_has_the_log_probabilities_of_the_model_itself(serve, max_tokens):
    running = serve()
    found = complete(running, max_tokens=max_tokens, echo=True, logprobs=2, presence_penalty=2).choices[0]
    tokens = [int(word) for word in found.text.split()]
    expected = own_logprobs(running, tokens)
    assert tokens[:3] == [3, 4, 5]
    assert len(tokens) == 3 + max_tokens
    assert found.logprobs.tokens == [f" {token}"[not at :] for at, token in enumerate(tokens)]
    assert [found.text[at:].strip().split()[0] for at in found.logprobs.text_offset] == found.text.split()
    assert (found.logprobs.token_logprobs[0], found.logprobs.top_logprobs[0]) == (None, None)
    for row, token, logprob, top in zip(
        expected, tokens[1:], found.logprobs.token_logprobs[1:], found.logprobs.top_logprobs[1:], strict=True
    ):
        assert logprob == top[f" {token}"] == pytest.approx(row[token].item(), abs=1e-4)
        named = {int(word) for word in top}
        assert named == {*row.topk(2).indices.tolist(), token}
    pieces = [each.choices[0] for each in complete(running, max_tokens=max_tokens, echo=True, logprobs=2, stream=True)]
    told = complete(running, max_tokens=max_tokens, echo=True, logprobs=2).choices[0].logprobs
    assert [at for piece in pieces for at in piece.logprobs.text_offset] == told.text_offset
    assert [each for piece in pieces for each in piece.logprobs.token_logprobs] == told.token_logprobs


def test_a_chat_tells_the_likeliest_tokens(serve):
    running = serve()
    found = chat(running, ("user", "3"), max_tokens=3, logprobs=True, top_logprobs=2).choices[0]
    tokens = [int(word) for word in found.message.content.split()]
    expected = own_logprobs(running, [3, 60, *tokens])[1:]
    for row, token, told in zip(expected, tokens, found.logprobs.content, strict=True):
        assert (told.token, bytes(told.bytes).decode()) == (f" {token}", f" {token}")
        assert told.logprob == told.top_logprobs[0].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [int(each.token) for each in told.top_logprobs] == row.topk(2).indices.tolist()
    stream = chat(running, ("user", "3"), max_tokens=3, logprobs=True, top_logprobs=2, stream=True)
    told = [each for chunk in stream if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.model_dump() for each in told] == [each.model_dump() for each in found.logprobs.content]


def test_tokens_that_are_parts_of_a_character_have_their_bytes(tokenizer):
    from mft.serving.api.token_texts import Offsets, TokenTexts

    texts, text = TokenTexts(tokenizer), "naïve 🙂🙂 日本"
    tokens = tokenizer(text)["input_ids"]
    assert b"".join(texts.within(token)[1] for token in tokens).decode() == text
    offsets = Offsets(texts, text)
    placed = [offsets.add(token) for token in tokens]
    whole = [(piece, at) for piece, at in placed if "\ufffd" not in piece]
    assert all(text[at:].startswith(piece) for piece, at in whole)
    assert 4 <= len(whole) < len(tokens)
    assert placed[-1][1] < len(text)


@pytest.mark.parametrize("options", ["tokenized_requests=True", "tokenized_requests=False,num_concurrent=2"])
def test_lm_eval_scores_over_http_what_it_scores_on_the_model_itself(serve, tiny_llama, tokenizer, tmp_path, options):
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    base = save_model(tiny_llama, tokenizer, tmp_path / "base")
    running = serve(model=tiny_llama, tokenizer=tokenizer, masks={})
    given = dict(word.split("=") for word in options.split(",")) | {"tokenized_requests": "True" in options}
    http = LocalCompletionsAPI(
        f"{running.address}/v1/completions", "huggingface", model="tiny", tokenizer=str(base), batch_size=3, **given
    )
    own = HFLM(pretrained=tiny_llama, tokenizer=tokenizer, batch_size=1)
    pairs = [
        ("2 + 2 =", " 4"),
        ("The capital of France is", " Paris, naïve"),
        ("def add(a, b):", "\n    return"),
        ("Yes", " and no"),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (found, greedy), (expected, likeliest) in zip(http.loglikelihood(asked), own.loglikelihood(asked), strict=True):
        assert (found, greedy) == (pytest.approx(expected, abs=1e-3), likeliest)
    until = {"until": ["\n\n", *"abcde"], "max_gen_toks": 6, "do_sample": False}
    asked = [Instance("generate_until", {}, (context, dict(until)), i) for i, (context, _) in enumerate(pairs)]
    assert http.generate_until(asked) == own.generate_until(asked)


# ---------------------------------------------------------------------------------------------- chats and tokens


def test_a_developer_is_a_system_and_a_last_turn_of_the_assistant_goes_on_if_asked(serve, words, monkeypatch):
    template = "{% for message in messages %}{{ {'system': '50 ', 'user': '51 ', 'assistant': '52 '}[message.role] }}"
    template += "{{ message.content + ' 60 ' }}{% endfor %}{% if add_generation_prompt %}52{% endif %}"
    monkeypatch.setattr(words, "chat_template", template)
    running = serve()
    turns = [("developer", "1"), ("user", "3"), ("assistant", "4 5")]
    url, messages = f"{running.address}/tokenize", [{"role": role, "content": text} for role, text in turns]

    def tokens(**options):
        return httpx.post(url, json={"model": "code", "messages": messages, **options}).json()["tokens"]

    start = [50, 1, 60, 51, 3, 60, 52, 4, 5]
    assert tokens() == [*start, 60, 52]
    assert tokens(add_generation_prompt=False) == [*start, 60]
    assert tokens(continue_final_message=True) == start
    found = chat(running, *turns, max_tokens=4, extra_body={"continue_final_message": True})
    assert found.choices[0].message.content == complete(running, start, max_tokens=4).choices[0].text
    with pytest.raises(openai.BadRequestError, match="continue_final_message must be false if add_generation_prompt"):
        chat(running, *turns, extra_body={"continue_final_message": True, "add_generation_prompt": True})


def test_version_needs_no_key_but_tokenize_does(serve, tmp_path):
    from mft.serving.api.api_keys import ApiKeys
    from mft_kernels import __version__

    (tmp_path / "keys").write_text("secret\n")
    running = serve(keys=ApiKeys(tmp_path / "keys", print))
    assert httpx.get(f"{running.address}/version").json() == {"version": __version__}
    url, body = f"{running.address}/tokenize", {"prompt": "3 4"}
    assert httpx.post(url, json=body).status_code == 401
    key = {"Authorization": "Bearer secret"}
    assert httpx.post(url, json=body, headers=key).json() == {"count": 2, "max_model_len": 64, "tokens": [3, 4]}
    for wrong, param in (({}, "prompt"), (body | {"messages": [{"role": "user", "content": "3"}]}, "prompt")):
        response = httpx.post(url, json=wrong, headers=key)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert httpx.post(url, json=body | {"model": "cod"}, headers=key).status_code == 404


# ---------------------------------------------------------------------------------------------- JSON

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def followed(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


def test_answers_follow_a_json_schema(serve, tiny_llama, tokenizer):
    running = serve(model=tiny_llama, tokenizer=tokenizer, masks={})
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 30, "n": 4, "seed": 1}
    create = running.client.chat.completions.create
    found = create(**asked, temperature=1.5, response_format=followed(PERSON, strict=True)).choices
    assert {each.finish_reason for each in found} == {"stop"}
    made = [json.loads(each.message.content) for each in found]
    assert all(each.keys() == {"name", "age"} and 0 <= each["age"] <= 99 and len(each["name"]) <= 5 for each in made)
    assert len({each["name"] for each in made}) > 1
    found = create(**asked, temperature=1.5, response_format={"type": "json_object"}).choices
    assert all(each.message.content.startswith("{") for each in found)


NESTED = {"type": "integer"}
for _ in range(150):
    NESTED = {"items": NESTED}
UNFOLLOWED = {
    "reading it takes more than 0.5 s": {"allOf": [{"type": "string", "pattern": f".*x{i}.*"} for i in range(64)]},
    "Invalid type: strin": {"type": "strin"},
    "Unimplemented keys": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "Default retriever does not fetch resources": {"$ref": "file:///etc/passwd"},
    "must be a JSON schema that llguidance can follow": {"$ref": "#"},
    "recursion limit exceeded": NESTED,
    "Unsatisfiable schema": {"type": "string", "minLength": 5, "maxLength": 2},
}


def test_a_schema_that_cannot_be_followed_is_refused(serve, tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr("mft.serving.batch.json_grammar._SECONDS", 0.5)
    running = serve(model=tiny_llama, tokenizer=tokenizer, masks={})
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "3"}]}
    for said, schema in UNFOLLOWED.items():
        with pytest.raises(openai.BadRequestError, match=said) as error:
            running.client.chat.completions.create(**asked, response_format=followed(schema))
        assert error.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.BadRequestError, match="response_format must be text with this base, got a schema, but"):
        chat(serve(), ("user", "3"), response_format=followed(PERSON))  # whose tokenizer spells no bytes


def test_without_llguidance_a_schema_is_refused_and_texts_are_answered(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    running = serve()
    with pytest.raises(
        openai.BadRequestError, match="response_format must be text, got a schema, but the server lacks"
    ):
        chat(running, ("user", "3"), response_format=followed(PERSON))
    assert chat(running, ("user", "3"), max_tokens=1, response_format={"type": "text"}).choices
