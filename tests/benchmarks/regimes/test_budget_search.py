"""The search for a mask under a budget: every variant runs, keeps its budget, and is compared on validation only."""

import dataclasses

import pytest
from small_regime import counting, scratch

from benchmarks.regimes.budget_search import (
    BYTES,
    DROPPED,
    LOSS,
    NATS,
    SHARE,
    TEXT,
    USUAL,
    VARIANTS,
    BudgetSearch,
    mask_arm,
)
from benchmarks.regimes.runs import carry_out

SOME = (USUAL, "wanda start", "share of each matrix")


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    return BudgetSearch(
        rates={variant: [1e-2] for variant in SOME},
        seeds=[0, 1],
        scratch=scratch(directory),
        extensions=0,
        workers=1,
        data=counting(directory, "a", 1),
    )


@pytest.fixture(scope="module")
def result(search, tmp_path_factory):
    return carry_out(search, tmp_path_factory.mktemp("out"), "test", lambda line: None)


def test_each_run_has_the_nats_of_each_document_and_the_bytes_of_its_mask(result):
    assert len(result["runs"]) == 2 * len(SOME)
    for run in result["runs"]:
        assert len(run[NATS][TEXT]) == len(result["documents"]["tokens"][TEXT])
        assert run[BYTES] > 0
        assert run[DROPPED] == pytest.approx(SHARE, abs=0.002)


def test_variants_are_compared_with_the_usual_budget(result):
    for arm, found in result["arms"].items():
        if arm == USUAL:
            assert found[f"{LOSS} - {USUAL}"] is None
        else:
            difference = found[LOSS] - result["arms"][USUAL][LOSS]
            assert found[f"{LOSS} - {USUAL}"]["estimate"] == pytest.approx(difference, abs=1e-4)


def test_a_variant_is_the_usual_budget_but_for_what_its_name_says():
    usual = mask_arm(USUAL, [1e-2])
    assert usual.budget == SHARE
    arms = {variant: mask_arm(variant, [1e-2]) for variant in VARIANTS if variant != USUAL}
    differing = {
        variant: [
            field.name
            for field in dataclasses.fields(arm)
            if getattr(arm, field.name) != getattr(usual, field.name) and field.name != "fill_budget"
        ]
        for variant, arm in arms.items()
    }
    assert all(len(names) == 1 for names in differing.values())
