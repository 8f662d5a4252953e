"""The log's lines, and the id that finds a client's request in them."""

import json
import logging
import re

import httpx
import pytest

from mft.serving.log import new_log

ASKED = {"model": "code", "prompt": "3 4", "max_tokens": 2, "temperature": 0}


def written(form, zone="UTC", level="debug"):
    """Return (a log, its lines)."""
    log, lines = new_log(form, level, zone), []
    log.handlers[0]._write = lines.append
    return log, lines


def ask(running, body, **headers):
    return httpx.post(f"{running.address}/v1/completions", json=body, headers=headers, timeout=20)


@pytest.mark.parametrize(
    ("zone", "offset"), [("UTC", r"\+00:00"), ("Asia/Kolkata", r"\+05:30"), ("local", r"[+-]\d\d:\d\d")]
)
def test_times_are_of_the_zone_that_is_asked_for(zone, offset):
    log, lines = written("text", zone)
    log.tell("ready", "serving\n\x1b[2J")
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d{offset} info serving\\n\\x1b\[2J", lines[0])
    log, lines = written("json", zone)
    log.tell("ready", "serving", address="http://127.0.0.1")
    found = json.loads(lines[0])
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}{offset}", found.pop("time"))
    assert found == {"level": "info", "event": "ready", "message": "serving", "address": "http://127.0.0.1"}


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_libraries_log_has_lines_too_with_its_traceback(form):
    log, lines = written(form)
    with log.log_libraries():
        try:
            raise KeyError("lost")
        except KeyError:
            logging.getLogger("uvicorn.error").exception("it failed")
    logging.getLogger("uvicorn.error").error("not any more")
    assert len(lines) == 1
    text = lines[0] if form == "text" else json.loads(lines[0])["traceback"]
    assert "KeyError: 'lost'" in text
    assert form == "text" or json.loads(lines[0])["event"] == "uvicorn.error"


def test_a_refusal_has_its_id_in_the_response_and_in_the_log(serve):
    running = serve(hosts=frozenset())
    cases = [(ask(running, ASKED | {"model": "cod"}), 404), (ask(running, ASKED, Host="evil.example"), 403)]
    cases.append((httpx.get(f"{running.address}/v1/nothing"), 404))
    for (response, status), line, event in zip(cases, running.lines, running.events, strict=True):
        assert response.status_code == status
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
        message = response.json()["error"]["message"]
        assert line.startswith(f"{response.headers['x-request-id']} {response.request.method} /v1/")
        assert line.endswith(f" {status}: {message}")
        assert (event["event"], event["level"], event["reason"]) == ("refusal", "WARNING", message)
        assert event["request_id"] == response.headers["x-request-id"]


def test_an_answer_and_its_line_have_the_request_id_of_the_client(serve):
    running = serve()
    response = ask(running, ASKED, **{"X-Request-Id": "abc-1.2_3"})
    assert response.headers["x-request-id"] == "abc-1.2_3"
    assert response.json()["id"] == "cmpl-abc-1.2_3"
    seconds = r"\d+\.\d\d s"
    line = rf"cmpl-abc-1\.2_3 code 200 length: 2 \+ 2 tokens in {seconds}, first token after {seconds}"
    assert re.fullmatch(line, running.lines[0])
    event = running.events[0]
    assert (event["request_id"], event["prompt_tokens"], event["completion_tokens"]) == ("abc-1.2_3", 2, 2)
    assert 0 <= event["queue_seconds"] <= event["first_token_seconds"] <= event["seconds"]
    made = running.client.completions.create(**ASKED)
    assert made.id == f"cmpl-{made._request_id}"


@pytest.mark.parametrize("odd", ["a" * 129, "a b", "a\x7f", ""])
def test_an_odd_request_id_is_replaced(serve, odd):
    response = ask(serve(), ASKED, **{"X-Request-Id": odd})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
