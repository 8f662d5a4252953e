"""Records in users' formats become the same rows as the messages, or the prompt and completion, that they stand for."""

import json
import re

import datasets
import pytest
from chats import MARKED_CHATML, chat, encoded

from mft.data.sources import Records
from mft.data.tokenization import IGNORED, open_documents

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def test_a_question_with_its_answer_is_an_instruction_with_its_output(tokenizer, monkeypatch):
    row, alike = {"question": "Add.", "answer": "3"}, {"instruction": "Add.", "output": "3"}
    assert encoded(row, tokenizer) == encoded(alike, tokenizer) == encoded(chat("Add.", "3"), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert encoded(row, tokenizer) == encoded(alike, tokenizer)


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


def test_parts_of_text_are_one_content(tokenizer):
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}]
    assert encoded(chat(parts, "c"), tokenizer) == encoded(chat("a\nb", "c"), tokenizer)


def called(name, **arguments):
    turns = chat("What is it?", "", "20", "It is 20.")["messages"]
    turns[1] = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    turns[2]["role"] = "tool"
    return {"messages": turns, "tools": [{"function": {"name": name, "parameters": {key: {} for key in arguments}}}]}


def test_tools_and_their_calls_reach_the_template_as_they_are(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    row = called("weather", city="Rome", day=None)
    text, answers = scored(row, tokenizer)
    assert text.startswith('<|im_start|>system\n[{"function": {"name": "weather", "parameters": {"city": {}, "day"')
    call = '{"function": {"name": "weather", "arguments": {"city": "Rome", "day": null}}}'
    assert answers == f"{call}<|im_end|>It is 20.<|im_end|>"
    assert scored({**row, "tools": json.dumps(row["tools"])}, tokenizer) == (text, answers)
    alone = {"messages": row["messages"][:2], "tools": []}
    assert scored(alone, tokenizer)[1] == f"{call}<|im_end|>"


def test_calls_of_other_arguments_in_a_column_of_arrow_stay_apart(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    rows = [called("weather", city="Rome"), called("time", zone="CET", short=True)]
    table = datasets.Dataset.from_list(rows)
    assert set(table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"city", "zone", "short"}
    examples = [
        list(open_documents(records, tokenizer, assistant_only=True).encoded([0, 1]))
        for records in (Records(given, str, ["messages", "tools"], [0, 1]) for given in (rows, table))
    ]
    assert [example.ids.tolist() for _, example in examples[0]] == [example.ids.tolist() for _, example in examples[1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "a"}, "row 0: conversations must be a list of {from, value}, got 'a' (str)"),
        ({"conversations": [{"value": "a"}]}, "conversations[0] must have a from and a value, got the keys value"),
        (said(("gpt", None)), "row 0: conversations[0]: value must be a string, got null"),
        ({"prompt": [], "completion": [{"role": "user"}]}, "row 0: completion[0] must have a role and a content, got"),
        (called("a", b="\ud800"), "row 0: messages[1]: tool_calls must be Unicode text, got half a surrogate pair at"),
        (called("a", b="a" * 2**22), "row 0: an example must have at most 4194304 characters, got"),
        (
            called("a"),
            "row 0: the chat template of this tokenizer must render tool_calls where a message has no content",
        ),
        ({"instruction": "a", "output": None}, "row 0: output must be a string, got null"),
        ({"instruction": "a", "input": 3, "output": "b"}, "row 0: input must be a string, got 3 (int)"),
        ({"question": "a", "answer": None}, "row 0: answer must be a string, got null"),
    ],
)
def test_a_wrong_record_says_where_and_what(tokenizer, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encoded(row, tokenizer)
