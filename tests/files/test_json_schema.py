"""mft schema: an editor reports about a YAML file what loading it reports."""

import copy
import dataclasses
import json

import pytest
from tiny_study import FEW, STUDY
from typer.testing import CliRunner

from mft.cli.app import app
from mft.config import CONFIGS, OBJECTIVES, ObjectiveConfig, RunConfig, TrainConfig
from mft.config_file import config_from, config_values
from mft.files.yaml_file import dump_yaml, parse_yaml
from mft_study.arms.arm import Arm
from mft_study.config import ScratchConfig
from mft_study.load import SHIPPED, load_study, study_values

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install jsonschema")

SECTIONS = {item.name: item.type for item in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(item.type)}
SMALL_STUDY = parse_yaml(STUDY.format(directory="x") + FEW, "a study")
# One value of each kind that YAML has, and both sides of every bound.
VALUES = (
    *(None, True, False, "", "x", "0-3, 7", "float32", "nf4", "value", "constant", "auto", "mask", "MFT", "kl"),
    *("all_exhausted", "rice", {"x": {"source": "y", "weight": 2}}, {"x": {"source": "y", "weight": 0}}),
    *("matrix", "2:4", "plain", "step", -1, 0, 0.5, 1, 1.0, 1.5, 2, 512, 2**63 - 1, 2**63),
    *([], [0], [-1], [0.5, 0.9], [0.5, 1], [1, 0.5, 0.5], ["x"], [""], [None], {}, {"x": 1}),
)


@pytest.fixture(scope="module")
def validators():
    found = {}
    for what in ("run", "study"):
        result = CliRunner().invoke(app, ["schema", what])
        assert result.exit_code == 0
        schema = json.loads(result.output)
        jsonschema.Draft202012Validator.check_schema(schema)
        found[what] = jsonschema.Draft202012Validator(schema)
    return found


@pytest.mark.parametrize("path", sorted([*CONFIGS.glob("*.yaml"), *SHIPPED.glob("*.yaml")]), ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(validators, path):
    what = "study" if path.parent == SHIPPED else "run"
    validators[what].validate(parse_yaml(path.read_text(), str(path)))


def test_what_is_written_beside_a_run_is_valid(validators):
    validators["run"].validate(json.loads(json.dumps(config_values(RunConfig()))))
    validators["study"].validate(json.loads(json.dumps(study_values(load_study("small")))))


def fields(*classes):
    return [(cls, field.name) for cls in classes for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "name"), fields(*SECTIONS.values(), RunConfig))
def test_whatever_value_a_run_takes_is_valid(validators, cls, name):
    section = next((key for key, known in SECTIONS.items() if known is cls), None)
    loaded = 0
    for value in VALUES:
        values = {name: value} if section is None else {section: {name: value}}
        if cls is TrainConfig:
            values[section] = ({"epochs": 1} if name != "steps" or value is None else {}) | values[section]
        if name == "budget_ramp":
            values[section]["budget"] = 0.1
        if cls is ObjectiveConfig and name != "name":
            reader = next(objective for objective, kind in OBJECTIVES.items() if name in kind.keys)
            values[section] = {"name": reader} | ({"teacher": "a"} if reader == "distill" else {}) | values[section]
        try:
            config_from(copy.deepcopy(values), None)
        except ValueError:
            continue
        loaded += 1
        validators["run"].validate(values)
    assert loaded


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "name"), fields(Arm, ScratchConfig))
def test_whatever_value_a_study_takes_is_valid(validators, tmp_path, cls, name):
    loaded = 0
    for value in VALUES:
        values = copy.deepcopy(SMALL_STUDY)
        if cls is ScratchConfig:
            values["scratch"] = {name: value}
        else:
            arm = {"kind": "average", "of": "MFT"} if name in ("of", "runs") else {"kind": "mask", "lrs": [1e-3]}
            values["arms"]["new"] = arm | {name: value}
        (tmp_path / "study.yaml").write_text(dump_yaml(values))
        try:
            load_study(tmp_path / "study.yaml")
        except ValueError:
            continue
        loaded += 1
        validators["study"].validate(values)
    assert loaded


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("trian: {}", []),
        ("train: {stpes: 1}", ["train"]),
        ("train: 3", ["train"]),
        ("train: {steps: 1.5}", ["train", "steps"]),
        ("train: {betas: [0.9]}", ["train", "betas"]),
        ("train: {betas: [0.9, 1]}", ["train", "betas", 1]),
        ("train: {batch_size: true}", ["train", "batch_size"]),
        ("data: {source: ''}", ["data", "source"]),
        ("data: {sources: {a: {source: x, weight: 0}}}", ["data", "sources", "a", "weight"]),
        ("data: {sources: {a: {weight: 1}}}", ["data", "sources", "a"]),
        ("model: {quantization: nf5}", ["model", "quantization"]),
        ("mask: {keep_ratio: 90}", ["mask", "keep_ratio"]),
        ("mask: {target_modules: [1]}", ["mask", "target_modules"]),
        ("mask: {layers_to_transform: 0-x}", ["mask", "layers_to_transform"]),
        ("mask: {layers_to_transform: [-1]}", ["mask", "layers_to_transform"]),
        ("memory: fast", ["memory"]),
    ],
)
def test_what_is_wrong_in_a_run_is_marked_where_it_stands(validators, text, place):
    values = parse_yaml(text, "a run")
    with pytest.raises(ValueError):  # noqa: PT011  (tests/config/test_config.py has the messages)
        config_from(values, None)
    assert place in marked(validators["run"], values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sead", 1),
        ("seeds", 3),
        ("seeds", [-1]),
        ("stage.lr", 1e-3),
        ("full.seed", 1),
        ("stage.batch_size", 0),
        ("arms.control.kind", "contrl"),
        ("arms.control.lrs", [-1]),
        ("arms.control.rates", [1]),
        ("arms.control", None),
        ("scratch", {"layers": 0}),
    ],
)
def test_what_is_wrong_in_a_study_is_marked(validators, tmp_path, key, value):
    values = copy.deepcopy(SMALL_STUDY)
    assert validators["study"].is_valid(values)
    *sections, last = key.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[last] = value
    (tmp_path / "study.yaml").write_text(dump_yaml(values))
    with pytest.raises(ValueError):  # noqa: PT011  (tests/study/test_declared.py has the messages)
        load_study(tmp_path / "study.yaml")
    assert marked(validators["study"], values)


def test_an_editor_shows_comments_choices_and_defaults(validators):
    schema = validators["run"].schema
    model, train = (schema["$defs"][name] for name in ("ModelConfig", "TrainConfig"))
    assert model["properties"]["dtype"]["enum"] == ["bfloat16", "float32", "float16"]
    assert model["properties"]["quantize_masked"]["description"] == "Quantise the masked linear layers too"
    assert train["properties"]["lr"]["description"].startswith("Learning rate. Masks move at 3e-4")
    assert train["properties"]["lr"]["default"] == TrainConfig(steps=1).lr
    assert schema["properties"]["train"]["default"]["epochs"] == RunConfig().train.epochs
    assert "optimiser steps" in train["description"]
    whole = validators["study"].schema["properties"]["extensions"]["description"]  # a comment of several lines
    assert whole.startswith("Further settings that an arm may try")
    assert whole.endswith("rates beside it are three.")


def marked(validator, values):
    """Return the paths where a validator finds errors, also inside alternatives."""
    errors = list(validator.iter_errors(values))
    return [list(one.absolute_path) for error in errors for one in (error, *every(error.context))]


def every(errors):
    for error in errors:
        yield error
        yield from every(error.context)
