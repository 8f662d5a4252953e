"""Questions from rows, and the rewards of their answers."""

import pytest
from half_right import make_rows

from mft.rewards.config import RewardsConfig
from mft.rewards.questions import Question, count_questions, questions_of, rewards_of, share_that_differs


def test_a_row_is_a_prompt_and_the_datas_own_answer(tokenizer):
    rows = make_rows([("Al has 5:", " 12"), ("Fay has 6:", " 3")], tokenizer)
    config = RewardsConfig(questions=2)
    found = questions_of(rows, tokenizer, config)
    assert [question.answer for question in found] == ["12", "3"]
    assert tokenizer.decode(found[1].prompt) == "Fay has 6:"
    assert count_questions(rows) == 2
    assert count_questions(rows.add_column("starts", [[0, 3], [0]])) == 3


def test_an_answer_that_could_never_be_said_is_refused_where_it_must_be_said(tokenizer):
    rows = make_rows([("Al has 5:", " 12 and 12 and 7")], tokenizer)
    few = {"questions": 1, "max_completion_tokens": 3}
    with pytest.raises(ValueError, match="row 0 of dataset must be answerable in max_new_tokens = 3, eos included"):
        questions_of(rows, tokenizer, RewardsConfig(**few))
    assert len(questions_of(rows, tokenizer, RewardsConfig(**few, verifier="last_number"))) == 1


def test_what_stands_before_eos_is_judged(tokenizer):
    asked = [Question([1], "12")] * 3
    eos = tokenizer.eos_token_id
    answers = [[*tokenizer.encode(text), eos, *tokenizer.encode(" 5")] for text in (" 12", "12 ", " 1")]
    assert rewards_of(answers, asked, tokenizer, RewardsConfig()) == [1.0, 1.0, 0.0]
    assert rewards_of(answers[::-1], asked, tokenizer, RewardsConfig(verifier="last_number")) == [0.0, 1.0, 1.0]


def test_questions_of_which_all_answers_are_alike_teach_nothing():
    assert share_that_differs([1, 1, 0, 0, 1, 0, 0, 1], 2) == 0.5
    assert share_that_differs([1, 1, 0, 0, 1, 0, 0, 1], 4) == 1
