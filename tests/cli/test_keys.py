"""--help of verbs that take a configuration: every key in its section, and one key explained."""

import dataclasses
import subprocess
import sys

import pytest
from tiny_run import refused, succeed

from mft.cli.keys import run_schema, sections
from mft.config import RunConfig
from mft.config_file import load_config
from mft_study.load import study_schema

SECTIONS = {item.name: item.type for item in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(item.type)}
NAMED = "data.sources"  # its keys have no default


def paths_of_a_run():
    own = [item.name for item in dataclasses.fields(RunConfig) if item.name not in SECTIONS]
    inside = [f"{name}.{item.name}" for name, section in SECTIONS.items() for item in dataclasses.fields(section)]
    return {*own, *inside} - {"data.sources"}


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_help_lists_every_key_with_type_default_and_a_line(verb):
    output = succeed(verb, "--help")
    lines = {line.split("=")[0].strip(): line for line in output.splitlines() if line.startswith("   ")}
    assert paths_of_a_run() <= set(lines)
    assert f"train.lr={'0.0003' if verb == 'finetune' else '0.001'} " in lines["train.lr"]
    assert "float above 0: Learning rate. Masks move" in lines["train.lr"]
    assert "model.quantization=null " in lines["model.quantization"]
    assert "nf4, nf4-dq, int8 or null: Quantise the frozen linear" in lines["model.quantization"]
    assert "int from 0, list of int from 0, text or null: " in lines["mask.layers_to_transform"]
    assert "train.epochs=1 " in lines["train.epochs"]  # the run's own default, not that of the section's class
    assert "--merge" in output or verb == "finetune"


def test_the_defaults_that_help_shows_are_those_of_a_run():
    assigned = [key.assigned for section in sections(run_schema()) for key in section.keys if NAMED not in key.path]
    assert load_config(None, assigned) == RunConfig()


@pytest.mark.parametrize("schema", [run_schema, study_schema], ids=["run", "study"])
def test_keys_are_listed_once(schema):
    paths = [key.path for section in sections(schema()) for key in section.keys]
    assert len(paths) == len(set(paths))
    assert all(key.said for section in sections(run_schema()) for key in section.keys)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("train.lr", ["train.lr=0.001", "float above 0; by default 0.001", "called learning_rate by other trainers"]),
        ("train.lr=1e-3", ["train.lr=0.001"]),
        ("learning_rate", ["train.lr=0.001"]),
        ("seed", ["data.seed=0", "mask.seed=0", "train.seed=0"]),
        ("mask", ["mask.keep_ratio=null", "mask.seed=0"]),
        ("model", ["model.name=", "model.dtype="]),
        ("sources", ["data.sources.NAME.weight=1"]),
        ("data.sources.code.source", ["data.sources.NAME.source=...", "text; must be given"]),
    ],
)
def test_help_of_a_key_explains_it(asked, told):
    for verb in (["train"], ["data", "show"]):
        output = succeed(*verb, "--help", asked)
        assert all(words in output for words in told)
        assert "Usage" not in output


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("train.learnin", "unknown key 'train.learnin'; did you mean train.lr?"),
        ("keep_ration", "unknown key 'keep_ration'; did you mean mask.keep_ratio?"),
        ("mask.keep", "unknown key 'mask.keep'; did you mean mask.keep_ratio?"),
        ("zzz", "unknown key 'zzz'; sections: model, data, data.sources.NAME, mask, train, objective"),
    ],
)
def test_an_unknown_key_gets_the_nearest(asked, message):
    output = refused("train", "--help", asked)
    assert output.strip() == f"error: {message}"


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["--model", "gpt2"], "--model: write model.name=gpt2"),
        (["--model=gpt2"], "--model: write model.name=gpt2"),
        (["--train.lr", "1e-3"], "--train.lr: write train.lr=1e-3"),
        (["--learning-rate", "1e-3"], "--learning-rate: write train.lr=1e-3"),
        (["--packing"], "--packing: write data.packing=..."),
        (["--packing", "--overwrite"], "--packing: write data.packing=..."),
        (["--seed", "1"], "--seed: write data.seed=1 or mask.seed=1 or train.seed=1"),
    ],
)
def test_a_key_as_an_option_is_told_how_it_is_written(arguments, written):
    output = refused("train", *arguments)
    assert output == f"error: a key must be given without dashes, got {written}\n"


def test_help_and_a_wrong_key_load_no_torch():
    script = """
import sys
from mft.cli.app import app
for line in sys.argv[1:]:
    try:
        app(line.split())
    except SystemExit as ended:
        print(f"{line} ends with {ended.code}")
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "datasets")))
"""
    helped = ["train --help", "train --help train.lr", "compare --help", "compare --help arms.MFT.lrs", "schema study"]
    wrong = ["train trian.lr=1", "finetune chats.jsonl", "train --config nothere.yaml", "train --model x"]
    wrong += ["evaluate --masks x data.surce=1", "evaluate mask.k=1", "data show data.surce=1", "sensitivity train.r=1"]
    wrong += ["train --resume x data.surce=1", "train train.lr=fast", "train --force"]
    wrong += ["compare sedes=1", "compare arms.MFT.lsr=1", "compare chats.jsonl", "compare --config nothere.yaml"]
    wrong += ["compare arms.MFT.lrs=fast", "compare -c board-small arms.MFT.lsr=1", "ablate ratio arms.MFT.lsr=1"]
    wrong += ["estimate --config rewards arms.MFT.lsr=1", "estimate --config nothere.yaml"]
    wrong += ["patch model.gguf masks", "patch nothere.gguf masks out.gguf"]
    done = subprocess.run([sys.executable, "-c", script, *helped, *wrong], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = dict.fromkeys(helped, 0) | dict.fromkeys(wrong, 2)
    assert [line for line in done.stdout.splitlines() if " ends with " in line] == [
        f"{line} ends with {code}" for line, code in codes.items()
    ]
