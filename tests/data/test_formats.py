"""Records as people have them become the same rows as the messages, or the prompt and completion, that they mean."""

import re

import pytest
from chats import MARKED_CHATML, chat, encoded

from mft.data.tokenization import IGNORED


def scored(row, tokenizer):
    ids, labels = encoded(row, tokenizer)
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORED])


def said(*turns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def test_sharegpts_conversations_are_messages(tokenizer):
    row = said(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello."), ("human", "1+1?"), ("gpt", "2"))
    assert encoded(row, tokenizer) == encoded(chat("Hi", "Hello.", "1+1?", "2", system="Be brief."), tokenizer)
    assert encoded({"conversations": chat("a", "b")["messages"]}, tokenizer) == encoded(chat("a", "b"), tokenizer)


@pytest.mark.parametrize(("extra", "asked"), [({}, "Add."), ({"input": ""}, "Add."), ({"input": "1 2"}, "Add.\n\n1 2")])
def test_alpacas_records_are_chats_where_the_tokenizer_has_a_template(tokenizer, extra, asked):
    row = {"instruction": "Add.", "output": "3", "text": "not read", **extra}
    assert encoded(row, tokenizer) == encoded(chat(asked, "3"), tokenizer)


@pytest.mark.parametrize("given", [None, "1 {2}"])
def test_alpacas_records_are_its_published_prompt_where_the_tokenizer_has_no_template(tokenizer, given, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    text, answer = scored({"instruction": "Add.", "input": given, "output": "3"}, tokenizer)
    assert answer == "3<|im_end|>"
    assert text.startswith("Below is an instruction that describes a task" + (", paired" if given else ". Write"))
    end = "### Instruction:\nAdd.\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n3<|im_end|>"
    assert text.endswith(f"completes the request.\n\n{end}")


@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize("template", [None, MARKED_CHATML])
def test_a_prompt_and_a_completion_of_messages_are_one_chat_of_which_the_completion_is_scored(
    tokenizer, template, assistant_only, monkeypatch
):
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = chat("Hi", "Hello.", "1+1?", "2", "And 3?", "No.")["messages"]
    row = {"prompt": turns[:3], "completion": turns[3:]}
    ids, labels = encoded(row, tokenizer, assistant_only)
    assert ids == encoded({"messages": turns}, tokenizer)[0]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "2<|im_end|>No.<|im_end|>"


def test_a_completion_is_not_told_from_a_prompt_that_a_template_rewrites(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    turns = chat("Hi", "Hello.", "1+1?", "2")["messages"]
    with pytest.raises(ValueError, match=r"does not at messages\[2\] \(user\): .*, give strings, or use a template"):
        encoded({"prompt": turns[:2], "completion": turns[2:]}, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "a"}, "row 0: conversations must be a list of {from, value}, got 'a' (str)"),
        ({"conversations": [{"value": "a"}]}, "conversations[0] must have a from and a value, got the keys value"),
        (said(("humam", "a")), "conversations[0].from must be one of human, user, gpt"),
        (said(("humam", "a")), "got 'humam'; did you mean human?"),
        (said(("gpt", None)), "row 0: conversations[0]: value must be a string, got null"),
        (
            {"prompt": chat("a")["messages"], "completion": "b"},
            "row 0: prompt and completion must both be strings or both lists of messages, got [",
        ),
        ({"prompt": [], "completion": [{"role": "user"}]}, "row 0: completion[0] must have a role and a content, got"),
        ({"instruction": "a", "output": None}, "row 0: output must be a string, got null"),
        ({"instruction": "a", "input": 3, "output": "b"}, "row 0: input must be a string, got 3 (int)"),
        ({"instruction": "a", "input": "b"}, "got input, instruction: instruction needs its other half"),
    ],
)
def test_a_wrong_record_says_where_and_what(tokenizer, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encoded(row, tokenizer)
