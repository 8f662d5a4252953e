"""Whether an answer is right, by the data's own answer: the same text, or the same number at the end."""

import re
from collections.abc import Callable
from decimal import Decimal

Verifier = Callable[[str, str], bool]  # (what the model says, the data's own answer), each up to eos

# A minus after a digit, a letter or a bracket takes away; commas part thousands alone, so "1,2" are two numbers.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def same_text(answer: str, wanted: str) -> bool:
    """The same characters but for white space at the ends."""
    return answer.strip() == wanted.strip()


def same_last_number(answer: str, wanted: str) -> bool:
    """The last numbers of both are equal: "so she has $1,200.00 left" is right where "... #### 1200" is wanted.

    What comes before it may be any reasoning. An answer without a number is wrong.
    Raises: ValueError if wanted has none.
    """
    number = last_number(wanted)
    if number is None:
        raise ValueError(f"completion must hold a number for the verifier last_number, got {wanted!r}")
    return last_number(answer) == number


def last_number(text: str) -> Decimal | None:
    """The last decimal number in text; thousands may be parted by commas. None if there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


VERIFIERS: dict[str, Verifier] = {"exact": same_text, "last_number": same_last_number}
