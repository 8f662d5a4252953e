"""Verify an answer by the data's own answer: the same text, or the same last number."""

import re
from collections.abc import Callable
from decimal import Decimal

Verifier = Callable[[str, str], bool]  # (the model's answer, the data's own answer), each up to eos

# A minus after a digit, letter, dot or bracket is a subtraction. Commas only separate thousands: "1,2" is two numbers.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def same_text(answer: str, wanted: str) -> bool:
    """Whether both texts are the same except for white space at the ends."""
    return answer.strip() == wanted.strip()


def same_last_number(answer: str, wanted: str) -> bool:
    """Return whether both last numbers are equal: "so she has $1,200.00 left" is correct for "... #### 1200".

    Raises: ValueError if wanted has no number.
    """
    number = last_number(wanted)
    if number is None:
        raise ValueError(f"completion must hold a number for the verifier last_number, got {wanted!r}")
    return last_number(answer) == number


def last_number(text: str) -> Decimal | None:
    """Return the last decimal number in text, or None if there is none. Commas may separate thousands."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


VERIFIERS: dict[str, Verifier] = {"exact": same_text, "last_number": same_last_number}
