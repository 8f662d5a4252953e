"""The next steps that mft train and mft demo print work as printed, in any directory and wherever the base is."""

import json
import re
import shlex
import shutil

import pytest
from tiny import make_llama
from tiny_run import LEARN, succeed

from mft.cli import demo
from mft.config_file import load_config
from mft.evaluation.evaluated_base import learned_base
from mft.masks.bank import load_mask_bank
from mft.models import pretrained
from mft.models.pretrained import load_model, save_model
from mft_study.load import load_study


def printed_commands(output):
    """Return the verbs and arguments of the lines that are commands."""
    return [shlex.split(line)[1:] for line in re.findall(r"^ *(mft .*?) *$", output, re.MULTILINE)]


def test_what_train_prints_works_as_printed(cli, model_dir, tmp_path):
    output = cli.done("train", *LEARN, "output_dir=runs/a b")  # the tiny model in float32
    commands = printed_commands(output)
    assert [command[0] for command in commands] == ["generate", "inspect", "evaluate", "merge"]
    told = f"from runs/a b/config.yaml unless given: base {model_dir} in float32"
    for command in commands:
        assert told in succeed(*command)
    assert "data data.jsonl" in succeed(*commands[2])
    assert load_model("runs/a b-merged")[0].config.num_hidden_layers == 4
    assert "agrees" in succeed("verify", "runs/a b")


def test_a_run_with_whole_modules_is_not_sent_to_generate(cli):
    output = cli.done("train", *LEARN, "train.steps=1", "mask.modules_to_save=[lm_head]")
    assert [command[0] for command in printed_commands(output)] == ["inspect", "evaluate", "merge"]


def test_a_run_without_test_rows_is_not_sent_to_evaluate_on_them(cli):
    output = cli.done("train", *LEARN, "train.steps=1", "data.test_share=0")
    assert [command[0] for command in printed_commands(output)] == ["generate", "inspect", "merge"]


def test_what_is_given_wins(cli, model_dir, tmp_path, monkeypatch):
    assert cli("train", *LEARN)[0] == 0
    output = cli.refused("inspect", "run", "--dtype", "bfloat16")
    assert "The model's weights are bfloat16, those were float32" in output
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    output = cli.refused("verify", "run", "--model", str(tmp_path / "other"))
    assert f"base {tmp_path}/other in float32" in output.replace("\n", "")
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "more.jsonl")
    assert "data more.jsonl" in succeed("evaluate", "--masks", "run", "data.source=more.jsonl")


def test_relative_paths_are_those_of_the_run_wherever_it_is_used(cli, model_dir, tmp_path, monkeypatch):
    shutil.copytree(model_dir, tmp_path / "base")
    assert cli("train", *LEARN, "model.name=base", "output_dir=runs/x")[0] == 0
    (tmp_path / "else" / "base").mkdir(parents=True)  # the same name, but not a model
    monkeypatch.chdir(tmp_path / "else")
    assert f"base {tmp_path}/base in float32" in succeed("verify", tmp_path / "runs" / "x")
    output = succeed("evaluate", "--masks", tmp_path / "runs" / "x")
    assert f"data {tmp_path}/data.jsonl" in output
    monkeypatch.chdir(tmp_path / "runs" / "x" / "masks")
    assert f"base {tmp_path}/base in float32" in succeed("verify", ".")


def test_masks_without_their_run_name_base_and_dtype_themselves(cli, model_dir, tmp_path):
    assert cli("train", *LEARN)[0] == 0
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("revision: null", "revision: v2"))
    assert learned_base(tmp_path / "run" / "masks")[0].revision == "v2"
    assert learned_base(tmp_path / "run" / "masks", "elsewhere")[0].revision is None  # they belong to another base
    shutil.move(tmp_path / "run" / "masks", tmp_path / "alone")
    told = f"from the masks in alone unless given: base {model_dir} in float32"
    assert told in succeed("verify", "alone")
    assert f"{told}; data: data.jsonl" in succeed(
        "evaluate", "--masks", "alone", "data.source=data.jsonl", "data.sequence_length=12"
    )
    # A config.yaml in the same place, for another model, says nothing about these masks.
    shutil.move(tmp_path / "alone", tmp_path / "masks")
    (tmp_path / "config.yaml").write_text("model: {name: another}\n")
    assert f"from the masks in masks unless given: base {model_dir}" in succeed("verify", "masks")


@pytest.fixture
def demo_ground(tmp_path, monkeypatch, tokenizer, tiny_llama):
    """Here smollm2-135m is tiny, with its own tokens. The demo trains on rows of text, and chats are in chats.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    save_model(tiny_llama, tokenizer, tmp_path / "model")
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda dtype: tmp_path / "model")
    monkeypatch.setattr(demo, "TOKENS", 4)
    texts = [{"text": f"Row {i}: " + " and ".join(map(str, range(i, i + 20)))} for i in range(60)]
    chats = [
        {"messages": [{"role": "user", "content": f"After {i}?"}, {"role": "assistant", "content": f"{i + 1} comes."}]}
        for i in range(20)
    ]
    for name, rows in (("texts", texts), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["mask.layers_to_transform=2-3", "data.source=texts.jsonl", "data.sequence_length=24"]
    small += ["data.max_train_tokens=96", "data.max_eval_tokens=192", "output_dir=runs/my demo"]
    monkeypatch.setattr(demo, "demo_config", lambda output: load_config("demo", small))
    return tmp_path


@pytest.mark.slow
def test_the_demo_leaves_a_run_and_ends_with_three_commands_that_work_as_printed(demo_ground, monkeypatch):
    output = succeed("demo")
    train, compare, serve = printed_commands(output[output.index("Done in ") :])
    assert train[0] == "train"
    assert "runs/mine/masks" in succeed(*train)
    assert compare == ["compare", "--config", "own", "data.source=chats.jsonl"]
    assert load_study(compare[2]).arms.keys() >= {"control", "LoRA 7 in 4 bits"}
    served = []
    monkeypatch.setattr("mft.serving.launch.serve", lambda masks, *_, **__: served.append(masks))
    succeed(*serve)
    assert served == [{"demo": "runs/my demo"}]
    load_mask_bank(load_model("model")[0], served[0])
    for command in (["generate", "runs/my demo", "Hello", "--max-tokens", "2"], ["merge", "runs/my demo", "merged"]):
        assert "from runs/my demo/config.yaml unless given: base smollm2-135m in " in succeed(*command)
    for name in ("model.safetensors", "config.json"):
        assert (demo_ground / "merged" / name).read_bytes() == (demo_ground / "runs/my demo/model" / name).read_bytes()
