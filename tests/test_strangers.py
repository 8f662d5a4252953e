"""Files from strangers: whatever their bytes, a reader gives what was written or one clear error, and nothing else."""

import json
import os
import random
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import masked_llama

from mft.checkpoint import BadCheckpoint, verify_checkpoint, write_checkpoint
from mft.config import RunConfig, load_config, save_config
from mft.export import save_masks
from mft.export_file import CONFIG_FILE, MASK_FILE, read_export
from mft.paper_masks import read_paper_masks, write_paper_masks

TRIES = int(os.environ.get("MFT_FUZZ", "300"))  # a test
trials = settings(max_examples=TRIES, deadline=30_000, suppress_health_check=list(HealthCheck), database=None)

# An edit of a file: where in it (a share), what is done, with which bytes.
edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "insert", "remove", "swap", "cut"]), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)


def edited(content, edit):
    content = bytearray(content)
    for share, kind, given_bytes in edit:
        place = int(share * len(content))
        if kind == "set":
            content[place : place + len(given_bytes)] = given_bytes
        elif kind == "insert":
            content[place:place] = given_bytes
        elif kind == "remove":
            del content[place : place + 1 + len(given_bytes)]
        elif kind == "swap" and content:
            other = random.Random(place).randrange(len(content))
            place = min(place, len(content) - 1)
            content[place], content[other] = content[other], content[place]
        elif kind == "cut":
            del content[place:]
    return bytes(content)


def changed(document, path, value):
    """document with the value at a path of indices (taken modulo what is there) replaced, or a key added."""
    document = json.loads(json.dumps(document))
    place = document
    for index in path[:-1]:
        keys = list(place) if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else []
        if not keys or not isinstance(place[keys[index % len(keys)]], dict | list):
            break
        place = place[keys[index % len(keys)]]
    keys = list(place) if isinstance(place, dict) else range(len(place))
    place[keys[path[-1] % len(keys)] if keys else ("more" if isinstance(place, dict) else 0)] = value
    return document


def assert_named(error, path):
    assert str(path) in str(error)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "masks"
    model = masked_llama(layers=(3,), target_modules=["q_proj", "k_proj"])
    save_masks(model, directory, base_model_name_or_path="base")
    write_paper_masks(model, directory.parent / "masks.pt")
    return directory


def assert_reads_what_was_written_or_refuses(directory, original):
    try:
        found, masks = read_export(directory)
    except (ValueError, FileNotFoundError) as error:
        assert_named(error, directory)
        return
    expected, expected_masks = read_export(original)
    assert found == expected
    assert masks.keys() == expected_masks.keys()
    assert all(torch.equal(masks[name], expected_masks[name]) for name in masks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b"[1]", "expected an object, got list"),
        (b'{"a": "\xff"}', "got byte 7, which is not"),
        (b"{\n,}", ":2: expected JSON"),
    ],
)
def test_json_that_no_honest_writer_makes_is_one_error(export, copy, content, message):
    (copy / CONFIG_FILE).write_bytes(content)
    try:
        with pytest.raises(ValueError, match=message) as caught:
            read_export(copy)
        assert_named(caught.value, copy / CONFIG_FILE)
    finally:
        shutil.copy(export / CONFIG_FILE, copy / CONFIG_FILE)


@pytest.fixture(scope="module")
def copy(export, tmp_path_factory):
    directory = tmp_path_factory.mktemp("copy") / "masks"
    shutil.copytree(export, directory)
    return directory


@trials
@given(edit=edits, name=st.sampled_from([CONFIG_FILE, MASK_FILE]))
def test_edited_bytes_of_an_export(export, copy, edit, name):
    (copy / name).write_bytes(edited((export / name).read_bytes(), edit))
    try:
        assert_reads_what_was_written_or_refuses(copy, export)
    finally:
        shutil.copy(export / name, copy / name)


@trials
@given(path=st.lists(st.integers(0, 99), min_size=1, max_size=3), value=values)
def test_edited_fields_of_an_export(export, copy, path, value):
    document = changed(json.loads((export / CONFIG_FILE).read_text()), path, value)
    (copy / CONFIG_FILE).write_text(json.dumps(document))
    try:
        assert_reads_what_was_written_or_refuses(copy, export)
    finally:
        shutil.copy(export / CONFIG_FILE, copy / CONFIG_FILE)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@trials
@given(edit=edits)
def test_edited_bytes_of_the_papers_masks(export, tmp_path_factory, edit):
    path = tmp_path_factory.getbasetemp() / "masks.pt"
    path.write_bytes(edited((export.parent / "masks.pt").read_bytes(), edit))
    try:
        masks = read_paper_masks(path)
    except ValueError as error:
        assert_named(error, path)
        return
    assert all(mask.dtype == torch.bool and mask.dim() == 2 for mask in masks.values())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tensors = {"scores": torch.arange(40.0).view(5, 8), "codes": torch.arange(9, dtype=torch.int16)}
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), 3, tensors, {"numbers": [1, 2]})


@trials
@given(edit=edits, name=st.sampled_from(["manifest.json", "state.json", "state.safetensors"]))
def test_edited_bytes_of_a_checkpoint(checkpoint, edit, name):
    path = checkpoint.path / name
    content, tensors = path.read_bytes(), checkpoint.tensors()
    path.write_bytes(edited(content, edit))
    try:
        found = verify_checkpoint(checkpoint.path)
        assert found == checkpoint
        assert found.facts() == {"numbers": [1, 2]}
        assert all(torch.equal(value, tensors[key]) for key, value in found.tensors().items())
    except BadCheckpoint as error:
        assert_named(error, checkpoint.path)
    finally:
        path.write_bytes(content)


@trials
@example(text="a: &a [*a]")
@example(text="model: {name: " + "[" * 3000)
@example(text="a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b]")
@given(text=st.text(max_size=60))
def test_any_text_as_a_configuration(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(path)
    except ValueError as error:
        assert_named(error, path)


@trials
@given(path=st.lists(st.integers(0, 99), min_size=1, max_size=2), value=values)
def test_edited_fields_of_a_configuration(tmp_path_factory, path, value):
    target = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(RunConfig(), target)
    document = changed(yaml.safe_load(target.read_text()), path, value)
    target.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(target)
    except ValueError as error:
        assert_named(error, target)
        return
    again = target.with_name("again.yaml")
    save_config(config, again)
    assert load_config(again) == config
