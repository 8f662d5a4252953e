"""The rows that load_splits makes from a source, caches and makes again, and what it reports about them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from chats import chat, chats

from mft.config import DataConfig
from mft.data import split_rows, splits
from mft.data.split_rows import pad_of, warn_of_few
from mft.data.splits import load_splits
from mft.data.tokenization import IGNORED, open_documents

pytestmark = pytest.mark.usefixtures("own_cache")


def scored_text(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_rows_have_one_length_and_pad_unscored(tokenizer, write):
    splits = load_splits(DataConfig(source=write(chats()), sequence_length=64, packing=False), tokenizer)
    for split in (splits.train, splits.validation, splits.test):
        assert split.column_names == ["input_ids", "labels", "document", "starts"]
        for row in split:
            assert len(row["input_ids"]) == len(row["labels"]) == 64
            assert re.fullmatch(r"It is \d+.<\|im_end\|>", scored_text(row, tokenizer))
    assert splits.train.with_format("torch")[:2]["input_ids"].shape == (2, 64)


def test_a_small_budget_covers_many_files(tokenizer):
    splits = load_splits(DataConfig(sequence_length=128, max_train_tokens=5120, max_eval_tokens=2560), tokenizer)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 20, 20)
    assert len(set(splits.validation["document"])) == len(set(splits.test["document"])) == 20
    assert len(set(splits.train["document"])) > 35
    assert re.search("stdlib: the library source of Python .*, split by file hash into .* files", splits.notes[0])


def test_the_evaluation_budget_of_chats_counts_no_padding(tokenizer, write):
    config = DataConfig(source=write(chats(300)), sequence_length=512, max_eval_tokens=1024)
    splits = load_splits(config, tokenizer)
    lengths = [sum(token != pad_of(tokenizer) for token in row["input_ids"]) for row in splits.validation]
    assert 1024 - 2 * max(lengths) < sum(lengths) <= 1024
    tight = dataclasses.replace(config, sequence_length=64, max_eval_tokens=64)
    assert len(load_splits(tight, tokenizer).test) >= 1


def test_the_evaluation_budget_of_problems_counts_rows_as_in_their_stored_studies(tokenizer):
    config = {"source": "problems", "subset": "finetune", "sequence_length": 96, "max_train_tokens": 96}
    splits = load_splits(DataConfig(**config, max_eval_tokens=2400), tokenizer)
    assert (len(splits.validation), len(splits.test)) == (25, 25)


def test_what_is_too_little_to_judge_a_model_by_is_warned_of(tokenizer, write):
    config = DataConfig(source=write(chats(24)), sequence_length=64)
    notes = "\n".join(load_splits(config, tokenizer).notes)
    assert re.search(r"warning: validation has \d\d scored tokens of 4 documents, too few to tell two models", notes)
    splits = load_splits(DataConfig(sequence_length=128, max_train_tokens=512, max_eval_tokens=2560), tokenizer)
    assert not [note for note in splits.notes if note.startswith("warning")]


def test_what_is_cut_or_left_out_is_said(tokenizer, write):
    rows = [*chats(200), chat("a " * 100, "late"), chat("Why?", "so " * 100), chat("only a question"), chat("b", " ")]
    splits = load_splits(DataConfig(source=write(rows), sequence_length=64), tokenizer)
    notes = "\n".join(splits.notes)
    assert "have nothing to score (empty text, or no answer) and were left out" in notes
    assert "examples are longer than sequence_length = 64 and were cut there" in notes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.source '{path}' must hold examples, got an empty train split"),
        (
            [{"query": "a", "reply": "b"}, {"texts": "x"}],
            "data must have a column messages or conversations, columns prompt and completion, instruction and output "
            "or question and answer, or a column text, got query, reply, texts: rename or convert them; did you",
        ),
        ([{"prompt": str(i)} for i in range(9)], "got prompt: prompt needs its other half"),
        ([{"text": None}, *({"text": str(i)} for i in range(9))], "{path}:1: text must be a string, got null"),
        ([*({"text": str(i)} for i in range(9)), {"txt": "a"}], "{path}:10: text must be a string, got null"),
        ([{"prompt": "a", "completion": i} for i in range(9)], "completion must be a string, got "),
        ([{"text": " " * i} for i in range(9)], "must leave rows to score in every split, got none for train: train: "),
        ([chat(str(i)) for i in range(9)], "must leave rows to score in every split, got none for train"),
        ([{"messages": "hi"}, *chats(9)], "{path}:1: messages must be a list of {{role, content}}, got 'hi' (str)"),
        (
            [{"messages": [{"from": "gpt", "value": str(i)}]} for i in range(9)],
            "messages[0] must have a role and a content, got the keys from, value",
        ),
        (
            [{"messages": [{"role": "asistant", "content": str(i)}]} for i in range(9)],
            "messages[0].role must be one of system, user, assistant, tool, got 'asistant'; did you mean assistant?",
        ),
        ([{"messages": [{"role": "user", "content": [i]}]} for i in range(9)], "].content[0] must be {{type: text, "),
        ([{"messages": [{"role": "user", "content": i}]} for i in range(9)], "]: content must be a string, got "),
        ([{"text": f"{i} \ud800"} for i in range(9)], "text must be Unicode text, got half a surrogate pair at"),
        (
            [{"messages": [{"role": "assistant", "content": str(i)}]} for i in range(9)],
            "does not at messages[0] (assistant): which tokens to score is unknown; begin with a user message",
        ),
    ],
)
def test_wrong_records_say_which_and_what(tokenizer, write, rows, message):
    path = write(rows)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        load_splits(DataConfig(source=path, sequence_length=64), tokenizer)


@pytest.mark.parametrize("several", [False, True])
def test_with_shares_of_0_all_examples_are_trained_on_and_that_is_said_once(tokenizer, write, several):
    shares = {"validation_share": 0, "test_share": 0, "sequence_length": 64, "packing": False}
    named = {"sources": {"a": {"source": write(chats())}}} if several else {"source": write(chats())}
    splits = load_splits(DataConfig(**named, **shares), tokenizer)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [40, 0, 0]
    said = [note.removeprefix("a: ") for note in splits.notes if "share" in note]
    assert said == [
        "validation: none, because data.validation_share is 0: the run has no validation loss and no best step",
        "test: none, because data.test_share is 0",
    ]
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=f"data.{split}_share must be above 0 for a loss on {split}, got 0"):
            splits.rows_of(split)


def test_a_split_of_its_own_needs_no_share(tokenizer, write, tmp_path):
    write(chats(20), "set/train.jsonl")
    write(chats(4), "set/validation.jsonl")
    config = DataConfig(source=str(tmp_path / "set"), sequence_length=64, validation_share=0, packing=False)
    splits = load_splits(config, tokenizer)
    assert [len(splits.validation), len(splits.train) + len(splits.test)] == [4, 20]


# ---------------------------------------------------------------------------------------------- the cache


def test_a_second_start_reads_the_cache_and_a_changed_file_does_not(tokenizer, write, monkeypatch):
    config = DataConfig(source=write(chats()), sequence_length=64)
    first = load_splits(config, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(split_rows, "open_documents", lambda *_, **__: pytest.fail("tokenised again"))
        second = load_splits(config, tokenizer)
    assert (first.train[:], first.notes) == (second.train[:], second.notes)
    write([chat("Other?", "Yes.")] * 5 + chats())
    assert load_splits(config, tokenizer).train[:] != first.train[:]


def test_of_processes_that_make_the_same_rows_at_once_the_first_one_s_stay(tokenizer, write, monkeypatch):
    """Four ranks that start on an empty cache each make the rows; one had lost them to another that replaced them."""
    config, write_split = DataConfig(source=write(chats()), sequence_length=64), splits._write
    others = []

    def file_of(found):
        return Path(found.train.cache_files[0]["filename"])

    def meanwhile(*arguments):
        if not others:
            others.append(None)
            other = load_splits(config, tokenizer)
            others.append((other, file_of(other).stat().st_ino))
        write_split(*arguments)

    monkeypatch.setattr(splits, "_write", meanwhile)
    ours, (other, file) = load_splits(config, tokenizer), others[1]
    assert file_of(ours).stat().st_ino == file
    assert ours.train[:] == other.train[:]


def test_data_that_change_while_they_are_read_are_refused_and_not_kept(tokenizer, write, tmp_path, monkeypatch):
    for source in (write(chats()), str(Path(write(chats(), "set/train.jsonl")).parent)):
        config = DataConfig(source=source, sequence_length=64)

        def replaced(*arguments, **options):
            for name in ("data.jsonl", "set/train.jsonl"):
                (tmp_path / "new").write_text(json.dumps(chat("Other?", "Yes.")) + "\n")
                (tmp_path / "new").replace(tmp_path / name)
            return open_documents(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(split_rows, "open_documents", replaced)
            with pytest.raises(ValueError, match="data.source must stay as it is while it is read, got files that"):
                load_splits(config, tokenizer)
        write(chats())
        write(chats(), "set/train.jsonl")
        read = load_splits(config, tokenizer)
        assert "It is 5." in "".join(scored_text(row, tokenizer) for part in (read.train, read.test) for row in part)


@pytest.mark.parametrize("damage", ["flip", "shorten", "delete", "notes", "sums"])
def test_rows_that_rotted_in_the_cache_are_made_again_and_that_is_said(tokenizer, write, caplog, damage):
    config = DataConfig(source=write(chats()), sequence_length=64)
    first = load_splits(config, tokenizer)
    expected = first.train[:], first.test[:], first.notes
    directory = Path(first.train.cache_files[0]["filename"]).parent
    del first
    path = directory / {"notes": "notes.json", "sums": "SHA256SUMS"}.get(damage, "train.arrow")
    if damage == "delete":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "shorten" else content)
    again = load_splits(config, tokenizer)
    assert (again.train[:], again.test[:], again.notes) == expected
    assert f"the rows kept in {directory} are damaged or incomplete: they are made again" in caplog.text
    caplog.clear()
    load_splits(config, tokenizer)
    assert not caplog.text


@pytest.mark.parametrize(("documents", "scored", "is_few"), [(7, 9999, True), (8, 255, True), (8, 256, False)])
def test_few_documents_are_warned_of_and_few_tokens_too(documents, scored, is_few):
    said = f"validation has {scored} scored tokens of {documents} documents"
    assert [said in line for line in warn_of_few("validation", documents, scored)] == [True] * is_few
