"""Documents become rows of one length: every token once, no row over the budget, and no example cut without need."""

import random

import numpy
from hypothesis import given
from hypothesis import strategies as st

from mft.data.packing import best_fit_decreasing, build_rows
from mft.data.sources import Records
from mft.data.tokenization import IGNORED, Documents, Encoded


def documents_of(lengths, *, is_text=True):
    """Return documents whose tokens show where they came from: 1000 * document + position."""

    def encode(rows, place):
        ids = [numpy.arange(row["length"], dtype=numpy.int32) + 1000 * row["number"] for row in rows]
        return [Encoded(tokens, tokens) for tokens in ids]

    rows = [{"length": length, "number": i} for i, length in enumerate(lengths)]
    return Documents(Records(rows, str, [], range(len(rows))), encode, is_text)


LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=30)


@given(LENGTHS, st.integers(2, 20))
def test_packing_keeps_every_token_once(lengths, length):
    rows = build_rows(documents_of(lengths), length, -1, budget=None, packing=True, seed=0)
    kept = [int(token) for row, labels in zip(rows.input_ids, rows.labels) for token in row[labels != IGNORED]]
    every = [1000 * i + position for i, size in enumerate(lengths) for position in range(size) if size > 1]
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(every)
    assert len(every) - len(kept) <= 1  # a last row of one token predicts nothing
    assert all(len(row) == length for row in rows.input_ids)


@given(LENGTHS, st.integers(2, 20), st.integers(1, 12), st.booleans(), st.booleans())
def test_a_budget_is_never_exceeded_and_is_used_up_if_there_is_enough(lengths, length, budget, packing, is_text):
    def build(rows):
        return build_rows(documents_of(lengths, is_text=is_text), length, -1, budget=rows, packing=packing, seed=0)

    rows, everything = build(budget), build(None)
    assert len(rows) <= budget
    assert len(rows) >= min(budget, len(everything)) or packing


@given(LENGTHS, st.integers(2, 20), st.sampled_from([None, 1, 5]), st.booleans())
def test_unpacked_rows_hold_one_document_each(lengths, length, budget, is_text):
    rows = build_rows(documents_of(lengths, is_text=is_text), length, -1, budget=budget, packing=False, seed=0)
    for ids, labels, document in zip(rows.input_ids, rows.labels, rows.document):
        assert {int(token) // 1000 for token in ids[labels != IGNORED]} == {document}
        assert (ids[labels == IGNORED] == -1).all()
    assert rows.document == sorted(rows.document)


def test_a_budget_above_one_row_a_document_takes_the_first_row_of_each_before_a_second():
    rows = build_rows(documents_of([100] * 5), 10, -1, budget=7, packing=False, seed=0)
    assert set(rows.document) == set(range(5))


def test_only_as_much_is_tokenised_as_the_budget_needs():
    documents, seen = documents_of([100] * 1000), []
    encode = documents.encode
    documents.encode = lambda rows, place: seen.extend(rows) or encode(rows, place)
    build_rows(documents, 10, -1, budget=50, packing=True, seed=0)
    assert len(seen) <= 64


def packed(lengths, length, **options):
    documents = documents_of(lengths, is_text=False)
    return build_rows(documents, length, -1, **{"budget": None, "packing": True, "seed": 0} | options)


@given(LENGTHS, st.integers(2, 20), st.sampled_from([None, 1, 3]))
def test_packed_examples_stay_whole_and_apart(lengths, length, budget):
    rows, seen = packed(lengths, length, budget=budget), []
    kept = zip(rows.input_ids, rows.labels, rows.document, rows.members, rows.starts, rows.sizes)
    for ids, labels, document, members, starts, size in kept:
        assert document == ids[0] // 1000
        assert members == [ids[start] // 1000 for start in starts]
        for start, end in zip(starts, [*starts[1:], size]):
            number = int(ids[start]) // 1000
            assert ids[start:end].tolist() == [1000 * number + i for i in range(min(lengths[number], length))]
            assert labels[start] == IGNORED  # no visible token predicts an example's first token
            assert labels[start + 1 : end].tolist() == ids[start + 1 : end].tolist()
            seen.append(number)
        assert (ids[size:] == -1).all()
        assert (labels[size:] == IGNORED).all()
    assert len(seen) == len(set(seen))
    if budget is None:
        assert sorted(seen) == [i for i, n in enumerate(lengths) if n > 1]
        assert rows.cut == sum(n > length for n in lengths)


def test_a_budget_of_packed_rows_is_used_up():
    draw = random.Random(0)
    lengths = [draw.randint(19, 33) for _ in range(1000)]
    assert len(packed(lengths, 64, budget=100)) == 100


def test_texts_in_a_row_are_one_as_far_as_attention_goes():
    rows = build_rows(documents_of([7] * 20), 16, -1, budget=None, packing=True, seed=0)
    assert rows.starts == [[0]] * len(rows)
    assert {i for members in rows.members for i in members} == set(range(20))


@given(st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_decreasing_leaves_no_two_groups_that_would_be_one(sizes):
    groups = best_fit_decreasing(sizes, 40)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    totals = sorted(sum(sizes[i] for i in group) for group in groups)
    assert all(total <= 40 for total in totals)
    assert len(totals) < 2 or totals[0] + totals[1] > 40


def test_best_fit_decreasing_finds_what_first_fit_misses():
    assert best_fit_decreasing([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]


def test_a_hundred_thousand_examples_are_packed_in_seconds_and_hardly_padded():
    draw = random.Random(0)
    lengths = [draw.randint(20, 1024) for _ in range(100_000)]
    groups = best_fit_decreasing(lengths, 1024)
    assert sum(lengths) / (len(groups) * 1024) > 0.99
