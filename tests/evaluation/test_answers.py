"""mft.evaluation.exact_match: what counts as an exact answer; batches and their padding change nothing."""

import copy

import pytest
import torch
from datasets import Dataset
from half_right import make_model, make_rows, make_tokenizer, questions
from tiny import make_llama

from mft.config import MaskConfig
from mft.evaluation.exact_match import exact_matches
from mft.evaluation.exchanges import Exchange, find_answers
from mft.masks.convert import mask_model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def in_documents(count):
    """Return questions in three documents."""
    return [(*pair, i % 3) for i, pair in enumerate(questions(count))]


def by_hand(model, tokenizer, dataset):
    """Compute the definition: one prompt at a time, no cache, no padding, argmax."""
    right = {}
    for ids, labels, document in zip(dataset["input_ids"], dataset["labels"], dataset["document"]):
        first = next(i for i, label in enumerate(labels) if label != -100)
        wanted = tokenizer.decode([i for i in labels if i not in (-100, tokenizer.eos_token_id)]).strip()
        tokens, found = ids[:first], []
        while len(found) < 8 and found[-1:] != [tokenizer.eos_token_id]:
            with torch.no_grad():
                found.append(model(torch.tensor([tokens + found])).logits[0, -1].argmax().item())
        found = found[:-1] if found[-1] == tokenizer.eos_token_id else found
        hits = right.setdefault(document, [0, 0])
        hits[0] += tokenizer.decode(found).strip() == wanted
        hits[1] += 1
    return [torch.tensor([right[d][i] for d in sorted(right)]) for i in (0, 1)]


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_answers_are_those_of_greedy_decoding_by_hand_whatever_the_batch(model, tokenizer, batch_size):
    dataset = make_rows(in_documents(40), tokenizer)
    wanted, asked = by_hand(model, tokenizer, dataset)
    assert 5 < wanted.sum() < 35
    answers, count = exact_matches(model, tokenizer, dataset, batch_size=batch_size, max_new_tokens=8)
    assert torch.equal(answers, wanted)
    assert torch.equal(count, asked)
    assert answers.dtype == count.dtype == torch.int64


def test_masked_models_answer_and_a_mask_changes_answers(model, tokenizer):
    dataset = make_rows(in_documents(24), tokenizer)
    plain, _ = exact_matches(model, tokenizer, dataset)
    kept = mask_model(copy.deepcopy(model), MaskConfig(keep_ratio=1.0))
    assert torch.equal(exact_matches(kept, tokenizer, dataset)[0], plain)
    dropped = mask_model(copy.deepcopy(model), MaskConfig.paper(keep_ratio=0.1))
    assert exact_matches(dropped, tokenizer, dataset)[0].sum() < plain.sum()


class Parrot(torch.nn.Module):
    """A model that continues every prompt with the same tokens."""

    def __init__(self, reply):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.reply = reply
        self.generation_config = None

    def generate(self, ids, attention_mask):
        return torch.cat([ids, torch.tensor([self.reply] * len(ids))], dim=1)


@pytest.mark.parametrize(
    ("reply", "right"),
    [(" 12", True), ("12", True), (" 12 \n", True), (" 123", False), (" 1", False), (" 1 2", False), ("", False)],
)
def test_the_text_up_to_eos_must_be_the_same_but_for_white_space_around(tokenizer, reply, right):
    dataset = make_rows([("Al has 5:", " 12", 7)], tokenizer)
    tokens = [*tokenizer.encode(reply), tokenizer.eos_token_id, *tokenizer.encode(" and")]
    answers, asked = exact_matches(Parrot(tokens), tokenizer, dataset)
    assert (answers.tolist(), asked.tolist()) == ([int(right)], [1])


@pytest.mark.parametrize(
    ("ids", "scored", "starts", "pairs", "found"),
    [
        ([1, 2, 3, 0, 0], [2, 3], [0], False, [([1, 2], [3, 0])]),
        ([1, 2, 0, 4, 5, 6, 0], [1, 2, 5, 6], [0], False, [([1], [2, 0]), ([1, 2, 0, 4, 5], [6, 0])]),
        ([1, 2, 9, 4, 5, 6], [1, 2, 5], [0], False, [([1], [2, 9])]),
        ([1, 2, 3, 0], [0, 1, 2, 3], [0], False, []),
        ([1, 2, 0, 1, 3, 0], [1, 2, 4, 5], [0, 3], True, [([1], [2, 0])]),
        ([1, 2, 0, 1, 3, 0], [1, 2, 4, 5], [0, 3], False, [([1], [2, 0]), ([1], [3, 0])]),
    ],
    ids=["padding", "two turns", "one cut off", "text", "pair", "packed"],
)
def test_an_answer_is_what_is_scored_after_a_prompt_up_to_an_end(ids, scored, starts, pairs, found):
    labels = [token if place in scored else -100 for place, token in enumerate(ids)]
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [labels], "document": [7], "starts": [starts]})
    assert find_answers(rows, [0, 9], pairs=pairs) == [Exchange(*tokens, 7) for tokens in found]


def test_by_the_last_number_any_way_to_it_is_right_and_the_data_s_own_may_be_long(tokenizer):
    long = " and".join(["12"] * 9)
    dataset = make_rows([("Al has 5:", f" {long} 7", 0)], tokenizer)
    for reply, right in ((" has 3 and 7", 1), (" 7 has 3", 0), (" Al", 0)):
        tokens = [*tokenizer.encode(reply), tokenizer.eos_token_id]
        options = {"verifier": "last_number", "max_new_tokens": 8}
        assert exact_matches(Parrot(tokens), tokenizer, dataset, **options)[0].tolist() == [right]
    with pytest.raises(ValueError, match="verifier must be one of exact, last_number, got 'number'"):
        exact_matches(Parrot([1]), tokenizer, dataset, verifier="number")


def test_documents_come_in_ascending_order_of_number(tokenizer):
    pairs = [("Al has 5:", " 12", 9), ("Bert has 5:", " 3", 2), ("Al has 6:", " 12", 9), ("Fay has 5:", " 12", 2)]
    reply = [*tokenizer.encode(" 12"), tokenizer.eos_token_id]
    answers, asked = exact_matches(Parrot(reply), tokenizer, make_rows(pairs, tokenizer))
    assert (answers.tolist(), asked.tolist()) == ([1, 2], [2, 2])


def test_the_models_own_generation_settings_do_not_count_and_come_back(model, tokenizer):
    dataset = make_rows(in_documents(24), tokenizer)
    plain, _ = exact_matches(model, tokenizer, dataset)
    own = model.generation_config
    try:
        model.generation_config = type(own)(repetition_penalty=50.0, do_sample=True, suppress_tokens=[1, 2, 3])
        mine = model.generation_config
        model.train()
        assert torch.equal(exact_matches(model, tokenizer, dataset)[0], plain)
        assert model.training
        assert model.generation_config is mine
    finally:
        model.generation_config = own
        model.eval()


def test_rows_without_one_prompt_and_one_completion_are_refused(model, tokenizer):
    dataset = make_rows([("Al has 5:", " 12 and 12 and", 0)], tokenizer)
    with pytest.raises(ValueError, match="row 0 of dataset must be answerable in max_new_tokens = 3, eos included"):
        exact_matches(model, tokenizer, dataset, max_new_tokens=3)
    whole = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]], "document": [0]})
    two = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]], "labels": [[-100, 2, -100, 4]], "document": [0]})
    cut = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], "document": [0]})
    for rows, message in (
        (whole, "must have a prompt that is not scored"),
        (two, "must have one completion, scored in one piece: load it without packing"),
        (cut, "must end its completion with eos: it was cut off, so raise data.sequence_le"),
        (whole.select([]), "at least one row to answer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_matches(make_llama(), tokenizer, rows)
