"""How a rate is chosen on validation."""

import math

import pytest
from torch import nn

from mft.demo.tuning import tune
from mft.training.loop import NonFiniteLoss


def tuned(losses, lrs, extensions=2):
    """tune() over a table lr -> validation loss; a NaN stands for a run that diverges."""

    def attempt(lr):
        if math.isnan(losses[lr]):
            raise NonFiniteLoss("the loss must stay finite, got nan at step 3 of 4")
        model = nn.Identity()
        model.lr = lr
        return model, losses[lr]

    return tune("MFT", lrs, attempt, extensions)


def tried(found):
    return [trial.lr for trial in found.trials]


def test_the_rate_of_least_validation_loss_is_taken():
    found = tuned({1e-3: 2.2, 1e-2: 2.1, 1e-1: 2.3}, (1e-2, 1e-3, 1e-1))
    assert found.model.lr == 1e-2
    assert tried(found) == [1e-3, 1e-2, 1e-1]
    assert found.notes == []


def test_the_grid_grows_while_its_best_rate_lies_at_an_end():
    found = tuned({3e-5: 2.3, 1e-4: 2.2, 3e-4: 2.1, 9e-4: 2.0, 2.7e-3: 2.05}, (3e-5, 1e-4, 3e-4))
    assert tried(found) == [3e-5, 1e-4, 3e-4, 9e-4, 2.7e-3]
    assert found.model.lr == 9e-4
    found = tuned({1.0: 2.2, 0.1: 2.1, 0.01: 2.3}, (1.0, 0.1))
    assert tried(found) == [0.1, 1.0, 0.01]


def test_a_best_rate_still_at_the_end_is_said():
    found = tuned({1.0: 2.2, 2.0: 2.1, 4.0: 2.0, 8.0: 1.9}, (1.0, 2.0, 4.0), extensions=1)
    assert found.notes == ["MFT: the best rate, 8, is the largest of those tried; a wider grid may find a better one"]


def test_fewer_than_three_rates_are_said():
    assert tuned({1.0: 2.2, 2.0: 2.1}, (1.0, 2.0), extensions=0).notes == [
        "MFT: only 2 rate(s) tried, at least 3 make a fair choice"
    ]


def test_a_rate_that_diverges_is_noted_and_not_taken():
    found = tuned({1.0: 2.2, 2.0: 2.1, 4.0: math.nan}, (1.0, 2.0, 4.0))
    assert found.model.lr == 2.0
    assert found.trials[-1].validation_loss == math.inf
    assert found.notes == ["MFT, lr 4: the loss must stay finite, got nan at step 3 of 4"]


def test_an_arm_that_always_diverges_is_an_error():
    with pytest.raises(NonFiniteLoss, match=r"MFT must train at one of the rates \[0.25, 0.5, 1.0, 2.0\]"):
        tuned({1.0: math.nan, 2.0: math.nan, 0.5: math.nan, 0.25: math.nan}, (1.0, 2.0))
