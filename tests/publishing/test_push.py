"""mft push to a hub on loopback, with huggingface_hub's own client: what is uploaded, refused, and kept."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_stub.asked import environment
from hub_stub.repository import File
from hub_stub.server import WRITES
from safetensors.torch import load_file
from tiny import equal, make_llama, masked_llama, save_llama
from tiny_run import succeed

from mft.files.hub import HubError
from mft.masks.convert import masked_modules
from mft.masks.export import load_masks, save_masks
from mft.masks.export_format import read_whole_export
from mft.models.pretrained import save_model
from mft.publishing.push import push_to_hub

NAME = "user/masks"
CONFIG, MASKS = "adapter_config.json", "adapter_model.safetensors"
READ = """
import sys, torch
from mft.masks.export_format import read_whole_export
from mft.masks.location import masks_directory
torch.save(read_whole_export(masks_directory(sys.argv[1]))[1], sys.argv[2])
"""


def contents_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def contents(hub, name=NAME, revision="main"):
    return {path: file.content for path, file in hub.repositories[name].files(revision).items()}


push = functools.partial(succeed, "push")


def writes(hub):
    return [request for request in hub.requests if "/commit/" in request or request.startswith("PUT")]


@pytest.mark.slow
def test_masks_come_back_bit_for_bit_in_a_new_process_with_an_empty_cache(hub, run, tmp_path):
    output = push(run, NAME)
    head = hub.repositories[NAME].branches["main"]
    assert f"pushed {run} to {hub.url}/{NAME}\n" in output
    assert f"revision: {head}; {NAME}@{head} always names" in output
    found = contents(hub)
    assert found.keys() == {".gitattributes", CONFIG, MASKS, "README.md"}
    assert hub.repositories[NAME].files()[MASKS].large
    assert hub.repositories[NAME].messages == ["initial", "Push masks with mft"]
    variables = os.environ | environment(hub, tmp_path / "home")
    words = [f"{NAME}@{head}", str(tmp_path / "read.pt")]
    subprocess.run([sys.executable, "-c", READ, *words], check=True, env=variables)
    expected = {name: module.packed_mask() for name, module in masked_modules(masked_llama()).items()}
    assert equal(torch.load(tmp_path / "read.pt"), expected)


def test_a_second_push_of_the_same_changes_nothing(hub, run):
    first = push_to_hub(run, NAME)
    sent = len(writes(hub))
    assert push_to_hub(run / "masks", NAME).revision == first.revision
    assert len(writes(hub)) == sent


def test_a_branch_a_message_and_a_private_repository_are_made_as_asked(hub, run):
    push(run, NAME, "--branch", "try", "--private", "--message", "First of them")
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.messages[-1] == "First of them"
    assert MASKS in contents(hub, revision="try")
    assert MASKS not in contents(hub)
    hub.add("user/public")
    with pytest.raises(ValueError, match="private must be False for a repository that is public, got 'user/public'"):
        push_to_hub(run, "user/public", private=True)
    assert contents(hub, "user/public").keys() == {".gitattributes"}


def test_the_name_of_the_base_on_the_hub_goes_into_card_and_export(hub, tmp_path):
    base = tmp_path / "my-base"
    save_llama(base)
    directory = save_masks(masked_llama(), tmp_path / "masks", base_model_name_or_path=str(base))
    assert any("which others do not have: --base USER/NAME" in note for note in push_to_hub(directory, NAME).notes)
    assert str(tmp_path) not in contents(hub)["README.md"].decode()
    assert not any("--base" in note for note in push_to_hub(directory, NAME, base="user/my-base").notes)
    assert b"base_model: user/my-base\n" in contents(hub)["README.md"]
    (tmp_path / "got").mkdir()
    for name in (CONFIG, MASKS):
        (tmp_path / "got" / name).write_bytes(contents(hub)[name])
    export, masks, _ = read_whole_export(tmp_path / "got")  # its hash matches
    assert export.base_model_name_or_path == "user/my-base"
    assert masks.keys() == read_whole_export(directory)[1].keys()


def test_masks_are_entropy_coded_on_the_way_and_the_card_says_what_they_weigh(hub, run):
    before = contents_of(run / "masks")
    push(run, NAME, "--coding", "rice", "--base", "user/base")
    assert contents_of(run / "masks") == before
    found = contents(hub)
    size = len(found[MASKS])
    assert size < len(before[MASKS])
    weights = 18432
    said = f"| size | {size} bytes, {8 * size / weights:.3g} bits per weight"
    assert f"{said}; entropy-coded".encode() in found["README.md"]
    loaded, expected = load_masks(make_llama(), NAME), masked_llama()
    for name, module in masked_modules(expected).items():
        assert torch.equal(masked_modules(loaded)[name].mask(), module.mask())
    push_to_hub(run, NAME, base="user/base")  # unchanged files
    assert contents(hub)[MASKS] == before[MASKS]
    size = len(before[MASKS])
    assert f"| size | {size} bytes, {8 * size / weights:.3g} bits per weight |\n".encode() in contents(hub)["README.md"]


def test_masks_by_weight_are_pushed_as_they_lie_there_and_not_made_on_the_way(hub, tmp_path):
    path = save_masks(masked_llama(), tmp_path / "masks", base_model_name_or_path="user/base", coding="by_weight")
    push_to_hub(path, NAME)
    assert contents(hub)[MASKS] == (path / MASKS).read_bytes()
    assert b"entropy-coded, which mft of format 4 reads" in contents(hub)["README.md"]
    loaded, expected = masked_modules(load_masks(make_llama(), NAME)), masked_modules(masked_llama())
    assert all(torch.equal(loaded[name].mask(), module.mask()) for name, module in expected.items())
    save_llama(tmp_path / "model")
    with pytest.raises(ValueError, match="coding must be None for model, got rice"):
        push_to_hub(tmp_path / "model", NAME, coding="rice")
    for change in ({"coding": "rice"}, {"base": "user/other"}):
        with pytest.raises(ValueError, match="masks in coding by_weight can only be read with the weights of their"):
            push_to_hub(path, NAME, **change)
    with pytest.raises(ValueError, match="coding by_weight needs the base's weights to write, got masks alone"):
        push_to_hub(save_masks(masked_llama(), tmp_path / "rice"), NAME, coding="by_weight")


def test_a_model_is_pushed_with_its_tokenizer_and_an_older_ones_shards_go(hub, tmp_path):
    save_llama(tmp_path / "merged")
    (tmp_path / "merged" / "optimizer.pt").write_bytes(b"pickle")
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    hub.add("user/model", old)
    pushed = push_to_hub(tmp_path / "merged", "user/model")
    found = contents(hub, "user/model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "notes.txt"} <= found.keys()
    assert not found.keys() & {"optimizer.pt", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert any("left out" in note and "optimizer.pt" in note for note in pushed.notes)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys()


def test_a_model_and_an_adapter_do_not_share_a_repository(hub, run, tmp_path):
    save_llama(tmp_path / "model")
    for first, second, found in ((run, tmp_path / "model", CONFIG), (tmp_path / "model", run, "config.json")):
        name = f"user/{found.partition('.')[0]}"
        push_to_hub(first, name)
        before = contents(hub, name)
        with pytest.raises(ValueError, match=f"hold the same kind of thing, got '{name}' with {found}"):
            push_to_hub(second, name)
        assert contents(hub, name) == before


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_of_scores_is_pushed_with_a_card_in_place_of_pefts_form(hub, tmp_path):
    from peft import get_peft_model

    from mft.masks.peft import MaskPeftConfig

    config = MaskPeftConfig(layers_to_transform=[3], target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(make_llama(), config).save_pretrained(tmp_path / "adapter")
    assert "[More Information Needed]" in (tmp_path / "adapter" / "README.md").read_text()
    push_to_hub(tmp_path / "adapter", NAME)
    card = contents(hub)["README.md"].decode()
    assert "More Information" not in card
    assert "as PEFT saved them" in card
    assert contents(hub)[MASKS] == (tmp_path / "adapter" / MASKS).read_bytes()


# ---------------------------------------------------------------------------------------------- cards of others


def test_a_card_that_was_edited_on_the_hub_stays_until_it_is_given_up(hub, run):
    push_to_hub(run, NAME)
    repository = hub.repositories[NAME]
    edited = contents(hub)["README.md"].replace(b"Masks of", b"My masks of")
    repository.commit("main", repository.files() | {"README.md": File(edited)}, "edit")
    (run / "table.json").unlink()
    pushed = push_to_hub(run, NAME)
    assert contents(hub)["README.md"] == edited
    assert any("edited by hand and stays; --overwrite-card" in note for note in pushed.notes)
    push_to_hub(run, NAME, overwrite_card=True)
    made = contents(hub)["README.md"]
    assert made.startswith(b"---\n")
    assert b"My masks" not in made
    table = '{"before": {"loss": 1.0, "accuracy": 0.5}, "loss after - before": 0, "standard error": 0}'
    (run / "table.json").write_text(table)
    push_to_hub(run, NAME)  # our own card is made again
    assert b"## Results" in contents(hub)["README.md"]


# ---------------------------------------------------------------------------------------------- refused

NOT_FINITE = '{"after": {"loss": NaN, "accuracy": 0.5}, "loss after - before": 0.1, "standard error": 0.1}'


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "masks" / MASKS).write_bytes((run / "masks" / MASKS).read_bytes()[:-8]), "damaged or cut"),
        (lambda run: flip_a_bit(run / "masks" / MASKS), "come from different exports, or are damaged"),
        (lambda run: (run / "masks" / MASKS).unlink(), "missing; an export has"),
        (lambda run: shutil.rmtree(run / "masks"), "must be a finished run's, got .* --resume"),
        (lambda run: [shutil.rmtree(run / "masks"), (run / "config.yaml").unlink()], "must hold masks or an adapter"),
        (lambda run: shutil.rmtree(run), "directory must be one that exists, got .*mine"),
        (lambda run: (run / "masks" / CONFIG).write_text('{"peft_type": "LORA"}'), "must be 'MFT' to be pushed by mft"),
        (lambda run: (run / "table.json").write_text('{"after": {"loss": NaN}}'), "expected finite losses"),
        (lambda run: (run / "table.json").write_text(NOT_FINITE), "expected finite losses"),
    ],
)
def test_what_is_not_whole_is_refused_before_the_hub_is_asked(hub, run, damage, message):
    damage(run)
    for directory in (run, run / "masks") if "different exports" in message else (run,):
        with pytest.raises((ValueError, OSError), match=message):
            push_to_hub(directory, NAME)
    assert hub.requests == []


def test_a_model_whose_shard_is_missing_or_that_is_masked_is_refused(hub, tmp_path):
    directory = tmp_path / "model"
    save_model(make_llama(), None, directory)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map must name a file next to it"):
        push_to_hub(directory, "user/model")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(ValueError, match="expected the weights of an ordinary model, got none called a"):
        push_to_hub(directory, "user/model")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="missing, weights of the model"):
        push_to_hub(directory, "user/model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repository": "user/masks@main"}, "repository must be user/name"),
        ({"repository": "user/ma..sks"}, "repository must be user/name"),
        ({"message": ""}, "message must be a single line"),
        ({"coding": "rar"}, "coding must be one of packed, rice, by_weight, got 'rar'"),
        ({"base": "../base"}, "base must be user/name on the hub, got '../base'"),
    ],
)
def test_a_bad_argument_is_named_before_the_hub_is_asked(hub, run, options, message):
    with pytest.raises(ValueError, match=message):
        push_to_hub(run, **{"repository": NAME} | options)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_forgotten", NAME, "got no valid token .Invalid credentials"),
        (WRITES, "someone/masks", "must let you write to 'someone/masks', got 403"),
    ],
)
def test_who_may_not_write_is_told(hub, run, monkeypatch, token, name, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message):
        push_to_hub(run, name)
    assert hub.repositories == {}


@pytest.mark.parametrize("route", ["/lfs/[0-9a-f]+", f"/api/models/{NAME}/commit/main"])
def test_a_connection_that_breaks_off_leaves_the_repository_as_it_was(hub, run, route):
    hub.add(NAME)
    hub.fail("PUT" if "lfs" in route else "POST", route, after=100, times=99)
    with pytest.raises(HubError, match="connection to the hub for 'user/masks' broke off .*try again"):
        push_to_hub(run, NAME)
    assert contents(hub).keys() == {".gitattributes"}
    hub.faults.clear()
    push_to_hub(run, NAME)
    assert MASKS in contents(hub)
