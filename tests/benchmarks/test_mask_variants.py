"""The comparison of ways to train masks: its search for rates, its ranking, and rules that change what they say."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import make_rows, masked_llama

from benchmarks.mask_variants.__main__ import CONTROL, START, Variant, ranked, search
from benchmarks.mask_variants.ground import Log, Tried
from benchmarks.mask_variants.rules import (
    FreeThreshold,
    GradientSigmoid,
    GradientWindow,
    KeepSchedule,
    PullToStart,
    Rule,
    ScoreAverage,
    ScoreNoise,
    SlowThreshold,
)
from mft.config import TrainConfig
from mft.masks.convert import masked_modules
from mft.training.loop import train_masks

STEPS = 4


def test_a_search_tries_three_rates_and_repeats_none_that_stands_in_the_log(tmp_path):
    log, tried = Log(tmp_path / "log.jsonl"), []

    class Ground:
        situation, seed = SimpleNamespace(name="s", epochs=2.0), 0

        def masks(self, name, lr, epochs, keep_ratio, rules, *, init, train):
            tried.append((lr, epochs))
            return log.add(Tried("s", name, 0, lr, epochs, keep_ratio, 1.0, [1.0, 1.0], [1.0, 1.0]))

    Ground.log = log
    log.add(Tried("s", START, 0, None, None, None, 1.0, [1.0, 1.0], [1.0, 1.0]))
    variant = Variant("plain", "", 0.9, 2e-3, longer=2.0)
    log.add(Tried("s", "plain", 0, 2e-3, 4.0, 0.9, 1.0, [1.0, 1.0], [1.0, 1.0]))
    search(Ground(), variant)
    assert tried == [(1e-3, 4.0), (4e-3, 4.0)]


def test_each_seed_is_paired_with_its_own_fine_tune_and_control(tmp_path):
    log = Log(tmp_path / "log.jsonl")

    def add(variant, seed, lr, *losses):
        log.add(Tried("s", variant, seed, lr, 1.0, None, sum(losses) / len(losses), list(losses), [1.0] * len(losses)))

    for seed, start in ((0, 2.0), (1, 3.0)):
        add(START, seed, None, start, start)
        add(CONTROL, seed, 1e-3, start - 0.2, start - 0.2)
        add("window", seed, 1e-3, start - 0.3, start - 0.1)
    add(CONTROL, 0, 1e-2, 5.0, 5.0)  # the worse rate is not the control
    add("window", 1, 1e-2, 0.1, 0.1)  # settings are chosen with the first seed
    rows = {row.variant: row for row in ranked(Log(tmp_path / "log.jsonl"), "s")}
    assert set(rows) == {START, CONTROL, "window"}
    assert rows["window"].from_finetune == pytest.approx(-0.2)
    assert rows["window"].from_control == pytest.approx(0.0)
    assert rows["window"].lr == 1e-3
    assert (rows["window"].seeds, rows[CONTROL].tried) == (2, 2)


def trained(*rules, keep_ratio=0.9, lr=3e-3):
    """A masked model trained under rules, and what its masks kept after each step."""
    model = masked_llama(init="magnitude", keep_ratio=keep_ratio)
    kept = []
    for rule in rules:
        rule.begin(model, STEPS)

    def after(report):
        for rule in rules:
            rule.after_update(report.step, report.steps)
        masks = [module.mask() for module in masked_modules(model).values()]
        kept.append(sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))

    train_masks(
        model,
        make_rows(),
        TrainConfig(lr=lr, steps=STEPS),
        before_update=lambda step, steps: [rule.before_update(step, steps) for rule in rules],
        on_step=after,
    )
    for rule in rules:
        rule.end()
    return model, kept


def scores(model):
    return torch.cat([module.scores.detach().flatten() for module in masked_modules(model).values()])


def test_the_keep_ratio_falls_from_one_to_its_end():
    _, kept = trained(KeepSchedule(0.8, 1.0), keep_ratio=1.0)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.85
    assert kept[-1] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "rule", [GradientWindow(1.0), GradientSigmoid(1.0), ScoreNoise(0.3), PullToStart(0.5), SlowThreshold(0.5)]
)
def test_a_rule_changes_what_is_learned(rule):
    plain, _ = trained()
    changed, _ = trained(rule)
    assert not torch.equal(scores(plain), scores(changed))


def test_a_window_without_an_edge_changes_nothing():
    assert torch.equal(scores(trained()[0]), scores(trained(GradientWindow(math.inf))[0]))


def test_noise_decides_but_the_scores_stay_clean():
    still, _ = trained(ScoreNoise(0.3), lr=1e-12)
    assert torch.allclose(scores(still), scores(masked_llama(init="magnitude")), atol=1e-6)
    noisy, clean = trained(ScoreNoise(0.3))[0], trained()[0]
    assert not torch.allclose(scores(noisy), scores(clean), atol=1e-4)  # gradients were those of other masks


def test_the_average_is_an_exponential_mean_of_the_scores_on_the_way():
    seen = []

    class Watch(Rule):
        def begin(self, model, steps):
            self.model = model
            seen.append(scores(model))

        def after_update(self, step, steps):
            seen.append(scores(self.model))

    average = ScoreAverage(0.5)  # over 2 of 4 steps
    found = scores(trained(Watch(), average)[0])
    mean = seen[0]
    for later in seen[1:]:
        mean = math.exp(-1 / 2) * mean + (1 - math.exp(-1 / 2)) * later
    assert torch.allclose(found, mean)
    assert not torch.allclose(found, seen[-1])


def test_a_free_threshold_begins_at_the_fine_tune():
    model = masked_llama(init="magnitude", keep_ratio=1.0)
    FreeThreshold().begin(model, STEPS)
    assert all(module.mask().all() for module in masked_modules(model).values())
    _, kept = trained(FreeThreshold(), keep_ratio=1.0)
    assert 0.5 < kept[-1] < 1
