"""Records become tokens and labels: which tokens of texts, completions and chats are scored, and refused templates."""

import pytest
from chats import MARKED_CHATML, chat, encoded

from mft.data import tokenization
from mft.data.sources import Records
from mft.data.tokenization import IGNORED, open_documents

FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_text_ends_with_eos_and_is_scored_whole(tokenizer):
    ids, labels = encoded({"text": "def f():\n    return 1"}, tokenizer)
    assert labels == ids == [*tokenizer("def f():\n    return 1")["input_ids"], tokenizer.eos_token_id]


def test_a_long_text_is_tokenised_in_pieces_that_end_where_lines_do(tokenizer, monkeypatch):
    texts = ["", "one\ntwo " * 200, "short", "consider" * 40, " \n", *(f"{i} is a line\n" * i for i in range(9))]
    rows = [{"text": text} for text in texts]
    records = Records(rows, lambda i: f"row {i}", ["text"], range(len(rows)))

    def ids():
        documents = open_documents(records, tokenizer, assistant_only=True)
        return {i: example.ids.tolist() for i, example in documents.encoded(range(len(rows)))}

    whole = ids()
    monkeypatch.setattr(tokenization, "PIECE", 100)

    pieces = ids()
    cut = pieces.pop(3)
    assert whole.pop(3) != cut  # a single word, which the cuts divide
    assert tokenizer.decode(cut[:-1]) == texts[3]
    assert pieces == whole


@pytest.mark.parametrize("row", [chat("?", "a" * 2**22), {"prompt": "?" * 2**22, "completion": "a"}])
def test_an_example_that_cannot_be_tokenised_in_pieces_has_a_longest_length(tokenizer, row):
    with pytest.raises(
        ValueError, match="row 0: an example must have at most 4194304 characters, got 4194305: leave it"
    ):
        encoded(row, tokenizer)


def test_only_the_completion_and_its_eos_are_scored(tokenizer):
    ids, labels = encoded({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer)
    assert tokenizer.decode(ids) == "2 + 2 = 4<|im_end|>"
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == " 4<|im_end|>"


def test_a_completion_that_would_melt_into_the_prompt_is_tokenised_apart(tokenizer):
    ids, _ = encoded({"prompt": "retu", "completion": "rn"}, tokenizer)
    assert tokenizer("return")["input_ids"] != ids[:-1] == tokenizer("retu")["input_ids"] + tokenizer("rn")["input_ids"]


@pytest.mark.parametrize("template", [None, MARKED_CHATML])
def test_only_assistant_turns_with_their_end_tokens_are_scored(tokenizer, template, monkeypatch):
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    row = chat("Hi", "Hello.\n", "1+1?", "\n2", system="Be brief.")
    ids, labels = encoded(row, tokenizer)
    assert ids == tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "Hello.\n<|im_end|>\n2<|im_end|>"


def test_every_token_of_a_chat_is_scored_on_request(tokenizer):
    ids, labels = encoded(chat("Hi", "Hello."), tokenizer, assistant_only=False)
    assert labels == ids


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    with pytest.raises(ValueError, match=r"row 0: the chat template .* does not at messages\[1\] .* {% generation %}"):
        encoded(chat("a", "b", "c", "d"), tokenizer)


@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for m in %}", "TemplateSyntaxError: "),
        ("{{ 'a' + 1 }}", "TypeError: "),
        ("{{ range(10**9)|length }}", "OverflowError: Range too big"),
        ("{% generation %}{{ messages[9].content }}{% endgeneration %}", "UndefinedError: "),
    ],
)
def test_a_template_that_stops_is_one_error(tokenizer, template, message, assistant_only, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    said = rf"row 0: the chat template of this tokenizer must .* {message}.*, or set model.chat_template \(tulu"
    with pytest.raises(ValueError, match=said):
        encoded(chat("a", "b"), tokenizer, assistant_only=assistant_only)


def test_a_tokenizer_without_a_template_takes_no_messages(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template, got one without"):
        encoded(chat("a", "b"), tokenizer)
