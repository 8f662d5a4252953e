"""mft.data.problems: answers are right, splits share no problem, and each kind of problem is a document."""

import itertools
import re
from collections import Counter

import pytest

from mft.config import DataConfig
from mft.data.problems import KINDS, PROBLEM_SUBSETS, SPLIT_SIZES, make_problems
from mft.data.sources import open_source
from mft.data.splits import load_splits


@pytest.fixture(scope="module")
def problems():
    return make_problems()


def test_no_problem_stands_in_two_splits_or_twice_in_one(problems):
    everything = [problem for split in problems.values() for problem in split]
    assert len({(problem.kind, problem.numbers) for problem in everything}) == len(everything)
    pattern = re.compile(r"\d{1,5}|\d{1,2}:\d\d|\d{1,2} [A-Z][a-z]+|[A-Z][a-z]+day|[A-Z][a-z]+ \d{4}")
    assert all(pattern.fullmatch(problem.answer) for problem in everything)  # short, and never negative
    assert make_problems() == problems  # the same every time
    prompts = {split: {p.row["prompt"] for p in problems[split]} for split in problems}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]


def test_every_kind_has_all_its_problems_in_every_split(problems):
    assert len(KINDS) >= 40
    for split, size in SPLIT_SIZES.items():
        assert Counter(p.kind for p in problems[split]) == dict.fromkeys(range(len(KINDS)), size), split
    assert [len(problems[split]) for split in ("train", "validation", "test")] == [20_000, 1_000, 1_000]


@pytest.mark.parametrize(
    ("beginning", "numbers", "answer"),
    [
        ("Ada has 15 stamps and gives away 7.", (15, 7), 8),
        ("A vase holds 4 roses, 2 lilies and 3 tulips.", (2, 3, 4), 5),
        ("Class 4 shares 15 cookies among 3 children.", (5, 3, 4), 5),
        ("Field 9 is 3 by 4 metres. What is its perimeter?", (3, 4, 9), 14),
        ("2 pens at 3 dollars, paid with 10.", (2, 3, 4), 4),
        ("Ada has 6 coins, finds 3 and spends 4.", (2, 3, 4), 5),
        ("Ada packs 17 toys into bags of 5.", (17, 5), 2),
        ("What is 30 percent of 120?", (12, 3), 36),
        ("How many whole hours are 125 minutes?", (5, 2), 2),
        ("How many millimetres are 2 m and 35 cm?", (35, 2), 2350),
        ("What is 3:05 pm on a 24-hour clock?", (3, 5), "15:05"),
        ("What is 15:05 on a 12-hour clock?", (3, 5), "3:05"),
        ("Today is Sunday, 3 May. What day is tomorrow?", (122, 6), "Monday"),
        ("Today is Monday, 3 May. What day was yesterday?", (122, 0), "Sunday"),
        ("Today is Friday, 3 May. What day is it in three days?", (122, 4), "Monday"),
        ("Which month is 2/1999?", (1, 19), "February 1999"),
        ("What date is 3 days after 27 February?", (57, 3), "2 March"),
        ("What date is 3 days before 2 March?", (60, 3), "27 February"),
        ("A film of 55 minutes starts at 9:50.", (9, 50, 55), "10:45"),
        ("A train leaves at 8:05 and needs 9 hours.", (8, 5, 9), "17:05"),
        ("Ada works from 10:45 to 11:05.", (10, 45, 20), 20),
    ],
)
def test_answers_are_right(beginning, numbers, answer):
    drawn = [kind for kind in KINDS if numbers in itertools.product(*kind.ranges)]
    written = [kind.write("Ada", *numbers) for kind in drawn]
    assert [found for question, found in written if question.startswith(beginning)] == [answer]


def test_rows_score_the_answer_alone_and_a_kind_is_a_document(own_cache, tokenizer):
    splits = load_splits(DataConfig("problems", sequence_length=64, max_train_tokens=6400), tokenizer)
    assert set(splits.validation["document"]) == set(splits.test["document"]) == set(range(len(KINDS)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (100, 1000, 1000)
    wanted = Counter(f" {p.answer}{tokenizer.eos_token}" for p in make_problems()["validation"])
    labels = [[token for token in row if token >= 0] for row in splits.validation["labels"]]
    assert Counter(map(tokenizer.decode, labels)) == wanted
    assert any("of 50 documents" in note for note in splits.notes if note.startswith("test"))


def test_the_seed_changes_train_alone(own_cache, tokenizer):
    one, two = (
        load_splits(DataConfig("problems", sequence_length=64, max_train_tokens=6400, seed=seed), tokenizer)
        for seed in (0, 1)
    )
    assert one.test["input_ids"] == two.test["input_ids"]
    assert one.validation["input_ids"] == two.validation["input_ids"]
    assert one.train["input_ids"] != two.train["input_ids"]


def test_the_two_halves_of_train_share_no_problem_and_are_all_of_it(problems):
    halves = [make_problems(subset) for subset in PROBLEM_SUBSETS]
    assert all(Counter(p.kind for p in half["train"]) == dict.fromkeys(range(len(KINDS)), 200) for half in halves)
    first, second = ({(p.kind, p.numbers) for p in half["train"]} for half in halves)
    assert not first & second
    assert first | second == {(p.kind, p.numbers) for p in problems["train"]}
    for half in halves:
        assert half["validation"] == problems["validation"]
        assert half["test"] == problems["test"]


def test_a_subset_is_said_and_has_rows_of_its_own(own_cache, tokenizer):
    config = {"source": "problems", "sequence_length": 64, "max_train_tokens": 6400}
    whole, half, other = (
        load_splits(DataConfig(**config, subset=subset), tokenizer) for subset in (None, *PROBLEM_SUBSETS)
    )
    assert any("train is the finetune subset, half of each kind's problems" in note for note in half.notes)
    assert not any("subset" in note for note in whole.notes)
    assert half.train["input_ids"] != other.train["input_ids"] != whole.train["input_ids"]
    assert half.test["input_ids"] == other.test["input_ids"] == whole.test["input_ids"]


def test_an_unknown_subset_is_refused():
    with pytest.raises(ValueError, match="data.subset must be finetune, rewards or null for problems, got 'easy'"):
        open_source(DataConfig("problems", subset="easy"))
