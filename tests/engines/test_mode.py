"""A new memory mode: a class in engines/mode.py, its estimate in memory/ways.py, and a name in the configuration."""

import pytest
import torch
from tiny import make_rows, masked_llama

import mft.memory.workload
from mft.config import TrainConfig
from mft.engines.in_place import InPlace, InPlaceStates
from mft.engines.mode import MODES, PlainMode, place
from mft.engines.score_states import score_groups, score_optimizer
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import masked_modules
from mft.memory import ways
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload
from mft.training.loop import train_masks


class Counting(InPlace):
    """Masks in place, with a count of the steps."""

    taken = 0

    def _update(self, lr, max_norm):
        Counting.taken += 1
        super()._update(lr, max_norm)


class CountingWay(ways.InPlace):
    name = "counting"


class CountingMode(PlainMode):
    name = "counting"
    trains_by_autograd = False

    def train(self, placed, run, head, train, hook):
        optimizer = score_optimizer(score_groups(masked_modules(placed.model).values()), train)
        return Counting(placed, run, head, InPlaceStates(placed, optimizer))


@pytest.fixture
def counting(monkeypatch):
    """Register the mode."""
    monkeypatch.setitem(MODES, "counting", CountingMode())
    monkeypatch.setitem(ways.WAYS, "counting", CountingWay())
    monkeypatch.setattr(mft.memory.workload, "WAYS", (*mft.config.WAYS, "counting"))  # the name in config.py
    monkeypatch.setattr(Counting, "taken", 0)


def test_a_new_mode_trains_evaluates_and_is_estimated(counting):
    models, rows, train = [masked_llama() for _ in range(2)], make_rows(), TrainConfig(lr=1e-3, steps=2)
    losses = [
        [report.loss for report in train_masks(model, rows, train, way=way)]
        for model, way in zip(models, ("counting", "in_place"))
    ]
    assert Counting.taken == 2
    assert losses[0] == losses[1]
    ours, theirs = map(masked_modules, models)
    assert all(torch.equal(module.scores, theirs[name].scores) for name, module in ours.items())
    assert evaluate(models[0], rows, way="counting").loss == evaluate(models[1], rows, way="in_place").loss
    assert estimate(shape_from_config(known_config("llama2-7b")), Workload(memory="counting")).way == "counting"


def test_a_new_mode_has_the_rules_of_its_estimate(counting):
    with pytest.raises(ValueError, match="train.batches_at_once must be null with memory: counting, .*, got 2"):
        train_masks(masked_llama(), make_rows(), TrainConfig(steps=1, batches_at_once=2), way="counting")


def test_a_placed_model_keeps_its_mode_when_options_are_added():
    model = masked_llama()
    placed = place(place(model, way="layerwise", device="cpu"), remember=False)
    assert (placed.model, placed.mode, placed.remember) == (model, MODES["layerwise"], False)


def test_an_unknown_mode_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match="way must be one of plain, in_place, resident, .*, got 'fast'"):
        place(masked_llama(), way="fast")
