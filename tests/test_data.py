"""Facts about mft.data and what it stands on (corpus, records, examples, rows): splits, labels, packing, errors."""

import itertools
import json
import random
import re
import time

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft import data, hub
from mft.config import DataConfig
from mft.corpus import EXCLUDED_DIRECTORIES, stdlib_files
from mft.data import load_splits
from mft.examples import IGNORED, Documents, Encoded, open_documents
from mft.header_corpus import header_files
from mft.records import Records, open_source
from mft.rows import build_rows

MARKED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, request):
    """No test reads the rows that another run left; the model's cache stays as it is."""
    if "tokenizer" in request.fixturenames:
        request.getfixturevalue("tokenizer")
    monkeypatch.setenv("MFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines and give the file's name."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def chats(count=40):
    return [chat(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(count)]


def scored_text(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def encoded(row, tokenizer, assistant_only=True):
    """The one row of a source as (ids, labels)."""
    records = Records([row], lambda i: f"row {i}", sorted(row), [0])
    documents = open_documents(records, tokenizer, assistant_only=assistant_only)
    ((_, example),) = documents.encoded([0])
    return example.ids.tolist(), example.labels.tolist()


# The standard library's corpus


def test_the_stdlib_splits_are_disjoint_large_enough_and_the_same_again(tokenizer):
    first, second = open_source(DataConfig()), open_source(DataConfig(seed=5))
    files = {split: set(records.numbers) for split, records in first.load().items()}
    assert {split: set(records.numbers) for split, records in second.load().items()} == files
    assert first.fingerprint == second.fingerprint
    assert not files["train"] & (files["validation"] | files["test"])
    assert not files["validation"] & files["test"]
    assert min(len(files["validation"]), len(files["test"])) >= 20
    assert 0.7 < len(files["train"]) / sum(map(len, files.values())) < 0.9


def test_the_stdlib_corpus_leaves_out_tests_packages_and_generated_tables():
    paths = stdlib_files()
    assert {"argparse.py", "json/decoder.py"} <= paths.keys()
    assert not [path for path in paths if EXCLUDED_DIRECTORIES & set(path.split("/")[:-1])]


def test_the_headers_splits_are_disjoint_and_hold_no_near_duplicates():
    splits = open_source(DataConfig(source="headers")).load()
    texts = [{row["text"] for row in splits[split].rows} for split in ("train", "validation", "test")]
    assert not any(one & other for one, other in itertools.combinations(texts, 2))
    assert min(map(len, texts)) >= 100
    paths = header_files()
    assert {"c10/core/Device.h", "torch/csrc/Export.h"} <= paths.keys()
    assert not [path for path in paths if "/ops/" in path or "/vec/" in path]


def test_a_torch_without_its_headers_is_refused(monkeypatch):
    monkeypatch.setattr("mft.records.header_files", dict)
    with pytest.raises(ValueError, match="'headers' must give at least 20 files a split, got 0 in all: install a"):
        open_source(DataConfig(source="headers"))


def test_a_small_budget_covers_many_files(tokenizer):
    splits = load_splits(DataConfig(sequence_length=128, max_train_tokens=5120, max_eval_tokens=2560), tokenizer)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 20, 20)
    assert len(set(splits.validation["document"])) == len(set(splits.test["document"])) == 20
    assert len(set(splits.train["document"])) > 35
    assert re.search("stdlib: the library source of Python .*, split by file hash into .* files", splits.notes[0])


def test_evaluation_rows_are_the_same_for_every_seed(tokenizer):
    config = {"sequence_length": 128, "max_train_tokens": 1280, "max_eval_tokens": 1280}
    one, two = (load_splits(DataConfig(seed=seed, **config), tokenizer) for seed in (0, 1))
    assert one.validation["input_ids"] == two.validation["input_ids"]
    assert one.train["input_ids"] != two.train["input_ids"]


def test_an_interpreter_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr("mft.records.stdlib_files", lambda: {f"{i}.py": f"# {i}" for i in range(30)})
    with pytest.raises(ValueError, match="data.source 'stdlib' must give at least 20 files a split, got"):
        open_source(DataConfig())


# Rows: packing, budgets


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


# Records become tokens


def test_text_ends_with_eos_and_is_scored_whole(tokenizer):
    ids, labels = encoded({"text": "def f():\n    return 1"}, tokenizer)
    assert labels == ids == [*tokenizer("def f():\n    return 1")["input_ids"], tokenizer.eos_token_id]


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


def test_a_tokenizer_without_a_template_takes_no_messages(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template, got one without"):
        encoded(chat("a", "b"), tokenizer)


# Files


def test_rows_have_one_length_and_pad_unscored(tokenizer, write):
    splits = load_splits(DataConfig(source=write(chats()), sequence_length=64, packing=False), tokenizer)
    for split in (splits.train, splits.validation, splits.test):
        assert split.column_names == ["input_ids", "labels", "document"]
        for row in split:
            assert len(row["input_ids"]) == len(row["labels"]) == 64
            assert re.fullmatch(r"It is \d+.<\|im_end\|>", scored_text(row, tokenizer))
    assert splits.train.with_format("torch")[:2]["input_ids"].shape == (2, 64)


def test_a_missing_split_is_split_off_by_content_and_said(tokenizer, write):
    rows = chats(100)
    splits = load_splits(DataConfig(source=write(rows), sequence_length=64, packing=False), tokenizer)
    sizes = [len(split) for split in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) == 100
    assert min(sizes) >= 3
    assert "no validation and no test split given, so about a tenth of train was split off for each" in splits.notes[0]
    shuffled = load_splits(DataConfig(source=write(rows[::-1]), sequence_length=64, packing=False), tokenizer)
    assert sorted(splits.test["input_ids"]) == sorted(shuffled.test["input_ids"])


def test_equal_examples_fall_into_the_same_split(tokenizer, write):
    rows = [{**row, "id": copy} for row in chats(30) for copy in range(3)]
    splits = load_splits(DataConfig(source=write(rows), sequence_length=64, packing=False), tokenizer)
    held_out = {str(row["input_ids"]) for split in (splits.validation, splits.test) for row in split}
    assert held_out
    assert not held_out & {str(row["input_ids"]) for row in splits.train}


def test_three_examples_are_enough_for_three_splits(tokenizer, write):
    splits = load_splits(DataConfig(source=write(chats(3)), sequence_length=64), tokenizer)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [1, 1, 1]


def test_parquet_gives_the_rows_of_the_same_jsonl(tokenizer, write, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats()), tmp_path / "data.parquet")
    one, two = (
        load_splits(DataConfig(source=source, sequence_length=64), tokenizer)
        for source in (write(chats()), str(tmp_path / "data.parquet"))
    )
    assert (one.train[:], one.test[:]) == (two.train[:], two.test[:])


def test_a_directory_gives_its_own_splits(tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    write(chats(20), "set/train.jsonl")
    write(chats(3), "set/test.jsonl")
    write(chats(4), "set/validation.jsonl")
    config = {"source": str(tmp_path / "set"), "sequence_length": 64, "packing": False}
    splits = load_splits(DataConfig(**config), tokenizer)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [20, 4, 3]
    splits = load_splits(DataConfig(**config, split="train[:50%]", validation_split="test"), tokenizer)
    assert [len(splits.validation), len(splits.train) + len(splits.test)] == [3, 10]
    with pytest.raises(ValueError, match=r"data.split must be one of train, .*, got 'trian'; did you mean train\?"):
        load_splits(DataConfig(**config, split="trian"), tokenizer)


def test_a_second_start_reads_the_cache_and_a_changed_file_does_not(tokenizer, write, monkeypatch):
    config = DataConfig(source=write(chats()), sequence_length=64)
    first = load_splits(config, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(data, "open_documents", lambda *_, **__: pytest.fail("tokenised again"))
        second = load_splits(config, tokenizer)
    assert (first.train[:], first.notes) == (second.train[:], second.notes)
    write([chat("Other?", "Yes.")] * 5 + chats())
    assert load_splits(config, tokenizer).train[:] != first.train[:]


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
        ([{"text": "same"}] * 9, "must have more than 2 different examples to split off validation and test, got 1"),
        (
            [{"instruction": "a", "output": "b"}, {"texts": "x"}],
            "data must have a column messages, columns prompt and "
            "completion, or a column text, got instruction, output, texts: rename or convert them; did you mean text?",
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
        ([{"messages": [{"role": "user", "content": [i]}]} for i in range(9)], "]: content must be a string, got ["),
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": \n',
            "a.jsonl:3: broken JSON, must be one object a line: Expecting value",
        ),
        ("a.jsonl", b'[{"text": "a"}]', "a.jsonl:1: must be a JSON object, got a list"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl:1: broken JSON"),
        ("a.parquet", b"PAR1", "a.parquet must be a parquet file, and cannot be read as one"),
        ("a.csv", b"text", "data.source must be a .jsonl or .parquet file if it is a file, got "),
        ("b/a.txt", b"text", "data.source must be a directory with .jsonl or .parquet files, got "),
        ("b/train.jsonl", b'{"text": \n', "cannot be loaded: JSON parse error"),
        ("c/train.jsonl", b"", "cannot be loaded: a file of it is empty"),
    ],
)
def test_wrong_files_say_where_and_what(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=re.escape(message)):
        load_splits(DataConfig(source=str(source)), tokenizer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "stdlb"}, "data.source 'stdlb' is neither stdlib, headers, problems, nor a file or directory here"),
        (
            {"source": "stdlb"},
            "the hub cannot be reached: check the name and the network, or give a local file; did you mean stdlib?",
        ),
        ({"source": "someone/some-data"}, "the hub cannot be reached"),
        ({"source": "./nowhere.jsonl"}, "data.source must be data that exists, got './nowhere.jsonl': no such file"),
        (
            {"source": "no data"},
            "must be stdlib, headers, problems, a .jsonl or .parquet file, a directory or a hub id, got 'no data'",
        ),
        ({"split": "test"}, "data.split must be left out for this source, got 'test': the stdlib corpus is split by"),
        ({"subset": "main"}, "data.subset must be pretrain, finetune or null for the stdlib corpus, got 'main'"),
    ],
)
def test_a_wrong_source_says_what_it_is_and_what_to_do(tokenizer, config, message, monkeypatch):
    hub.hub_is_reachable.cache_clear()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_splits(DataConfig(**config), tokenizer)
    hub.hub_is_reachable.cache_clear()
    assert time.monotonic() - start < 10


def test_a_file_of_one_split_takes_no_split_names(tokenizer, write):
    with pytest.raises(ValueError, match="data.validation_split must be left out for this source, got 'dev'"):
        load_splits(DataConfig(source=write(chats()), validation_split="dev"), tokenizer)
