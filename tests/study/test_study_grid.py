"""Grids grow until the best lies inside: when they stop, and what is reported if the best lies at an end."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_study_plan import RATES, make, play

from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.grid import DIRECTIONS, OpenEnd, neighbours
from mft_study.study_plan import chosen_settings, notes, open_ends, why_no_setting

FULL = {"full": make_arm("full", lrs=RATES)}


def valley(**best):
    """Return a loss that is least if every named field has this value; distances are between logarithms."""

    def loss(unit):
        setting = unit.setting
        if unit.arm == "full":
            return 99 + abs(math.log(setting.lr / 1e-3))
        given = ((getattr(setting, name), value) for name, value in best.items())
        return sum(abs(math.log(found / value)) for found, value in given if found is not None)

    return loss


def further(outcomes, arm, grid):
    """Return the settings beyond the declared ones, in the order in which they were tried."""
    of = [o.unit.setting for o in outcomes if (o.unit.arm, o.unit.seed, o.unit.part) == (arm, 0, 0)]
    return [setting for setting in of if setting not in grid]


def grown(arm, loss, others=None, **options):
    study = make(FULL | (others or {}) | {"arm": arm}, **options)
    done = play(study, loss)
    return study, done, further(done, "arm", arm.settings(study.mask))


def test_epochs_grow_in_their_ratio_and_each_step_tries_the_rates_beside_it():
    control = make_arm("control", lrs=RATES, epochs=[2, 4])
    _, _, tried = grown(control, valley(lr=1e-3, epochs=16), extensions=20)
    steps = [[Setting(lr, epochs) for lr in (1e-3, 1e-4, 1e-2)] for epochs in (8.0, 16.0)]
    assert tried == [*steps[0], *steps[1], Setting(1e-3, 32.0)]


def test_fewer_epochs_are_tried_where_the_fewest_are_best():
    study, done, tried = grown(make_arm("control", lrs=RATES, epochs=[2, 4]), valley(lr=1e-3, epochs=2))
    assert tried == [Setting(1e-3, 1.0)]
    assert open_ends(study, done) == []


def test_a_rate_beyond_the_grid_is_tried_at_the_other_epochs_too():
    """Its neighbour in epochs is a declared value, but was never tried at this rate."""
    _, _, tried = grown(make_arm("control", lrs=RATES, epochs=[1, 2, 4]), valley(lr=1e-1, epochs=2), extensions=9)
    assert tried == [Setting(1e-1, 2.0), Setting(1.0, 2.0), Setting(1e-1, 1.0), Setting(1e-1, 4.0)]


@pytest.mark.parametrize(
    ("declared", "best", "tried"),
    [
        ([0.9, 0.99], 0.9999, [0.999, 0.9999, 0.99999]),
        ([0.98, 0.99], 0.9, [0.96, 0.92, 0.84]),
        ([0.9, 0.99], 0.7, [0.818, 0.669, 0.398]),  # dropping ten times as much would drop everything
        ([0.5, 0.9], 0.5, [0.278]),
        ([0.9, 1.0], 0.85, [0.81, 0.639]),  # if nothing is dropped, there is no ratio
        ([0.9, 1.0], 1.0, []),  # nothing is dropped: no more can be kept
        ([0.0, 0.5, 0.9], 0.5, []),
    ],
)
def test_keep_ratios_grow_by_the_ratio_of_what_is_dropped_and_below_by_that_of_what_is_kept(declared, best, tried):
    mask = make_arm("mask", lrs=RATES, keep_ratios=declared)

    def loss(unit):
        kept = unit.setting.keep_ratio
        return valley(lr=1e-3)(unit) + (0 if kept is None else abs(kept - best))

    assert list(dict.fromkeys(setting.keep_ratio for setting in grown(mask, loss, extensions=9)[2])) == tried


def test_alphas_and_momentum_do_not_grow():
    arms = {
        **FULL,
        "control": make_arm("control", lrs=RATES, beta1s=[0, 0.9]),
        "part": make_arm("interpolated", of="control", alphas=[0.5, 1]),
    }
    study = make(arms)
    done = play(study, lambda unit: valley(lr=1e-3)(unit) - (unit.setting.beta1 or 0) - (unit.setting.alpha or 0))
    assert chosen_settings(study, done)["code"]["part"] == Setting(alpha=1.0)
    assert Counter(one.unit.arm for one in done if one.unit.seed == 0) == {"full": 3, "control": 6, "part": 2}
    assert open_ends(study, done) == []


def test_epochs_stop_at_their_bound_and_the_report_names_what_would_go_on():
    control = make_arm("control", lrs=RATES, epochs=[2, 4])
    study, done, tried = grown(control, valley(lr=1e-3, epochs=64), extensions=20)
    study.max_epochs = 16.0
    assert max(setting.epochs for setting in tried) == 32
    done = play(study, valley(lr=1e-3, epochs=64))
    assert max(o.unit.setting.epochs for o in done) == 16
    (end,) = open_ends(study, done)
    assert end == OpenEnd("code", "arm", "number of epochs", 16.0, True, "max_epochs=32")


def test_a_spent_budget_is_an_open_end_and_more_of_it_goes_on_from_there():
    control = make_arm("control", lrs=RATES, epochs=[2, 4])
    study, done, tried = grown(control, valley(lr=1, epochs=4), extensions=1)
    assert tried == [Setting(1e-1, 4.0)]
    ends = open_ends(study, done)
    assert [(end.what, end.value, end.above) for end in ends] == [
        ("rate", 0.1, True),
        ("number of epochs", 4, False),
        ("number of epochs", 4, True),
    ]
    assert {end.remedy for end in ends} == {"extensions=4"}
    study.extensions = 4
    more = play(study, valley(lr=1, epochs=4), done=done)
    assert further(more, "arm", control.settings(study.mask))[1:] == [
        Setting(1.0, 4.0),
        Setting(10.0, 4.0),
        Setting(1.0, 2.0),
    ]


def test_where_nothing_is_gained_the_way_back_to_the_start_is_not_gone():
    """For example, LoRA's rate fell to 4e-6 on the corpus of problems, where it had no effect."""

    def loss(unit):
        if unit.arm == "full":
            return 2.0 if unit.setting.lr == 1e-3 else 3.0
        return 1.9985 + 10 * (unit.setting.lr or 0)  # 0.0005 less at the lowest rate

    study, done, tried = grown(make_arm("lora", lrs=RATES, epochs=[1, 2]), loss)
    assert tried == []
    assert open_ends(study, done) == []
    assert notes(study, done) == [
        "code, arm: its best setting is within 0.001 nats per token of its starting point, and the rate and "
        "number of epochs beyond its grid would only lead back to it: they were not tried"
    ]
    assert grown(make_arm("lora", lrs=RATES), lambda unit: loss(unit) - 0.01 * (unit.arm == "arm"))[2] != []
    harm = grown(make_arm("lora", lrs=RATES), lambda unit: 2.0 if unit.arm == "full" else 2 + 50 * unit.setting.lr)
    assert harm[2] == [Setting(1e-5, 1.0)]  # down to where it does no harm
    upward = grown(make_arm("lora", lrs=RATES), lambda u: 2.0 if u.arm == "full" else 2.1 - (u.setting.lr or 0))[2]
    assert upward[0] == Setting(1e-1, 1.0)  # higher rates may still gain
    masks = make_arm("mask", lrs=RATES, keep_ratios=[0.9, 0.99])  # at rate 0 masks drop weights too
    assert {setting.lr for setting in grown(masks, loss)[2]} == {1e-5, 1e-6}


def test_scales_that_gain_nothing_over_untrained_ones_are_not_led_back_to_them():
    """BitDelta's scales have most of the fine-tune's gain before they learn anything."""

    def loss(unit):
        return {"full": 2.0, "control": 1.9}.get(unit.arm, 1.92) + 10 * (unit.setting.lr or 0)

    untrained, trained = make_arm("bitdelta", of="control"), make_arm("bitdelta", of="control", lrs=RATES)
    arms = {"control": make_arm("control", lrs=[1e-3]), "untrained": untrained}
    assert grown(trained, loss, arms)[2] == []
    assert grown(trained, lambda unit: loss(unit) - 0.01 * (unit.arm == "arm"), arms)[2] != []
    del arms["untrained"]  # without it, the gain of the scales is unknown
    assert grown(trained, loss, arms)[2] != []


def test_an_arm_that_diverges_in_its_whole_grid_tries_lower_rates():
    study, done, _ = grown(make_arm("control", lrs=RATES), lambda u: math.inf if u.arm == "arm" else 2.0)
    words = "it diverged in each (lr 1e-06, epochs 1; lr 1e-05, epochs 1; lr 0.0001"
    assert words in why_no_setting(study, done)["code"]["arm"]


def test_a_mask_without_data_does_not_grow_towards_dropping_nothing():
    study, done, tried = grown(make_arm("random", keep_ratios=[0.9, 0.99]), lambda u: 3 - (u.setting.keep_ratio or 1))
    assert tried == []
    assert [end for end in open_ends(study, done) if end.arm == "arm"] == []


def test_what_is_tried_beside_the_best_is_all_that_lies_beside_it():
    grid = [Setting(lr, epochs) for lr in (1e-3, 1e-2) for epochs in (1.0, 2.0)]
    assert neighbours(grid[0], grid, grid) == neighbours(grid[0], grid, [*grid, Setting(1.0, 9.0)])
    assert [one.setting for one in neighbours(grid[0], grid, grid)] == [Setting(1e-4, 1.0), Setting(1e-3, 0.5)]
    assert neighbours(Setting(1e-3), [Setting(1e-3)], [Setting(1e-3)]) == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**30), st.integers(0, 12))
def test_a_study_ends_inside_its_grids_or_says_where_it_does_not(seed, extensions):
    values = {}

    def loss(unit):
        return values.setdefault(unit, random.Random(f"{seed} {unit}").random() + (unit.arm == "full"))

    control = make_arm("control", lrs=RATES, epochs=[1, 2], beta1s=[0, 0.9])
    study, done, tried = grown(control, loss, extensions=extensions, seeds=(0,))
    assert len(tried) <= extensions
    losses = {o.unit.setting: o.loss for o in done if o.unit.arm == "arm"}
    best = min(losses, key=losses.__getitem__)
    beside = {name: sorted({getattr(setting, name) for setting in losses}) for name in DIRECTIONS}
    ends = {end.what for end in open_ends(study, done) if end.arm == "arm"}
    for name, what in (("lr", "rate"), ("epochs", "number of epochs")):
        inside = beside[name][0] < getattr(best, name) < beside[name][-1]
        assert inside or what in ends
