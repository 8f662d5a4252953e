"""A run on own chats: the system prompt that they share is asked with, and held-out answers are shown and counted."""

import json
import re

import pytest
from tiny_run import LEARN, invoke, succeed

from mft.masks.export_format import read_description

TEMPLATE = "{% for m in messages %}{{ m.content + ' ' }}{% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"
SYSTEM = "7 8"


@pytest.fixture
def chats(cli, tmp_path):
    """Write 40 chats that are answered with 5; return the options of a run on them."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    turns = [{"role": "system", "content": SYSTEM}, None, {"role": "assistant", "content": "5"}]
    lines = []
    for i in range(40):
        turns[1] = {"role": "user", "content": f"{10 + i} 9"}
        lines.append(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    return ["data.source=chats.jsonl", "data.sequence_length=12", "model.chat_template=template.jinja"]


@pytest.mark.parametrize("more", [(), ("data.streaming=true", "data.max_eval_tokens=64")], ids=["rows", "stream"])
def test_a_run_of_chats_asks_and_compares_as_it_was_trained(cli, chats, tmp_path, more):
    output = cli.done("train", *LEARN, *chats, *more)
    assert read_description(tmp_path / "run" / "masks").system_prompt == SYSTEM
    assert "mft generate run --held-out 3" in output

    output = succeed("generate", "run", "9", "--max-tokens", 2)
    assert f"system prompt of the run: {SYSTEM}\n" in output

    output = succeed("generate", "run", "--held-out", 3)
    assert len(set(re.findall(r"^\d of 3: 7 8 (\d\d) 9\nwanted: 5\nbase: .+\nmasked: ", output, re.MULTILINE))) == 3
    assert re.search(r"^as wanted: base \d of 3, masked \d of 3$", output, re.MULTILINE)

    output = succeed("evaluate", "--masks", "run", "--answers", 5)
    assert re.search(r"validation: 5 of \d+ answers, generated greedily", output)
    assert len(re.findall(r" \d of 5  +\d", output)) == 2
    assert "generated greedily" not in invoke("evaluate", "--masks", "run", "--answers", 0)[1]


def test_exact_answers_are_counted(cli, chats, model_dir):
    output = cli.done("finetune", *chats, "train.lr=1e-2", "train.epochs=null", "train.steps=40")
    for name, right in (("run/model", "5"), (str(model_dir), "0")):
        output = cli.done("evaluate", *chats, f"model.name={name}", "--split", "test", "--answers", "5")
        assert re.search(rf"{name} +{right} of 5 +{right}", output.replace("100.00", "5")), output


def test_texts_are_continued_from_their_half(cli):
    assert cli("train", *LEARN)[0] == 0
    output = succeed("generate", "run", "--held-out", 2)
    assert len(re.findall(r"^\d of 2: (\d+ ){5}\d+\nwanted: (\d+ ){5}\d+\nbase: ", output, re.MULTILINE)) == 2
