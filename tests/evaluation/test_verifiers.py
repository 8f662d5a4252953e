"""When an answer is right: by its text, or by its last number."""

from decimal import Decimal

import pytest

from mft.evaluation.verifiers import VERIFIERS, last_number


@pytest.mark.parametrize(
    ("answer", "right"), [(" 12\n", True), ("12", True), ("12.", False), ("so 12", False), ("", False), ("1 2", False)]
)
def test_exact_answers_are_the_same_text_but_for_white_space_around(answer, right):
    assert VERIFIERS["exact"](answer, " 12") is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", "7"),
        ("#### 1,200", "1200"),
        ("that is $1,200.50.", "1200.50"),
        ("from 5-3", "3"),
        ("x = -3", "-3"),
        ("(2)-1", "1"),
        ("3, 4", "4"),
        ("1,2345", "2345"),
        ("50%", "50"),
        ("0.50", "0.5"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_last_number_decides_whatever_the_way_to_it():
    right = VERIFIERS["last_number"]
    assert right("Half of 8 is 4, and 4 + 68 makes 72.00", "48/2 = 24\n#### 72")
    assert not right("72 less 1 is 71", "#### 72")
    assert not right("I do not know", "#### 72")
