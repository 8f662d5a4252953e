"""The metrics that Prometheus and an orchestrator read from a server."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client import parser

ASKED = {"prompt": "3 4 5", "temperature": 0}


def read(running):
    """Return ({name: {label values, by label name: value}} of all samples, {name: type} of all families)."""
    response = httpx.get(f"{running.address}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found, kinds = {}, {}
    for family in parser.text_string_to_metric_families(response.text):
        kinds[family.name] = family.type
        for sample in family.samples:
            labels = tuple(
                value for _, value in sorted(sample.labels.items()) if value
            )  # to Prometheus, "" is no label
            found.setdefault(sample.name, {})[labels] = sample.value
    return found, kinds


def test_requests_tokens_latencies_and_memory_are_counted(serve, gate, until):
    running = serve(rows=2, waiting=4)
    for model, tokens in (("code", 4), ("code", 6), ("tiny", 1)):
        running.client.completions.create(model=model, max_tokens=tokens, **ASKED)
    with pytest.raises(openai.NotFoundError):
        running.client.completions.create(model="cod", **ASKED)
    gate.clear()  # the first token comes with the prompt, without a step
    stream = running.client.completions.create(model="math", max_tokens=60, stream=True, **ASKED)
    next(stream)
    stream.close()
    until(lambda: len(running.lines) == 5)
    gate.set()
    until(lambda: running.scheduler.counts == (0, 0))
    found, _ = read(running)
    assert found["mft_request_success_total"] == {("length", "code"): 2, ("length", "tiny"): 1, ("abort", "math"): 1}
    assert found["mft_request_refused_total"] == {("404",): 1}
    assert found["mft_prompt_tokens_total"] == {("code",): 6, ("tiny",): 3, ("math",): 3}
    assert found["mft_generation_tokens_total"][("code",)] == 10
    for name, count in (
        ("mft_time_to_first_token_seconds", 2),
        ("mft_request_queue_time_seconds", 2),
        ("mft_e2e_request_latency_seconds", 2),
        ("mft_request_time_per_output_token_seconds", 2),
    ):
        assert found[f"{name}_count"][("code",)] == count
        assert found[f"{name}_sum"][("code",)] >= 0
    assert ("tiny",) not in found["mft_request_time_per_output_token_seconds_count"]  # a single token has no next one
    assert ("math",) not in found["mft_e2e_request_latency_seconds_count"]
    steps = gate.steps + 1  # one read the prompt of the client that left
    assert found["mft_batch_rows_count"][()] == found["mft_batch_rows_bucket"][("1.0",)] == steps
    assert found["mft_masks_loaded"][()] == 2
    assert found["mft_mask_bytes"] == {(task,): size for task, size in running.bank.nbytes().items()}
    assert found["mft_base_bytes"][()] > 10_000
    assert found["process_resident_memory_bytes"][()] > 1e7
    assert len(found["mft_build_info"]) == 1


def test_the_batch_and_the_queue_are_those_of_now(serve, gate, until):
    running = serve(rows=1, waiting=4)
    gate.clear()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running.client.completions.create, model="code", max_tokens=4, **ASKED) for _ in range(3)]
        until(lambda: running.scheduler.counts == (1, 2))
        until(lambda: running.scheduler.cache_bytes)
        found, _ = read(running)
        assert (found["mft_num_requests_running"][()], found["mft_num_requests_waiting"][()]) == (1, 2)
        assert found["mft_kv_cache_bytes"][()] > 0
        gate.set()
        for each in asked:
            each.result()
    until(lambda: running.scheduler.counts == (0, 0))
    until(lambda: read(running)[0]["mft_kv_cache_bytes"][()] == 0)
    found, _ = read(running)
    assert found["mft_batch_rows_count"][()] == found["mft_batch_rows_bucket"][("1.0",)]  # never two rows


def test_a_task_that_is_unloaded_is_counted_no_more(serve, exports):
    from pathlib import Path

    running = serve(load_from=Path(exports["code"]).parent)
    running.client.completions.create(model="code", max_tokens=4, **ASKED)
    assert httpx.post(f"{running.address}/v1/unload_lora_adapter", json={"lora_name": "code"}).status_code == 200
    found, _ = read(running)
    assert not [name for name, samples in found.items() if any("code" in labels for labels in samples)]


def test_probes_say_whether_it_lives_and_takes_requests(serve, gate, until):
    running = serve(rows=1)
    for route, status in (("live", "live"), ("ready", "ready")):
        response = httpx.get(f"{running.address}/health/{route}")
        assert (response.status_code, response.json()) == (200, {"status": status})
    gate.clear()
    with ThreadPoolExecutor(1) as pool:  # a request that runs, so that the server does not end at once
        asked = pool.submit(running.client.completions.create, model="code", prompt="3 4", max_tokens=2)
        until(lambda: running.scheduler.counts == (1, 0))
        running.scheduler.close()
        response = httpx.get(f"{running.address}/health/ready")
        gate.set()
        assert asked.result().choices
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the server must be running, got one that is stopping"
