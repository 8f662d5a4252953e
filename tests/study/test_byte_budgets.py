"""Arms by bytes: ranks of adapters as a grid, and settings that store too much to be chosen."""

import re

import pytest
from test_study_plan import RATES, bowl, make, play

from mft.config import MaskConfig
from mft.study.config import ArmConfig, Setting
from mft.study.plan import best_so_far, selection

LORA = ArmConfig("lora", lrs=RATES, lora_ranks=[4, 1, 2], max_bytes=250)


def study_of(arm=LORA, **options):
    return make({"full": ArmConfig("full", lrs=RATES), "arm": arm}, **options)


def better_and_larger_by_rank(study):
    """Higher ranks are better, and a rank stores 100 bytes: more with the second seed."""
    loss = bowl(1e-3)
    return play(
        study,
        lambda unit: loss(unit) - 0.1 * (unit.setting.rank or 0),
        size=lambda unit: 100 * (unit.setting.rank or 9) + 60 * unit.seed,
    )


def test_ranks_are_a_grid_and_one_rank_is_no_choice():
    grid = ArmConfig("lora", lrs=[1e-3], lora_ranks=[2, 1]).settings(MaskConfig())
    assert grid == [Setting(1e-3, 1.0, rank=1), Setting(1e-3, 1.0, rank=2)]
    assert str(grid[0]) == "lr 0.001, epochs 1, rank 1"
    assert ArmConfig("lora", lrs=[1e-3], lora_rank=2).settings(MaskConfig()) == [Setting(1e-3, 1.0)]


def test_what_stores_more_than_the_most_is_tried_and_not_chosen():
    study = study_of()
    done = better_and_larger_by_rank(study)
    found = selection(study, done)
    assert found.chosen["code"]["arm"] == best_so_far(study, done)["code", "arm"] == Setting(1e-3, 1.0, rank=2)
    assert found.tried["code"]["arm"] == 9
    assert {o.unit.setting for o in done if o.unit.seed == 1 and o.unit.arm == "arm"} == {Setting(1e-3, 1.0, rank=2)}
    free = study_of(ArmConfig("lora", lrs=RATES, lora_ranks=[4, 1, 2]))
    assert selection(free, done).chosen["code"]["arm"] == Setting(1e-3, 1.0, rank=4)


def test_the_bytes_of_the_most_itself_are_not_too_many():
    study = study_of(ArmConfig("lora", lrs=RATES, lora_ranks=[4, 1, 2], max_bytes=400))
    assert selection(study, better_and_larger_by_rank(study)).chosen["code"]["arm"].rank == 4


def test_an_arm_none_of_whose_settings_is_small_enough_is_an_error_that_names_its_key():
    message = (
        "code, arm must have a setting that stores at most arms.arm.max_bytes = 99 bytes, the smallest "
        "(lr 0.0001, epochs 1, rank 1) stores 100: add smaller ones to its grid, or raise it"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        better_and_larger_by_rank(study_of(ArmConfig("lora", lrs=RATES, lora_ranks=[1, 2], max_bytes=99), extensions=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "control", "lrs": [1], "lora_ranks": [1]}, "lora_ranks must be left out for this kind, got [1]"),
        ({"kind": "lora", "lrs": [1], "lora_ranks": [0]}, "lora_ranks must be at least 1, got [0]"),
        ({"kind": "lora", "lrs": [1], "max_bytes": -1}, "max_bytes must be at least 0, got -1"),
        (
            {"kind": "average", "of": "control", "max_bytes": 1},
            "max_bytes must be left out for this kind, whose setting the arm that it is of chooses, got 1",
        ),
    ],
)
def test_what_an_arm_may_not_say_of_bytes(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ArmConfig(**options)
