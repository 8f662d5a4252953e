"""Short problems with exact answers: arithmetic in words, conversions of units, dates and times, in 50 kinds.

Rows are {"prompt", "completion"}. A problem is its kind and its numbers. The problems of a kind are drawn in a fixed
order: the first 20 are for validation, the next 20 for test, and 400 more for train. So no problem is in two splits.
Train can be halved into different problems: one half to fine-tune on, and one to ask when answers are rewarded.
Problems of one kind resemble each other, and a model gets them right or wrong together. So a kind is a document.
"""

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

SPLIT_SIZES = {"validation": 20, "test": 20, "train": 400}  # problems per kind, in the order in which they are drawn
PROBLEM_SUBSETS = ("finetune", "rewards")  # of train: the first and the second half of each kind's problems
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Noah")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Kind:
    """One template: write(name, *numbers) returns question and answer. ranges: numbers come from their product."""

    write: Callable[..., tuple[str, object]]
    ranges: tuple[range, ...]


@dataclass(frozen=True)
class Problem:
    """kind is an index into KINDS; numbers identify the problem within its kind."""

    kind: int
    numbers: tuple[int, ...]
    question: str
    answer: str

    @property
    def row(self) -> dict[str, str]:
        return {"prompt": f"Q: {self.question}\nA:", "completion": f" {self.answer}"}


def make_problems(subset: str | None = None) -> dict[str, list[Problem]]:
    """Return the problems of each split, by kind; always the same ones. subset: use only this half of train."""
    splits: dict[str, list[Problem]] = {split: [] for split in SPLIT_SIZES}
    for number, kind in enumerate(KINDS):
        generator = random.Random(number)
        drawn = list(itertools.product(*kind.ranges))
        generator.shuffle(drawn)
        remaining = iter(drawn)
        for split, size in SPLIT_SIZES.items():
            for numbers in itertools.islice(remaining, size):
                question, answer = kind.write(generator.choice(NAMES), *numbers)
                splits[split].append(Problem(number, numbers, question, str(answer)))
    if subset is not None:
        half = SPLIT_SIZES["train"] // 2
        first = subset == PROBLEM_SUBSETS[0]
        train = splits["train"]
        splits["train"] = [problem for i, problem in enumerate(train) if (i // half % 2 == 0) == first]
    return splits


def fingerprint_of(splits: dict[str, list[Problem]]) -> str:
    """Return a hash of all questions and answers."""
    texts = (text for split in sorted(splits) for p in splits[split] for text in (split, p.question, p.answer))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def describe_problems(splits: dict[str, list[Problem]]) -> str:
    """Return one line for a report: how many problems there are, and what a document is."""
    sizes = " / ".join(f"{len(splits[split])} {split}" for split in ("train", "validation", "test"))
    return f"problems: {sizes} problems of {len(KINDS)} kinds, no two alike; a document is all problems of one kind"


def _clock(hours: int, minutes: int) -> str:
    """Return a time such as 14:05; minutes may exceed an hour."""
    return f"{hours + minutes // 60}:{minutes % 60:02}"


def _day(number: int) -> str:
    """Return a day of a common year, counted from 0: "3 May"."""
    day = date(2023, 1, 1) + timedelta(days=number)
    return f"{day.day} {MONTHS[day.month - 1]}"


def _weekday(number: int) -> str:
    return WEEKDAYS[number % 7]


TENS, TEENS, UNITS, HUNDREDS, MINUTES = range(10, 80), range(2, 24), range(2, 10), range(2, 200), range(5, 60, 5)
DIGITS, DAYS = (UNITS, UNITS, UNITS), (range(365), range(7))

KINDS: tuple[Kind, ...] = (
    # One sum, difference, product or quotient of single digits, and an irrelevant number
    Kind(lambda n, a, b, c: (f"{n} has {a} apples, {b} pears and {c} figs. How many apples and pears?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"A vase holds {c} roses, {a} lilies and {b} tulips. All but roses?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"Bus {c} carries {a} people and {b} get on. How many are on it?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} is {a} and has {c} dogs. How old is {n} in {b} years?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"On day {c} it is {a} degrees and gets {b} warmer. How warm is it?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"Team {c} won {a} games and lost {b}. How many did it play?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} is {a + b} and has {c} cats. How old was {n} {b} years ago?", a), DIGITS),
    Kind(lambda n, a, b, c: (f"Shelf {c} holds {a + b} books and {b} are lent. How many remain?", a), DIGITS),
    Kind(lambda n, a, b, c: (f"Rope {c} of {a + b} metres is cut by {b} metres. How long is it?", a), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} needs {a + b} nails and {c} bolts, and has {b} nails. How many to buy?", a), DIGITS),
    Kind(lambda n, a, b, c: (f"Room {c} has {a} tables of {b} chairs. How many chairs?", a * b), DIGITS),
    Kind(
        lambda n, a, b, c: (f"{n} buys {c} cards, and {a} pens at {b} dollars. What do the pens cost?", a * b), DIGITS
    ),
    Kind(lambda n, a, b, c: (f"{n} and {c} friends walk {a} miles a day. How far in {b} days?", a * b), DIGITS),
    Kind(lambda n, a, b, c: (f"Field {c} is {a} by {b} metres. What is its area?", a * b), DIGITS),
    Kind(lambda n, a, b, c: (f"Class {c} shares {a * b} cookies among {b} children. How many has each?", a), DIGITS),
    Kind(lambda n, a, b, c: (f"Hall {c} has {a * b} chairs in rows of {b}. How many rows?", a), DIGITS),
    # Two steps
    Kind(lambda n, a, b, c: (f"Field {c} is {a} by {b} metres. What is its perimeter?", 2 * (a + b)), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} buys {a} pears, {b} plums and {c} figs. How many fruits?", a + b + c), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} has {a} bags of {b} nuts and {c} more. How many nuts?", a * b + c), DIGITS),
    Kind(lambda n, a, b, c: (f"{a} pens at {b} dollars, paid with {a * b + c}. What is the change?", c), DIGITS),
    Kind(lambda n, a, b, c: (f"A cup costs {a} dollars, a plate {b}. What do {c} of each cost?", (a + b) * c), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} has {a + c} coins, finds {b} and spends {c}. How many are left?", a + b), DIGITS),
    Kind(lambda n, a, b, c: (f"{n} has {a} coins, Paul {b} more, Rose {c} more than Paul. Rose?", a + b + c), DIGITS),
    # Larger numbers
    Kind(lambda n, a, b: (f"{n} has {a} stamps and gives away {b}. How many are left?", a - b), (TENS, UNITS)),
    Kind(lambda n, a, b: (f"{n} read {a} pages one day and {b} the next. How many in all?", a + b), (TEENS, TEENS)),
    Kind(lambda n, a, b: (f"{n} packs {a} toys into bags of {b}. How many are left over?", a % b), (TENS, UNITS)),
    Kind(lambda n, a, b: (f"Which is larger, {a * 7} or {b * 11}?", max(a * 7, b * 11)), (TEENS, TEENS)),
    Kind(lambda n, a, b: (f"What is {10 * b} percent of {10 * a}?", a * b), (TENS, UNITS)),
    Kind(lambda n, a, b: (f"{n} was born in {1900 + a}. How old was {n} in {1900 + a + b}?", b), (TENS, TEENS)),
    # Conversions
    Kind(lambda n, a, b: (f"How many minutes are {b} hours and {a} minutes?", 60 * b + a), (range(1, 60), UNITS)),
    Kind(lambda n, a, b: (f"How many whole hours are {60 * b + a} minutes?", b), (range(1, 60), UNITS)),
    Kind(lambda n, a, b: (f"How many days are {a} weeks and {b} days?", 7 * a + b), (TENS, range(7))),
    Kind(lambda n, a, b: (f"How many inches are {a} feet and {b} inches?", 12 * a + b), (range(2, 50), range(12))),
    Kind(lambda n, a, b: (f"How many feet are {a} yards and {b} feet?", 3 * a + b), (HUNDREDS, range(3))),
    Kind(lambda n, a, b: (f"How many cents are {b} dollars and {a} cents?", 100 * b + a), (range(1, 100), UNITS)),
    Kind(lambda n, a, b: (f"How many metres are {b} km and {a} metres?", 1000 * b + a), (range(100, 900), UNITS)),
    Kind(lambda n, a, b: (f"How many grams are {b} kg and {a} grams?", 1000 * b + a), (range(100, 900), UNITS)),
    Kind(lambda n, a, b: (f"How many millimetres are {b} m and {a} cm?", 1000 * b + 10 * a), (TENS, UNITS)),
    Kind(lambda n, a, b: (f"How many whole metres are {100 * b + a} cm?", b), (TENS, UNITS)),
    Kind(lambda n, a, b: (f"What is {a}:{b:02} pm on a 24-hour clock?", _clock(a + 12, b)), (range(1, 12), range(60))),
    Kind(lambda n, a, b: (f"What is {a + 12}:{b:02} on a 12-hour clock?", _clock(a, b)), (range(1, 12), range(60))),
    # Dates and times
    Kind(lambda n, a, b: (f"Today is {_weekday(b)}, {_day(a)}. What day is tomorrow?", _weekday(b + 1)), DAYS),
    Kind(lambda n, a, b: (f"Today is {_weekday(b)}, {_day(a)}. What day was yesterday?", _weekday(b - 1)), DAYS),
    Kind(lambda n, a, b: (f"Today is {_weekday(b)}, {_day(a)}. What day is it in three days?", _weekday(b + 3)), DAYS),
    Kind(lambda n, a, b: (f"Which month is {a + 1}/{1980 + b}?", f"{MONTHS[a]} {1980 + b}"), (range(12), range(40))),
    Kind(lambda n, a, b: (f"What date is {b} days after {_day(a)}?", _day(a + b)), (range(350), UNITS)),
    Kind(lambda n, a, b: (f"What date is {b} days before {_day(a)}?", _day(a - b)), (range(10, 365), UNITS)),
    Kind(
        lambda n, a, b, c: (f"A film of {c} minutes starts at {_clock(a, b)}. When does it end?", _clock(a, b + c)),
        (range(8, 22), MINUTES, MINUTES),
    ),
    Kind(
        lambda n, a, b, c: (f"A train leaves at {_clock(a, b)} and needs {c} hours. When is it in?", _clock(a + c, b)),
        (range(4, 15), MINUTES, UNITS),
    ),
    Kind(
        lambda n, a, b, c: (f"{n} works from {_clock(a, b)} to {_clock(a, b + c)}. How many minutes is that?", c),
        (range(8, 18), MINUTES, MINUTES),
    ),
)
