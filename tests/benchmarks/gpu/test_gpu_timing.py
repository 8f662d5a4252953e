"""The GPU suite's timing: graphs over rotated copies, queues if a graph is impossible, and the card's ceilings."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import Card

from benchmarks.gpu import device
from benchmarks.gpu.device import CLOCK, QUEUED, Gpu


def test_a_graph_holds_whole_rotations_over_the_copies(monkeypatch):
    card = Card(monkeypatch)
    timer = Gpu().timer(card.work(0.5), 3)
    assert (timer.method, timer.calls) == ("graph", 6)  # 4 calls would last only 2 ms
    assert timer.replay() == pytest.approx(0.5)
    assert card.log[-2:] == ["replay 6", "wait"]
    assert Gpu().timer(card.work(7.0), 3).calls == 1


def test_a_graph_of_a_step_is_captured_once_and_replayed(monkeypatch):
    card = Card(monkeypatch)
    work, results = card.work(0.5), [torch.zeros(1)]
    replay = Gpu().graph(lambda: work("run") or results)
    before = card.now
    assert replay()[0] is results[0]
    # The work that is done once, the capture, and the replay.
    assert card.log == ["own stream", "run", "run", "own stream", "replay 1"]
    assert card.now == before + 0.5


def test_what_cannot_be_captured_queues_up_instead_and_says_why(monkeypatch):
    card = Card(monkeypatch, capture_fails=True)
    timer = Gpu().timer(card.work(0.5), 3)
    assert (timer.method, timer.calls) == ("queued", 6)
    assert card.log[-1] == "own stream"  # a failed capture leaves another stream current
    assert timer.note == "operation not permitted when stream is capturing"
    assert timer.replay() == pytest.approx(0.5)
    assert Gpu().timer(card.work(0.5), 3, QUEUED).note == "its host code cannot be captured"


def test_by_the_clock_what_the_host_needs_counts(monkeypatch):
    """The caller waits 2 ms for each of 50 calls, on a card whose events do not show that time."""
    Card(monkeypatch)
    now = iter(range(10**6))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(now) * 0.1)
    calls: list[int] = []
    timer = Gpu().timer(calls.append, 3, CLOCK)
    assert (timer.method, timer.calls) == ("clock", 50)
    assert timer.replay() == pytest.approx(2.0)
    assert calls[:4] == [0, 1, 2, 0]
    assert len(calls) == 100


def test_the_card_is_described_and_its_ceilings_and_peaks_are_measured(monkeypatch):
    card = Card(monkeypatch)
    gpu = Gpu()
    described = gpu.environment()
    assert (described["device"], described["l2_mib"]) == ("a card", 1.0)
    assert described["capability"] == [9, 0]
    assert {"triton_kernels", "cuda_library", "cuda_lacks"} <= described.keys()
    gpu.tidy()
    gpu.torch_device = torch.device("cpu")
    assert gpu._copy_rate(64) > 0
    assert gpu._product_rate(8) > 0
    read = card.work(2.0)
    monkeypatch.setattr(device, "read_l2", {(8 * 132,): lambda *arguments, num_warps: read(0)})
    cycles = 2.0 * 10_000_000  # the stand-in's spin of 10 million cycles lasts 1 ms
    assert gpu._l2_rate() == pytest.approx(8 * 64 * 4096 * 4 / cycles)
    assert gpu.peak(lambda: None) == 500
