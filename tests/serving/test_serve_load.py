"""A small load test, on a service in this process: python -m benchmarks.serve_load is the long one."""

import os
from pathlib import Path

from benchmarks.serve_load import Load, Target, percentiles, run, table


def test_requests_of_every_kind_beside_loads_and_unloads_get_the_answers_that_they_get_alone(serve, exports, until):
    running = serve(rows=4, waiting=64, length=256, load_from=Path(exports["code"]).parent)
    load = Load(Target(running.address, os.getpid(), {"code": "code", "math": "math"}))
    load.prepare(("tiny", "code", "math"))
    run(load, 110, clients=6)
    assert load.wrong == []
    assert load.sent["left a stream"] + load.sent["left an answer"] > 15
    assert load.sent["unload"] == load.sent["load"] == 1
    assert load.sent["answered"] >= len(load.alone) + 60
    assert "" not in load.sent
    assert max(load.memory) == 110

    def statuses():
        return [event["status"] for event in running.events if event["event"] == "answer"]

    # The server logs an answer after its last byte, so its client may have counted it first.
    until(lambda: running.scheduler.counts == (0, 0) and statuses().count(200) >= load.sent["answered"])
    assert set(statuses()) == {200, 499}
    assert "| whole answer |" in table(load)


def test_a_wrong_answer_is_noticed():
    load = Load(Target("http://127.0.0.1:1", os.getpid(), {}), alone={("code", "3", False): "4 5"})
    load.hold("code", "3", "4 5", chat=False)
    load.hold("code", "3", "4 6", chat=False)
    assert load.wrong == ["code '3': '4 6' for '4 5'"]
    assert percentiles([0.1, 0.2, 0.3]) == {"requests": 3, "p50_ms": 200.0, "p99_ms": 298.0}
