"""Titles of pictures: each agrees with the numbers."""

import pytest

from mft_study.report.pictures import titles
from mft_study.report.pictures.by_bytes import Point


def rows(**losses):
    return {"rows": [{"arm": arm, "minus_full": {"estimate": loss}} for arm, loss in losses.items()]}


def test_the_lowest_loss_is_named_if_it_is_below_the_reference():
    assert titles.lowest_loss("code", rows(mask=-0.1, lora=-0.2), "full") == "code: lora has the lowest test loss"
    assert titles.lowest_loss("code", rows(mask=0.1), "full") == "code: no arm has a lower test loss than full"


@pytest.mark.parametrize(
    ("estimate", "p", "said"),
    [(-0.1, 0.01, "code: mask is"), (-0.1, 0.06, "code: no mask is"), (0.1, 0.01, "code: no mask is")],
)
def test_a_mask_is_ahead_of_its_control_if_the_difference_is_shown(estimate, p, said):
    mask = {"arm": "mask", "masked": True, "minus_control": {"loss": {"estimate": estimate, "p_holm": p}}}
    control = {"arm": "control", "masked": False, "minus_control": {}}
    assert titles.masks_beside_control("code", {"rows": [control, mask]}) == f"{said} ahead of the control"


def test_rates_at_the_end_of_a_grid_are_named():
    tried = {"mask": {1.0, 2.0, 3.0}, "lora": {1.0, 2.0, 3.0}, "one": {1.0}}
    inside = titles.rates("code", tried, {"mask": 2.0, "lora": 2.0, "one": 1.0})
    assert inside == "code: the best rate of each arm lies inside its grid"
    assert titles.rates("code", tried, {"mask": 3.0, "lora": 2.0}) == "code: mask best at an end of the grid"


@pytest.mark.parametrize(
    ("loss", "size", "said"),
    [
        (-0.2, 100, "lora is 0.100 lower than mask\nin no more bytes"),
        (0.0, 100, "lora is 0.100 higher than mask\nin no more bytes"),
        (-0.1001, 100, "lora is level with mask\nin no more bytes"),
        (-0.2, 110, "nothing else is as small as mask"),
    ],
)
def test_an_adapter_of_no_more_bytes_is_compared_with_the_mask(loss, size, said):
    found = [Point("mask", "mask", 100, 0, -0.1, 0), Point("lora", "lora", size, 0, loss, 0)]
    assert titles.at_equal_bytes("code", found) == f"code: {said}"
