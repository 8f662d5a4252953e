"""mft data show: rows as the model will see them, using only the tokenizer."""

import json
import re

import pytest

from mft.cli.data import describe_row


@pytest.fixture
def show(cli, tokenizer, smollm2_dir, tmp_path, monkeypatch):
    """Return a function from rows to the output of mft data show; loading weights fails."""
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the base is loaded"))

    def show(rows, *arguments):
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = cli.done("data", "show", f"model.name={smollm2_dir}", "data.source=own.jsonl", *arguments)
        return output

    return show


def test_what_is_scored_stands_in_brackets_and_padding_is_counted(show):
    rows = [{"prompt": f"Q: 1 + {i}?\n", "completion": "It is 2\x1b[1m"} for i in range(3)]
    output = show(rows, "data.sequence_length=32", "--rows=1", "--split=test")
    assert "test row 0 of 1: 18 tokens, 9 of them scored, and 14 of padding" in output
    assert re.search(r"\nQ·:· ·1· \+· ·\d·\?·⏎\n⟦It· is· ·2·\\x1b·\[·1·m·<\|im_end\|>⟧\n\n", output)
    assert "row 1" not in output


def test_each_example_of_a_packed_row_begins_with_a_mark(show):
    rows = [{"prompt": f"{i}+0=", "completion": f"{i}"} for i in range(9)]
    output = show(rows, "data.sequence_length=13")
    assert "row 0 of " in output
    assert ": 2 examples, 12 tokens, 4 of them scored, and 1 of padding" in output
    assert re.search(r"\n▶ \d·\+·0·=⟦\d·<\|im_end\|>⟧\n▶ \d·\+·0·=⟦", output)


def test_a_character_of_several_tokens_is_one_piece(tokenizer):
    ids = tokenizer("x 🦜 é")["input_ids"]
    row = {"input_ids": [*ids, 2, 2], "labels": [*ids, -100, -100], "starts": [0]}
    heading, text = describe_row(row, tokenizer, 2)
    assert len(ids) > 4
    assert heading == f"{len(ids)} tokens, {len(ids) - 1} of them scored, and 2 of padding"
    assert text.plain.replace("·", "") == "x⟦ 🦜 é⟧"


FORMS = {
    "messages": {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]},
    "conversations": {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B"}]},
    "lists": {"prompt": [{"role": "user", "content": "A?"}], "completion": [{"role": "assistant", "content": "B"}]},
    "alpaca": {"instruction": "A?", "output": "B"},
    "completion": {"prompt": "A?", "completion": "B"},
    "text": {"text": "A?B"},
}


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_each_row_of_a_mix_names_its_source_and_is_what_the_template_makes_of_its_form(show, streaming, tmp_path):
    sources = []
    for name, row in FORMS.items():
        lines = [json.dumps(row).replace("A?", f"A{i}?") + "\n" for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        sources.append(f"data.sources.{name}.source={name}.jsonl")
    more = ["data.sequence_length=32", "data.max_eval_tokens=192", "model.chat_template=tulu", "data.packing=false"]
    output = show([], "data.source=stdlib", *sources, *more, f"data.streaming={streaming}", "--rows=6")
    output = output.replace("·", "")
    assert ("train row 5 of a stream" in output) == (streaming == "true")
    for name in FORMS:
        row = re.search(rf"train row \d of .* from {name}: (.*)\n((?:.+\n)+)", output)
        if name in ("completion", "text"):
            assert re.fullmatch(
                r"A\d\?⟦B<\|im_end\|>⟧\n" if name == "completion" else r"A⟦\d\?B<\|im_end\|>⟧\n", row[2]
            )
        else:
            assert re.fullmatch(r"<\|user\|>⏎\nA\d\?⏎\n<\|assistant\|>⏎\n⟦B<\|im_end\|>⟧\n", row[2])


def test_a_wrong_split_is_told(cli):
    output = cli.refused("data", "show", "--split", "tests")
    assert "--split must be one of train, validation, test, got 'tests'; did you mean test?" in output
