"""Preference pairs: how records are read, packed and shown, and what is refused."""

import pytest
from chats import MARKED_CHATML

from mft.config import DataConfig
from mft.data.formats import Chat, Completion, read_pair
from mft.data.splits import load_splits

PROMPT = [{"role": "user", "content": "2 + 2?"}]
RIGHT, WRONG = ([{"role": "assistant", "content": answer}] for answer in ("It is 4.", "It is 5."))


def pairs(count=40):
    return [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i} or so"} for i in range(count)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": PROMPT, "chosen": RIGHT, "rejected": WRONG},
        {"chosen": PROMPT + RIGHT, "rejected": PROMPT + WRONG},
        {"prompt": "of ultrachat", "chosen": PROMPT + RIGHT, "rejected": PROMPT + WRONG},
    ],
    ids=["explicit", "implicit", "a remark"],
)
def test_lists_of_messages_are_two_chats_of_which_the_answers_are_scored(record):
    assert read_pair(record, "row 0") == (Chat(PROMPT + RIGHT, first=1), Chat(PROMPT + WRONG, first=1))


def test_strings_are_two_completions_of_the_prompt_or_of_what_both_begin_with():
    expected = Completion("2 + 2? It is", " 4."), Completion("2 + 2? It is", " 5.")
    assert read_pair({"prompt": "2 + 2? It is", "chosen": " 4.", "rejected": " 5."}, "row 0") == expected
    assert read_pair({"chosen": "2 + 2? It is 4.", "rejected": "2 + 2? It is 5."}, "row 0") == expected
    one, other = read_pair({"chosen": "It is", "rejected": "It is 5"}, "row 0")  # each must keep an answer
    assert (one, other) == (Completion("It i", "s"), Completion("It i", "s 5"))


def test_an_implicit_prompt_is_what_trl_finds():
    from trl.data_utils import extract_prompt

    for record in (
        {"chosen": "2 + 2? It is 4.", "rejected": "2 + 2? It is 5."},
        {"chosen": "a b c", "rejected": "a b d"},
        {"chosen": "yes", "rejected": "no"},
        {"chosen": PROMPT + RIGHT, "rejected": PROMPT + WRONG},
    ):
        ours, theirs = read_pair(record, "row 0"), extract_prompt(record)
        for example, name in zip(ours, ("chosen", "rejected")):
            if isinstance(example, Chat):
                assert example.messages == theirs["prompt"] + theirs[name]
                assert example.first == len(theirs["prompt"])
            else:
                assert (example.prompt, example.completion) == (theirs["prompt"], theirs[name])


@pytest.mark.parametrize("packing", [True, False])
def test_a_rows_examples_are_chosen_and_rejected_in_turn(own_cache, write, tokenizer, packing):
    config = DataConfig(write(pairs()), sequence_length=64, packing=packing)
    splits = load_splits(config, tokenizer, pairs=True)
    most = 0
    for split in (splits.train, splits.validation):
        for row in split:
            starts = [*row["starts"], 64]
            most = max(most, len(row["starts"]))
            for i in range(0, len(row["starts"]), 2):
                ends = zip(starts[i : i + 2], starts[i + 1 : i + 3])
                texts = [tokenizer.decode(row["input_ids"][start:end]) for start, end in ends]
                number = int(texts[0].split()[0])
                assert texts[0].startswith(f"{number} + 1 = {number + 1}<|im_end|>")
                assert texts[1].startswith(f"{number} + 1 = {number} or so<|im_end|>")
                scored = [t for t, label in zip(row["input_ids"], row["labels"]) if label != -100]
                assert tokenizer.decode(scored).count("<|im_end|>") == len(row["starts"])
                assert "+" not in tokenizer.decode(scored)
    assert most > 2 if packing else most == 2


def test_chats_are_pairs_too_and_long_ones_are_left_out_and_counted(own_cache, write, tokenizer):
    def record(i, times):
        asked, wrong = {"role": "user", "content": f"{i}?"}, {**WRONG[0], "content": "5 " * times}
        return {"prompt": [asked], "chosen": RIGHT, "rejected": [wrong]}

    records = [record(i, times) for i in range(30) for times in (1, 90)]
    tokenizer.chat_template, before = MARKED_CHATML, tokenizer.chat_template
    try:
        splits = load_splits(DataConfig(write(records), sequence_length=80), tokenizer, pairs=True)
    finally:
        tokenizer.chat_template = before
    assert any("pairs are longer than sequence_length = 80" in note for note in splits.notes)
    row = splits.validation[0]
    scored = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert tokenizer.decode(scored) == "It is 4.<|im_end|>5 <|im_end|>"
    assert len(row["starts"]) == 2


def test_pairs_beside_messages_are_pairs_where_they_are_asked_for(own_cache, write, tokenizer):
    """HuggingFaceH4/ultrafeedback_binarized has such rows."""
    rows = [{**row, "messages": [*PROMPT, {"role": "assistant", "content": f"{i}"}]} for i, row in enumerate(pairs())]
    config = DataConfig(write(rows), sequence_length=64)
    assert len(load_splits(config, tokenizer, pairs=True).validation[0]["starts"]) == 2
    assert load_splits(config, tokenizer).validation[0]["starts"] == [0]
