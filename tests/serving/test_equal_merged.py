"""mft serve answers each task as its merged model does alone: SmolLM2-135M in fp32, four tasks and the base, greedy.

A merged model reads each answer with its prompt at once. Every token has to be its likeliest one after those before,
which is what its generate would choose. Sums in a batch have another order, so of two tokens that are equally likely
but for rounding the server may choose the other one. Such near ties are printed (pytest -s).
"""

import inspect
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import openai
import pytest
import torch

from benchmarks.serve_load import TASKS, server, write_masks
from mft.config import ModelConfig
from mft.masks.convert import merge_model
from mft.masks.export import load_masks
from mft.models.pretrained import load_model
from mft.serving.api.token_texts import TokenTexts

BASE = "smollm2-135m"
MODELS = (BASE, *TASKS[:4])
QUESTIONS = 48  # per model
MOST = 1e-3  # by which the logit of a token may be smaller than the largest one
CLIENTS = (4, 12, 24)  # at once, for a third of the requests each


def question(number):
    words = inspect.getsource(inspect).split()
    return [{"role": "user", "content": " ".join(words[40 * number :][: 3 + number % 20])}]


def ask(client, model, number, ids):
    """Return the ids of an answer. ids: of tokens by their bytes."""
    options = {"max_tokens": 4 + number % 7, "temperature": 0, "logprobs": True}
    (choice,) = client.chat.completions.create(model=model, messages=question(number), **options).choices
    answer = [ids[bytes(each.bytes)] for each in choice.logprobs.content]
    assert choice.finish_reason == "stop" or len(answer) == options["max_tokens"]
    return answer


@torch.no_grad()
def unlikely(model, prompt, answer):
    """Return (position, by how much its logit is the smaller) of tokens that are not the likeliest."""
    logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    largest, likeliest = logits.max(-1)
    differ = (likeliest != torch.tensor(answer)).nonzero().flatten().tolist()
    return [(at, float(largest[at] - logits[at, answer[at]])) for at in differ]


@pytest.mark.slow
def test_240_greedy_answers_are_those_of_each_merged_model_alone(tmp_path):
    masks = write_masks(tmp_path, BASE, MODELS[1:], "float32", keep_ratio=0.98)
    tokenizer = load_model(BASE)[1]
    texts = TokenTexts(tokenizer)
    ids = {texts.within(token)[1]: token for token in range(len(tokenizer))}
    assert len(ids) == len(tokenizer)
    asked = [*product(range(QUESTIONS), MODELS)]
    answers = {}
    given = [word for task, directory in masks.items() for word in ("--masks", f"{task}={directory}")]
    with server(["--model", BASE, "--dtype", "float32", "--cache", "256MB", *given], tmp_path / "log") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        for part, clients in enumerate(CLIENTS):
            with ThreadPoolExecutor(clients) as pool:
                now = asked[part :: len(CLIENTS)]
                answers |= zip(now, pool.map(lambda each: ask(client, each[1], each[0], ids), now))
    found = []
    for name, other in zip(MODELS, (*MODELS[1:], BASE)):
        model, _ = load_model(ModelConfig(BASE, dtype="float32"))
        if name != BASE:
            model = merge_model(load_masks(model, masks[name]))
        wrong = []
        for number in range(QUESTIONS):
            prompt = tokenizer.apply_chat_template(question(number), add_generation_prompt=True)["input_ids"]
            found += [(name, number, *each) for each in unlikely(model, prompt, answers[number, name])]
            if number < 8:
                wrong += unlikely(model, prompt, answers[number, other])
        assert any(less > MOST for _, less in wrong), f"{other}'s answers must not pass for {name}'s"
    lines = [f"{name}, question {n}, token {at}: {less:.5f} less" for name, n, at, less in found]
    tokens = sum(map(len, answers.values()))
    print(f"\n{len(answers)} answers, {tokens} tokens, {len(found)} near ties:", *lines, sep="\n")
    assert [each for each in found if each[-1] > MOST] == []
