"""What a key may call, who may load masks, and how many places a key may take."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from test_metrics import read

from mft.serving.api.api_keys import ApiKeys

ASKED = {"prompt": "3 4 5", "temperature": 0, "max_tokens": 4}
KEYS = {"alice": "sk-alice-1", "bob": "sk-bob-1", "root": "sk-root-1"}


@pytest.fixture
def running(serve, exports, tmp_path):
    """Return a server: alice may call code and a task to come, bob the base and math, root everything."""
    return serve_keys(serve, tmp_path, "root sk-root-1", load_from=Path(exports["code"]).parent)


def serve_keys(serve, tmp_path, admins=None, **options):
    files = {"users": "alice sk-alice-1 code,later\nbob sk-bob-1 tiny,math\nanyone-else", "admins": admins or "-"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    keys = ApiKeys(tmp_path / "users", pytest.fail, tmp_path / "admins" if admins else None)
    return serve(keys=keys, **options)


def client(running, name):
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key=KEYS.get(name, name), max_retries=0, timeout=20)


def ask(running, name, model="code", **changes):
    with client(running, name) as asked:
        return asked.completions.create(model=model, **ASKED | changes)


def curl(running, name, route, *arguments):
    """Return (status, body) by curl."""
    command = ["curl", "-s", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {KEYS[name]}", *arguments]
    body, _, status = subprocess.check_output([*command, f"{running.address}/v1/{route}"], text=True).rpartition("\n")
    return int(status), body


def test_a_key_sees_and_calls_its_own_tasks_alone(running):
    everything = ["tiny", "code", "math"]
    for name, own in {
        "alice": ["code"],
        "bob": ["tiny", "math"],
        "root": everything,
        "anyone-else": everything,
    }.items():
        with client(running, name) as asked:
            assert [model.id for model in asked.models.list()] == own
            for model in everything:
                if model in own:
                    assert asked.models.retrieve(model).id == model
                    assert asked.completions.create(model=model, **ASKED).choices[0].text
                else:
                    with pytest.raises(openai.PermissionDeniedError, match=f"of the key '{name}'"):
                        asked.models.retrieve(model)
                    with pytest.raises(openai.PermissionDeniedError) as error:
                        asked.chat.completions.create(model=model, messages=[{"role": "user", "content": "3"}])
                    assert (error.value.code, error.value.param) == ("model_not_allowed", "model")
    assert not any(key in line for key in (*KEYS.values(), "anyone-else") for line in running.lines)


def test_a_refusal_tells_the_remedy_and_no_task_of_others(running):
    for model in ("math", "nowhere"):  # the same, whether or not there is such a task
        with pytest.raises(openai.PermissionDeniedError) as error:
            ask(running, "alice", model)
        assert error.value.body["message"] == (
            f"model must be one of the tasks of the key 'alice' (GET /v1/models), got {model!r}: ask for one of "
            "these, or let the operator add it to the key's line in --api-keys-file"
        )
    with pytest.raises(openai.NotFoundError, match="model must be one of code, got 'later'"):
        ask(running, "alice", "later")
    assert curl(running, "root", "unload_lora_adapter", "--json", '{"lora_name": "code"}')[0] == 200
    with pytest.raises(openai.NotFoundError, match="one of the key's tasks, of which none is loaded, got 'code'"):
        ask(running, "alice")


def test_admins_alone_load_and_unload(running):
    body = ("--json", '{"lora_name": "later", "lora_path": "math"}')
    status, text = curl(running, "alice", "load_lora_adapter", *body)
    assert (status, "must be asked for with a key of --admin-keys-file, got 'alice' of --api-keys-file" in text) == (
        403,
        True,
    )
    assert curl(running, "bob", "unload_lora_adapter", "--json", '{"lora_name": "math"}')[0] == 403
    assert curl(running, "root", "load_lora_adapter", *body) == (200, "Success: later is loaded.")
    assert running.events[-1]["key"] == "root"
    assert " (root) loaded later from " in running.lines[-1]
    assert ask(running, "alice", "later").choices[0].text == ask(running, "bob", "math").choices[0].text


def test_keys_without_admins_load_nothing(serve, exports, tmp_path):
    running = serve_keys(serve, tmp_path, load_from=Path(exports["code"]).parent)
    status, text = curl(running, "alice", "unload_lora_adapter", "--json", '{"lora_name": "code"}')
    assert (status, "if there is none, start the server with --admin-keys-file FILE" in text) == (403, True)


def test_log_and_counters_have_the_keys_name(running):
    for _ in range(2):
        ask(running, "alice")
    ask(running, "root")
    for name, error in (("alice", openai.PermissionDeniedError), ("sk-wrong", openai.AuthenticationError)):
        with pytest.raises(error):
            ask(running, name, "math")
    assert [event["key"] for event in running.events] == ["alice", "alice", "root", "alice", None]
    assert " (alice) code 200 length: 3 + 4 tokens" in running.lines[0]
    assert " (alice) POST /v1/completions 403: " in running.lines[3]
    found, _ = read(running)
    assert found["mft_request_success_total"] == {("length", "alice", "code"): 2, ("length", "root", "code"): 1}
    assert found["mft_prompt_tokens_total"] == {("alice", "code"): 6, ("root", "code"): 3}
    assert found["mft_generation_tokens_total"] == {("alice", "code"): 8, ("root", "code"): 4}
    assert found["mft_request_refused_total"] == {("alice", "403"): 1, ("401",): 1}
    assert "sk-" not in httpx.get(f"{running.address}/metrics").text


def test_one_key_cannot_fill_all_places_and_keys_take_turns(serve, tmp_path, gate, until):
    running = serve_keys(serve, tmp_path, "root sk-root-1", rows=1, waiting=4)
    gate.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = []
        for name, count in (("root", 5), ("alice", 2)):  # one runs and 4 wait; others get their share of the 4
            for _ in range(count):
                asked.append(pool.submit(ask, running, name))
                until(lambda: sum(running.scheduler.counts) == len(asked))
            message = (
                "at most 5 at once, 1 answered (--rows) and 4 waiting" if name == "root" else "at most 2 for each key"
            )
            with pytest.raises(openai.RateLimitError) as error:
                ask(running, name)
            assert message in error.value.body["message"]
        gate.set()
        for each in asked:
            each.result()
    answered = [event["key"] for event in running.events if event["event"] == "answer"]
    assert answered == ["root", "root", "alice", "root", "alice", "root", "root"]
