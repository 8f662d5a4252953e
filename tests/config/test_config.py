"""mft.config: what a YAML file and overrides may contain, and the error for each mistake."""

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft.config import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig, parse_layers
from mft.config_file import load_config, save_config
from mft_study.load import load_study


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_without_a_file_the_defaults_hold():
    assert load_config(None) == RunConfig(train=TrainConfig(epochs=1.0, moments="auto"))
    assert RunConfig().mask == MaskConfig(scores_dtype="auto")


def test_a_file_fills_the_sections_and_overrides_come_last(write):
    path = write("model: {dtype: float32}\ntrain: {lr: 3e-4, steps: 1e2, betas: [0.9, 0.95]}\nmask:\noutput_dir: out\n")
    config = load_config(path, ["train.lr=1e-3", "train.lr=2e-3", "mask.target_modules=[q_proj, v_proj]"])
    assert config.train == TrainConfig(lr=2e-3, steps=100, betas=(0.9, 0.95), moments="auto")
    assert config.mask.target_modules == ["q_proj", "v_proj"]
    assert (config.model.dtype, config.output_dir) == ("float32", "out")


def test_sources_are_named_in_a_file_and_by_overrides(write, tmp_path):
    path = write("data: {sources: {chats: {source: ~/c.jsonl, weight: 3}, code: {source: stdlib}}}\n")
    data = load_config(path, ["data.sources.code.weight=0.5", "data.sources.more.source=b"]).data
    assert [(name, given.weight) for name, given in data.sources.items()] == [("chats", 3), ("code", 0.5), ("more", 1)]
    assert data.source_config("chats") == DataConfig(source=data.sources["chats"].source)
    assert not data.sources["chats"].source.startswith("~")
    config = RunConfig(data=data)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "0.0003", "3.0e-4", ".0003", "300e-6"])
def test_every_spelling_of_a_number_is_a_number(write, number):
    assert load_config(write(f"train: {{steps: 1, lr: {number}}}")).train.lr == pytest.approx(3e-4)
    assert load_config(None, ["train.steps=1", f"train.lr={number}"]).train.lr == pytest.approx(3e-4)


def test_a_tilde_is_the_home_directory_in_every_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        write('model: {name: ~/base, chat_template: ~/chat.jinja}\ndata: {source: ~/rows}\noutput_dir: "~/run"\n')
    )
    assert (config.model.name, config.model.chat_template) == ("/home/me/base", "/home/me/chat.jinja")
    assert (config.data.source, config.output_dir) == ("/home/me/rows", "/home/me/run")
    assert load_config(None, ["output_dir=~/x", "model.name=a~b"]).output_dir == "/home/me/x"
    assert ModelConfig("a~/b").name == "a~/b"
    assert load_study("small", ["output_dir=~/x"]).output_dir == "/home/me/x"


def test_words_and_dates_stay_strings(write):
    data = load_config(write("data: {subset: 2024-01-01, validation_split: no, split: 1:30}")).data
    assert (data.subset, data.validation_split, data.split) == ("2024-01-01", "no", "1:30")


@pytest.mark.parametrize(("text", "layers"), [("0-3,7", [0, 1, 2, 3, 7]), ("4", [4]), ("7, 2 - 3, 3", [2, 3, 7])])
def test_layers_may_be_ranges(text, layers):
    assert parse_layers(text) == layers
    assert MaskConfig(layers_to_transform=text).layers_to_transform == layers
    assert load_config(None, [f'mask.layers_to_transform="{text}"']).mask.layers_to_transform == layers


def test_a_saved_config_loads_equal(tmp_path):
    config = RunConfig(
        ModelConfig(name="./my model", revision="1e5", attn_implementation="null"),
        DataConfig(source="é: # x", subset="0755", validation_split="true", max_train_tokens=4096),
        MaskConfig(target_modules=["a", "b"], layers_to_transform=[3, 1], threshold=1e-7),
        TrainConfig(lr=2e-5, steps=3, max_grad_norm=1.0),
        "runs/123",
        "resident",
    )
    save_config(config, tmp_path / "new" / "run.yaml")
    assert load_config(tmp_path / "new" / "run.yaml") == config


@settings(deadline=None, max_examples=30)  # a busy machine is no failure
@given(
    st.builds(TrainConfig, lr=st.floats(1e-12, 1e12), steps=st.integers(1, 2**62), weight_decay=st.floats(0, 1e9)),
    st.builds(DataConfig, source=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)),
)
def test_any_config_survives_the_round_trip(tmp_path_factory, train, data):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    config = RunConfig(train=train, data=data)
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: config must hold keys such as train:, got an empty file"),
        ("- a\n", "run.yaml: config must be a mapping of keys such as train:, got ['a'] (list)"),
        ("train:\n  lr: [1\n", "run.yaml:3:1: broken YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("train:\n\tlr: 1\n", "run.yaml:2:1: broken YAML: while scanning for the next token, found character '\\t'"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2:1: broken YAML: expected a single document"),
        ("a: !!python/object:os.system {}", "run.yaml:1:4: broken YAML: could not determine a constructor for the tag"),
        ("? {a: b}\n: 3\n", "run.yaml:1:3: broken YAML: while constructing a mapping, found unhashable key"),
        ("[" * 9000, "run.yaml: broken YAML: maximum recursion depth"),
        ("trian: {}", "run.yaml: unknown key 'trian'; did you mean train?"),
        ("lr: 1", "run.yaml: unknown key 'lr'; did you mean train.lr?"),
        ("data: {keep_ratio: 1}", "run.yaml: unknown key 'data.keep_ratio'; did you mean mask.keep_ratio?"),
        ("train: {learning_rate: 1}", "run.yaml: unknown key 'train.learning_rate'; did you mean train.lr?"),
        ("1: 1", "run.yaml: unknown key '1'; known here: model"),
        ("train: 3", "run.yaml: train must be a mapping of keys, got 3 (int)"),
        ("model: {name: 7}", "run.yaml: model.name must be a string, got 7 (int); quote it"),
        ("train: {steps: 1.5}", "run.yaml: train.steps must be an int or null, got 1.5 (float)"),
        ("train: {steps: 1, lr: .nan}", "run.yaml: train.lr must be a finite number, got nan"),
        ("train: {steps: 1, betas: [0.9]}", "run.yaml: train.betas must be a list of 2 numbers, got [0.9] (list)"),
        ("data: {packing: yes}", "run.yaml: data.packing must be true or false, got 'yes' (str)"),
        ("mask: {target_modules: [1]}", "mask.target_modules must be a string or a list of str or null, got [1]"),
        ("train: {steps: 1, epochs: 2}", "train.steps or epochs must be given (exactly one of them), got steps=1"),
    ],
)
def test_a_wrong_file_says_where_and_what(write, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(write(text))


@pytest.mark.parametrize("text", [None, "train: {lr: 1e-3}", "train: {lr: 1e-3, epochs: 1}"])
def test_a_run_is_one_epoch_long_unless_the_file_or_an_override_says_how_long(write, text):
    path = None if text is None else write(text)
    assert load_config(path, ["train.lr=1e-3"]).train == TrainConfig(lr=1e-3, epochs=1, moments="auto")
    assert load_config(path, ["train.steps=5", "train.epochs=null"]).train.steps == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chats.jsonl", "train.lr=3e-4, got 'chats.jsonl': give data as data.source=chats.jsonl"),
        ("my.yaml", "train.lr=3e-4, got 'my.yaml': give a configuration as --config my.yaml"),
        (".", "train.lr=3e-4, got '.': give a directory as data.source=. or model.name=."),
        ("data.path=x", "unknown key 'data.path'; did you mean data.source?"),
        ("data.max_length=9", "unknown key 'data.max_length'; did you mean data.sequence_length?"),
        ("train.bf16=true", "unknown key 'train.bf16'; did you mean model.dtype?"),
        ("model.load_in_4bit=true", "unknown key 'model.load_in_4bit'; did you mean model.quantization?"),
        ("train={lr: 1}", "an override must name one key, got the section 'train': its keys are train.lr, train.steps"),
        ("train.stpes=1", "override 'train.stpes=1': unknown key 'train.stpes'; did you mean train.steps?"),
        ("train.steps=-1", "train.steps must be positive (or null), got -1 (with the overrides train.steps=-1)"),
        ("output_dir=", "output_dir must be a string, got null"),
        ("data.sources.a.weight=2", "data.sources.a.source must be given, got none"),
        ("data.sources.a.wight=2", "data.sources.a: unknown key 'wight'; did you mean weight?"),
        ("data.sources={a: {source: x, weight: 0}}", "data.sources.a.weight must be positive, got 0.0"),
        ("data.sources={a: x}", "data.sources.a must be a mapping of keys such as source:, got 'x' (str)"),
        ("data.sources=[a]", "data.sources must be a mapping of names to SourceConfig or null, got ['a'] (list)"),
        ("data.sources={}", "data.sources must hold at least one name, got {}"),
        ("data.sources.a b.source=x", "data.sources must have names of letters, digits, - and _, got 'a b' (str)"),
        ("data.dataset_mixer=1", "unknown key 'data.dataset_mixer'; did you mean data.sources?"),
    ],
)
def test_a_wrong_override_says_which_and_what(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (MaskConfig, {"keep_ratio": 90}, "keep_ratio must lie in [0, 1], got 90.0"),
        (MaskConfig, {"mode": "magnitud"}, "mode must be one of auto, magnitude, value, got 'magnitud'; did you mean"),
        (MaskConfig, {"target_modules": []}, "target_modules must not be empty, got []"),
        (MaskConfig, {"layers_to_transform": [0, -1]}, "layers_to_transform must count layers from 0, got [0, -1]"),
        (MaskConfig, {"layers_to_transform": "0-x"}, "layers_to_transform must be an int, a list of ints or ranges"),
        (MaskConfig, {"layers_to_transform": True}, "layers_to_transform must be an int or a list of int or null"),
        (ModelConfig, {"dtype": "bf16"}, "dtype must be one of bfloat16, float32, float16, got 'bf16'; did you mean"),
        (ModelConfig, {"quantization": "nf"}, "quantization must be one of nf4, nf4-dq, int8, got 'nf'; did you mean"),
        (ModelConfig, {"quantize_masked": True}, "quantize_masked must be false if quantization is null"),
        (ModelConfig, {"name": ""}, "name must not be empty, got ''"),
        (DataConfig, {"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        (DataConfig, {"max_eval_tokens": 9}, "max_eval_tokens must be at least one row of sequence_length = 512"),
        (DataConfig, {"seed": -1}, "seed must lie in [0, 2**63), got -1"),
        (DataConfig, {"sources": {"a": {"source": "x"}}, "split": "dev"}, "split must be left out with sources"),
        (DataConfig, {"stopping_strategy": "all"}, "must be one of first_exhausted, all_exhausted, got 'all'"),
        (DataConfig, {"streaming": True, "max_train_tokens": 512}, "max_train_tokens must be null with streaming"),
        (DataConfig, {"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        (TrainConfig, {"steps": 0}, "steps must be positive (or null), got 0"),
        (TrainConfig, {"steps": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        (TrainConfig, {"steps": 1, "warmup_ratio": 2}, "warmup_ratio must lie in [0, 1], got 2.0"),
        (TrainConfig, {"steps": 1, "max_grad_norm": 0}, "max_grad_norm must be positive (or null), got 0.0"),
        (TrainConfig, {"steps": 1, "betas": (0.9, 1.0)}, "betas must lie in [0, 1), got (0.9, 1.0)"),
    ],
)
def test_a_value_out_of_range_names_the_rule_and_the_value(section, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        section(**values)


def test_a_missing_file_names_its_nearest_neighbour(write):
    path = write("output_dir: a")
    with pytest.raises(ValueError, match=r"a YAML file that exists, got .*rnu.yaml; did you mean .*run.yaml\?"):
        load_config(path.with_name("rnu.yaml"))
    with pytest.raises(ValueError, match="config must be a YAML file, got the directory"):
        load_config(path.parent)


def test_a_file_that_the_disk_does_not_give_is_named(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3}")

    def failing(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(ValueError, match="run.yaml: config must be readable, got Input/output error: check the disk"):
        load_config(path)
