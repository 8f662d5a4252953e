"""The next units of a study: the order of its phases, its grids, and the notes for its reader."""

import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft.config import DataConfig
from mft.evaluation.evaluate import Evaluation
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.config import LeadersConfig, StudyConfig
from mft_study.outcome import Measured, Outcome, Unit
from mft_study.study_plan import (
    chosen_settings,
    chosen_units,
    notes,
    parts_of,
    ready,
    sorted_outcomes,
    source_of,
    starts_of,
    why_no_setting,
    work_left,
)

RATES = [1e-4, 1e-3, 1e-2]
ARMS = {
    "base": make_arm("base"),
    "full": make_arm("full", lrs=RATES, epochs=[1, 2]),
    "control": make_arm("control", lrs=RATES),
    "random": make_arm("random", keep_ratios=[0.9, 0.99]),
    "temperature": make_arm("temperature"),
    "MFT": make_arm("mask", lrs=RATES, keep_ratios=[0.9, 0.99]),
    "mean": make_arm("average", of="MFT", runs=3),
}


def make(arms=ARMS, seeds=(0, 1), extensions=2, domains=("code",), **options):
    domains = {name: DataConfig() for name in domains}
    return StudyConfig(arms=dict(arms), domains=domains, seeds=list(seeds), extensions=extensions, **options)


def outcome(unit, loss, size=None):
    """Return a finished unit with this validation loss and these bytes; an infinite loss means that it diverged."""
    if math.isinf(loss):
        return Outcome(unit, None, diverged="the loss must stay finite, got nan")
    one = torch.ones(1, dtype=torch.float64)
    return Outcome(unit, Measured(Evaluation(torch.zeros(1), one, one * loss, one)), bytes=size)


def bowl(best, keep=0.9):
    """Return a loss that is least at this rate, this keep ratio and one epoch; every arm beats the full fine-tune."""

    def loss(unit):
        setting = unit.setting
        far = 0 if setting.lr is None else abs(math.log(setting.lr / best))
        start = 20 if unit.arm == "full" else 2
        return start + far + abs((setting.keep_ratio or keep) - keep) + 0.1 * abs((setting.epochs or 1) - 1)

    return loss


def play(study, loss, done=(), order=None, workers=1, size=lambda unit: None):
    """Run units until nothing is left, at most ``workers`` at a time, in random order; return the outcomes in order."""
    done, running = list(done), []
    order = order or random.Random(0)
    while True:
        waiting = [unit for unit in ready(study, done) if unit not in running]
        order.shuffle(waiting)
        running += waiting[: workers - len(running)]
        if not running:
            return done
        unit = running.pop(order.randrange(len(running)))
        done.append(outcome(unit, loss(unit), size(unit)))


def tried(outcomes, arm, seed=0):
    return sorted(o.unit.setting.lr for o in outcomes if (o.unit.arm, o.unit.seed, o.unit.part) == (arm, seed, 0))


def test_the_fine_tunes_of_every_seed_come_before_any_other_trained_arm():
    done = play(make(), bowl(1e-3))
    last = max(i for i, o in enumerate(done) if o.unit.arm == "full")
    first = min(i for i, o in enumerate(done) if o.unit.arm not in ("base", "full"))
    assert last < first
    assert {o.unit.seed for o in done[: last + 1] if o.unit.arm == "full"} == {0, 1}


def test_other_seeds_run_the_setting_that_the_first_one_chose():
    done = play(make(), bowl(1e-3))
    for arm in ("full", "control"):
        assert tried(done, arm, seed=0)[::2] if arm == "full" else tried(done, arm) == RATES
        assert tried(done, arm, seed=1) == [1e-3]


def test_base_runs_once_whatever_the_seeds():
    units = [o.unit for o in play(make(seeds=(3, 1, 2)), bowl(1e-3)) if o.unit.arm == "base"]
    assert units == [Unit("code", "base", 3, Setting())]


def test_an_average_waits_for_its_parts_and_reuses_the_arms_own_run():
    study = make()
    done = play(study, bowl(1e-3))
    order = [o.unit for o in done]
    for seed in study.seeds:
        whole = Unit("code", "mean", seed, Setting(1e-3, 1.0, 0.9))
        parts = parts_of(study, whole)
        assert [(p.arm, p.part) for p in parts] == [("MFT", 0), ("mean", 1), ("mean", 2)]
        assert all(order.index(part) < order.index(whole) for part in parts)
        assert parts_of(study, parts[1]) == []
    assert sum(unit.arm == "mean" for unit in order) == 2 * 3


def test_test_sees_every_arm_and_seed_in_its_chosen_setting():
    study = make()
    done = play(study, bowl(1e-3))
    units = chosen_units(study, done)
    assert len(units) == 1 + 6 * 2
    assert set(units) <= {o.unit for o in done}
    assert Unit("code", "random", 1, Setting(keep_ratio=0.9)) in units


def test_the_grid_grows_while_its_best_rate_is_at_an_end():
    assert tried(play(make(), bowl(1e-1)), "control") == [*RATES, 1e-1, 1.0]
    assert tried(play(make(), bowl(1e-5)), "control") == [1e-6, 1e-5, *RATES]
    assert tried(play(make(), bowl(1e-3)), "control") == RATES
    assert tried(play(make(), bowl(1e-9)), "control") == [1e-6, 1e-5, *RATES]  # no more than the allowed extensions
    assert tried(play(make(extensions=0), bowl(1e-1)), "control") == RATES


def test_a_rate_that_diverges_is_a_trial_but_is_not_chosen():
    def loss(unit):
        return math.inf if (unit.setting.lr or 0) >= 1e-2 else bowl(1e-2)(unit)

    study = make()
    done = play(study, loss)
    assert chosen_settings(study, done)["code"]["control"].lr == 1e-3
    assert "code, control, lr 0.01, epochs 1, seed 0: the loss must stay finite, got nan" in notes(study, done)


def test_a_setting_that_diverges_with_another_seed_gives_way_to_the_next_best():
    def loss(unit):
        return math.inf if unit.seed == 1 and unit.setting.lr == 1e-3 else bowl(1.2e-3)(unit)

    study = make()
    done = play(study, loss)
    assert chosen_settings(study, done)["code"]["control"].lr == 1e-2
    assert tried(done, "control", seed=1) == [1e-3, 1e-2]
    assert {unit.setting.lr for unit in chosen_units(study, done) if unit.setting.lr} == {1e-2}


def test_a_part_that_diverges_takes_its_arm_to_another_setting_too():
    def loss(unit):
        return math.inf if unit.part == 2 and unit.setting.lr == 1e-3 else bowl(1.2e-3)(unit)

    chosen = chosen_settings(make(), play(make(), loss))["code"]
    assert chosen["MFT"] == chosen["mean"] == Setting(1e-2, 1.0, 0.9)


def test_a_study_goes_on_without_an_arm_that_always_diverges_unless_others_begin_there():
    def lost(arm):
        return lambda unit: math.inf if unit.arm == arm else 2.0

    study = make()
    done = play(study, lost("MFT"))
    (why,) = (words for arm, words in why_no_setting(study, done)["code"].items() if arm == "MFT")
    assert re.match(r"code, MFT must stay finite in one of its settings.*arms.MFT.lrs", why)
    assert why_no_setting(study, done)["code"]["mean"] == "code, mean must have what it needs, MFT, which has no result"
    assert {unit.arm for unit in chosen_units(study, done)} == {"base", "full", "control", "random", "temperature"}
    assert work_left(study, done, chosen_units(study, done)) == (0, 0)
    with pytest.raises(RuntimeError, match=r"code, full must stay finite in one of its settings.*arms.full.lrs"):
        play(make(), lost("full"))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 5), st.data())
def test_what_is_chosen_depends_neither_on_order_nor_on_interruptions_nor_on_workers(seed, workers, data):
    table = random.Random(seed)
    values = {}

    def loss(unit):
        if unit not in values:
            values[unit] = table.choice([2.0, 2.1, 2.2, 2.3, 2.4, 2.5]) + (unit.setting.lr or 0)
        return values[unit]

    study = make(domains=("code", "math"))
    whole = play(study, loss)
    cut = data.draw(st.integers(0, len(whole)))
    again = play(study, loss, done=whole[:cut], order=random.Random(seed), workers=workers)
    assert chosen_settings(study, again) == chosen_settings(study, whole)
    assert [o.unit for o in sorted_outcomes(study, again)] == [o.unit for o in sorted_outcomes(study, whole)]


def test_more_seeds_or_rates_need_only_what_is_new():
    done = play(make(), bowl(1e-3))
    more = play(make(seeds=(0, 1, 2)), bowl(1e-3), done=done)
    assert {o.unit.seed for o in more[len(done) :]} == {2}
    wider = ARMS | {"control": make_arm("control", lrs=[*RATES, 3e-3])}
    more = play(make(wider), bowl(1e-3), done=done)
    assert [o.unit for o in more[len(done) :]] == [Unit("code", "control", 0, Setting(3e-3, 1.0))]


CHAIN = {
    "mask on control": make_arm("mask", lrs=RATES, start="control"),
    "part of MFT": make_arm("interpolated", of="MFT", alphas=[0.5, 1]),
    **ARMS,
}


def test_an_arm_waits_for_where_it_begins_and_for_what_it_is_made_of():
    study = make(CHAIN)
    order = [o.unit for o in play(study, bowl(1e-3), workers=3)]
    for arm, needed in (("mask on control", "control"), ("part of MFT", "MFT"), ("mean", "MFT"), ("control", "full")):
        first = min(i for i, unit in enumerate(order) if unit.arm == arm)
        assert first > max(i for i, unit in enumerate(order) if unit.arm == needed)


def test_starts_lead_from_the_base_to_where_a_unit_begins_and_a_source_is_the_chosen_run():
    study = make(CHAIN)
    done = play(study, bowl(1e-3))
    chosen = chosen_settings(study, done)
    unit = Unit("code", "mask on control", 1, Setting(1e-3, 1.0, 0.9))
    full, control = Unit("code", "full", 1, Setting(1e-3, 1.0)), Unit("code", "control", 1, Setting(1e-3, 1.0))
    assert starts_of(study, chosen, unit) == [full, control]
    assert source_of(study, chosen, unit) is None
    part = Unit("code", "part of MFT", 1, Setting(alpha=0.5))
    assert starts_of(study, chosen, part) == [full]
    assert source_of(study, chosen, part) == Unit("code", "MFT", 1, Setting(1e-3, 1.0, 0.9))
    assert {o.unit.setting.alpha for o in done if o.unit.arm == "part of MFT" and o.unit.seed == 0} == {0.5, 1}


LEADING = ARMS | {"LoRA": make_arm("lora", lrs=RATES), "small": make_arm("lora", lrs=RATES)}
RANK = {"LoRA": 1.0, "control": 1.1, "small": 1.2, "mean": 1.3, "MFT": 1.4}  # less is better
SIZES = {"LoRA": 900, "control": 9_000, "small": 100, "mean": 300, "MFT": 100}


def seeds_that_ran(leaders, workers=1, **options):
    study = make(LEADING, seeds=(0, 2), leaders=leaders, **options)
    loss = lambda unit: bowl(1e-3)(unit) + 10 * RANK.get(unit.arm, 5.0)  # noqa: E731
    done = play(study, loss, workers=workers, size=lambda unit: SIZES.get(unit.arm))
    seeds = {}
    for unit in chosen_units(study, done):
        seeds.setdefault(unit.arm, []).append(unit.seed)
    ran = {(o.unit.arm, o.unit.seed) for o in done if not o.unit.part}
    assert {(arm, seed) for arm, each in seeds.items() for seed in each} <= ran
    order = [o.unit.seed in study.further_seeds for o in done]
    assert order == sorted(order)  # the leaders are known only when all arms have run
    assert sorted_outcomes(study, done)
    return {arm for arm, each in seeds.items() if each == [0, 2, 1, 3]}, study


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("leaders", "expected"),
    [
        (LeadersConfig(seeds=4), {"LoRA", "control", "MFT", "full"}),
        (LeadersConfig(seeds=4, arms=1), {"LoRA", "MFT", "full"}),
        (LeadersConfig(seeds=4, arms=4), {"LoRA", "control", "small", "mean", "MFT", "full"}),
        (LeadersConfig(seeds=4, arms=1, max_bytes=[100, 1_000]), {"small", "LoRA", "MFT", "full"}),
        (LeadersConfig(seeds=4, arms=1, max_bytes=[10]), set()),
    ],
)
def test_what_leads_on_validation_runs_with_further_seeds(leaders, expected, workers):
    found, study = seeds_that_ran(leaders, workers)
    assert found == expected
    assert (study.further_seeds, study.all_seeds) == ([1, 3], [0, 2, 1, 3])
