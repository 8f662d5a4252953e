"""The optimiser step of scores kept on the host: the order of copies and steps, with streams that only record."""

import contextlib
import weakref

import pytest
import torch
from tiny import masked_llama

from mft.config import TrainConfig
from mft.engines.offload import Mover
from mft.engines.score_states import ScoreStates, current_masks, score_groups, score_optimizer
from mft.masks.convert import masked_modules


class Stream:
    """Records which copies it begins and which ones it waits for; a copy's event is its name."""

    def __init__(self, log):
        self.log, self.copy = log, ""

    def wait_stream(self, other):
        """Do nothing: copies begin after the work that is queued so far."""

    def record_event(self):
        self.log.append(f"copy {self.copy}")
        return self.copy

    def wait_event(self, event):
        self.log.append(f"wait {event}")


class RecordingMover(Mover):
    """Copies within the CPU's memory. ``held``: the copies of scores that are still alive on the device."""

    def __init__(self, log, names, monkeypatch):
        super().__init__("cpu", separate=True)
        self._stream, self.names, self.held = Stream(log), names, weakref.WeakSet()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def bring(self, tensors):
        self._stream.copy = f"{self.names[tensors[0].data_ptr()]} in"
        arrival = super().bring(tensors)
        self.held.add(arrival.tensors[0])
        return arrival

    def store(self, tensor, out=None):
        self._stream.copy = f"{self.names[out.data_ptr()]} out" if out.data_ptr() in self.names else self._stream.copy
        return super().store(tensor, out)


@pytest.fixture
def masks():
    found = current_masks(dict(list(masked_modules(masked_llama()).items())[:3]))
    for mask in found:
        mask.hold(torch.ones_like(mask.scores))
    return found


def test_the_next_matrix_arrives_while_this_one_is_stepped(masks, monkeypatch):
    log, held = [], []
    mover = RecordingMover(log, {mask.scores.data_ptr(): i for i, mask in enumerate(masks)}, monkeypatch)
    settings = TrainConfig(lr=1e-3, steps=3)
    optimizer = score_optimizer(score_groups(mask.module for mask in masks), settings)
    step_one = optimizer.step_one

    def step(scores, *args, **options):
        log.append(f"step {mover.names[scores.data_ptr()]}")
        held.append(len(mover.held))
        return step_one(scores, *args, **options)

    monkeypatch.setattr(optimizer, "step_one", step)
    ScoreStates(masks, optimizer, mover).update(masks)
    leaves = [[f"copy {i} out", f"wait {i} out"] * 3 for i in range(3)]  # scores and two moments, one after another
    assert log == [
        *("copy 0 in", "wait 0 in", "copy 1 in", "step 0", *leaves[0]),
        *("wait 1 in", "copy 2 in", "step 1", *leaves[1]),
        *("wait 2 in", "step 2", *leaves[2]),
    ]
    assert held == [2, 2, 1]


def test_a_large_list_is_copied_only_when_the_one_before_has_left():
    mover = Mover("cpu", separate=True)
    small, large = [torch.zeros(4)], [torch.zeros(64)]
    asked = []
    mover.bring = lambda tensors: (asked.append(len(tensors[0])), Mover.bring(mover, tensors))[1]
    found = [(len(tensor), list(asked)) for (tensor,) in mover.bring_each([small, small, large, small], most=16)]
    assert found == [(4, [4, 4]), (4, [4, 4]), (64, [4, 4, 64, 4]), (4, [4, 4, 64, 4])]
