"""Documents become rows of one length: every token once, no row beyond the budget, no example cut without need."""

import random

import numpy
from hypothesis import given
from hypothesis import strategies as st

from mft.data.packing import build_rows
from mft.data.sources import Records
from mft.data.tokenization import IGNORED, Documents, Encoded


def documents_of(lengths, *, is_text=True):
    """Documents whose tokens tell where they came from: 1000 * document + position."""

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


def test_packed_examples_stay_whole():
    lengths = [random.Random(0).randint(2, 10) for _ in range(50)]
    rows = build_rows(documents_of(lengths, is_text=False), 16, -1, budget=None, packing=True, seed=0)
    where = {}
    for number, ids in enumerate(rows.input_ids):
        for token in ids[ids >= 0]:
            where.setdefault(int(token) // 1000, set()).add(number)
    assert [len(found) for found in where.values()] == [1] * 50
    assert len(rows) <= 1.25 * sum(lengths) / 16
