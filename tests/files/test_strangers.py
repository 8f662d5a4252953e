"""Files from strangers: whatever their bytes, a reader returns what was written or gives one clear error."""

import contextlib
import json
import os
import random
import shutil
import stat
import struct

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from limits import assert_named, cpu_seconds
from safetensors.torch import save
from tiny import equal, masked_llama

from mft.config import RunConfig
from mft.config_file import load_config, save_config
from mft.masks.export import recode_masks, save_masks
from mft.masks.export_format import CONFIG_FILE, MASK_FILE, is_export, read_export, read_whole_export
from mft.masks.paper_masks import read_paper_masks, write_paper_masks
from mft.memory.model_config import read_model_config
from mft.models.pretrained import load_model, read_chat_template
from mft.training.checkpoint import BadCheckpoint, verify_checkpoint, write_checkpoint

TRIES = int(os.environ.get("MFT_FUZZ", "300"))  # per test
trials = settings(max_examples=TRIES, deadline=30_000, suppress_health_check=list(HealthCheck), database=None)

# An edit of a file: where in it (as a share), what to do, and with which bytes.
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
    """Return a copy of the document with the value at a path replaced, or with a key added.

    Indices of the path are taken modulo what is there.
    """
    document = json.loads(json.dumps(document))
    place = document
    for index in path[:-1]:
        keys = list(place) if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else []
        if not keys or not isinstance(place[keys[index % len(keys)]], dict | list):
            break
        place = place[keys[index % len(keys)]]
    if place == []:
        place.append(value)
        return document
    keys = list(place) if isinstance(place, dict) else range(len(place))
    place[keys[path[-1] % len(keys)] if keys else "more"] = value
    return document


@contextlib.contextmanager
def replaced(path, content):
    """Within the context, a file has other bytes."""
    own = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(own)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "masks"
    model = masked_llama(layers=(3,), target_modules=["q_proj", "k_proj"])
    save_masks(model, directory, base_model_name_or_path="base", coding="packed")
    write_paper_masks(model, directory.parent / "masks.pt")
    return directory


def assert_reads_what_was_written_or_refuses(directory, original):
    try:
        found, masks, _ = read_whole_export(directory)
    except (ValueError, FileNotFoundError) as error:
        assert_named(error, directory)
        return
    expected, expected_masks, _ = read_whole_export(original)
    assert found == expected
    assert equal(masks, expected_masks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b"[1]", "expected an object, got list"),
        (b"{\n,}", ":2: expected JSON"),
        (b'{"a": 1, "a": 1}', "the key 'a' twice: leave one out"),
        (b'{"modules": [{"name": "a", "b": 1, "name": "c"}]}', "the key 'name' twice"),
        (b'{"' + b"k" * 10**6 + b'": 1, "peft_type": "MFT", "format_version": 2}', "unknown key 'kkk.*k[.]{3}$"),
    ],
)
def test_json_that_no_honest_writer_makes_is_one_error(copy, content, message):
    with replaced(copy / CONFIG_FILE, content), pytest.raises(ValueError, match=message) as caught:
        read_export(copy)
    assert_named(caught.value, copy / CONFIG_FILE)


@pytest.fixture(scope="module")
def copy(export, tmp_path_factory):
    directory = tmp_path_factory.mktemp("copy") / "masks"
    shutil.copytree(export, directory)
    return directory


@trials
@given(edit=edits, name=st.sampled_from([CONFIG_FILE, MASK_FILE]))
def test_edited_bytes_of_an_export(export, copy, edit, name):
    with replaced(copy / name, edited((export / name).read_bytes(), edit)):
        assert_reads_what_was_written_or_refuses(copy, export)


@pytest.fixture(scope="module")
def coded(export, tmp_path_factory):
    """Return the export with entropy-coded masks twice: one to keep, and one to be edited."""
    root = tmp_path_factory.mktemp("coded")
    return [recode_masks(export, root / name) for name in ("whole", "edited")]


@trials
@given(edit=edits)
def test_edited_bytes_of_coded_masks(coded, edit):
    whole, copy = (path / MASK_FILE for path in coded)
    copy.write_bytes(edited(whole.read_bytes(), edit))
    assert_reads_what_was_written_or_refuses(copy.parent, whole.parent)


@trials
@given(path=st.lists(st.integers(0, 99), min_size=1, max_size=3), value=values)
def test_edited_fields_of_an_export(export, copy, path, value):
    document = changed(json.loads((export / CONFIG_FILE).read_text()), path, value)
    with replaced(copy / CONFIG_FILE, json.dumps(document).encode()):
        assert_reads_what_was_written_or_refuses(copy, export)


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
    path, tensors = checkpoint.path / name, checkpoint.tensors()
    with replaced(path, edited(path.read_bytes(), edit)):
        try:
            found = verify_checkpoint(checkpoint.path)
            assert found == checkpoint
            assert found.facts() == {"numbers": [1, 2]}
            assert equal(found.tensors(), tensors)
        except BadCheckpoint as error:
            assert_named(error, checkpoint.path)


def test_a_manifest_whose_files_are_anything_is_one_error(checkpoint):
    path = checkpoint.path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    files = manifest["files"]
    some = files["state.json"]
    others = [None, [], 3, "x", sorted(files), {name: 3 for name in files}, {name: None for name in files}]
    others += [files | {"state.json": described} for described in (["bytes", "sha256"], {}, some | {"more": 1})]
    others += [files | {"state.json": some | {"bytes": bad}} for bad in (None, True, [1], float(some["bytes"]))]
    for other in others:
        refused = pytest.raises(BadCheckpoint, match=r"expected (files|bytes).* got .*: restore what was written")
        with replaced(path, json.dumps(manifest | {"files": other}).encode()), refused:
            verify_checkpoint(checkpoint.path)
    assert verify_checkpoint(checkpoint.path) == checkpoint


# ---------------------------------------------------------------------------------------------- what is no file

READERS = {
    f"masks/{CONFIG_FILE}": lambda root: read_export(root / "masks"),
    f"masks/{MASK_FILE}": lambda root: read_export(root / "masks"),
    "step-00000003/manifest.json": lambda root: verify_checkpoint(root / "step-00000003"),
    "step-00000003/state.json": lambda root: verify_checkpoint(root / "step-00000003"),
    "step-00000003/state.safetensors": lambda root: verify_checkpoint(root / "step-00000003"),
    "config.yaml": lambda root: load_config(root / "config.yaml"),
    "masks.pt": lambda root: read_paper_masks(root / "masks.pt"),
    "model/config.json": lambda root: read_model_config(str(root / "model")),
    "model/tokenizer.json": lambda root: load_model(str(root / "model")),
    "model/chat_template.jinja": lambda root: load_model(str(root / "model")),
    "model/model.safetensors": lambda root: load_model(str(root / "model")),
    "model.gguf": lambda root: load_model(str(root / "model.gguf")),
    "config.json": lambda root: read_model_config(str(root / "config.json")),
    "template.jinja": lambda root: read_chat_template(str(root / "template.jinja")),
}


@pytest.fixture(scope="module")
def everything(export, checkpoint, tmp_path_factory):
    """Make a directory with every file that a stranger may give us."""
    root = tmp_path_factory.mktemp("everything")
    shutil.copytree(export, root / "masks")
    shutil.copytree(checkpoint.path, root / checkpoint.path.name)
    save_config(RunConfig(), root / "config.yaml")
    shutil.copy(export.parent / "masks.pt", root)
    (root / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (root / "model" / name).write_text("{}")
    return root


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_never_ends_is_refused_and_not_waited_for(everything, name, kind, tmp_path):
    path = everything / name
    kept = shutil.move(path, tmp_path / "kept") if path.exists() else None
    try:
        if kind == "device":
            path.symlink_to("/dev/zero")
        else:
            os.mknod(path, 0o600 | (stat.S_IFIFO if kind == "pipe" else stat.S_IFSOCK))
        with cpu_seconds(5), pytest.raises(ValueError, match=f"{path.name}: expected .*") as caught:
            READERS[name](everything)
        assert_named(caught.value, path)
        if "state" not in name:  # its size is compared first
            assert f"expected a regular file, got a {kind}: put the file itself there" in str(caught.value)
    finally:
        path.unlink()
        if kept is not None:
            shutil.move(kept, path)


def test_a_pipe_is_no_export_that_may_be_replaced(tmp_path):
    os.mkfifo(tmp_path / CONFIG_FILE)
    with cpu_seconds(5):
        assert not is_export(tmp_path)


# ---------------------------------------------------------------------------------------------- safetensors headers


def doubled(content, name):
    """Return a file of one tensor, whose header lists the tensor twice."""
    length = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8 : 8 + length])
    again = {name: header[name] | {"shape": [*header[name]["shape"], 1]}}
    twice = f"{json.dumps(header)[:-1]},{json.dumps(again)[1:]}"
    return struct.pack("<Q", len(twice)) + twice.encode() + content[8 + length :]


def test_a_tensor_that_stands_twice_is_refused(copy, checkpoint):
    content = doubled(save({"scores": torch.ones(3)}), "scores")
    state = checkpoint.path / "state.safetensors"
    for path, read in ((copy / MASK_FILE, lambda: read_export(copy)), (state, checkpoint.tensors)):
        refused = pytest.raises(ValueError, match="the key 'scores' twice: leave one out")
        with replaced(path, content), refused as caught:
            read()
        assert_named(caught.value, path)


# ---------------------------------------------------------------------------------------------- sizes


def test_many_repeated_modules_are_told_in_linear_time(copy):
    """Counting each name in all the others would take half an hour for 200,000 names."""
    values = json.loads((copy / CONFIG_FILE).read_text())
    values["modules"] = [values["modules"][0] | {"name": f"layer.{i % 20_000}"} for i in range(40_000)]
    with (
        replaced(copy / CONFIG_FILE, json.dumps(values).encode()),
        cpu_seconds(5),
        pytest.raises(ValueError, match=r"modules must be layers of different names, got \['layer.0'"),
    ):
        read_export(copy)


TENFOLD = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"output_dir: [&a0 [1, 1], {', '.join(TENFOLD)}]", "aliases that stand for more than 100000 values: write"),
        ("output_dir: &a [*a]", ":1:13: broken YAML: aliases that stand for more than"),
        ("mask: {layers_to_transform: 0-99999999999}", "must count layers below 10000, got '0-9999"),
        ("mask: {layers_to_transform: 7-" + "9" * 5000 + "}", "layers_to_transform must count layers below 10000"),
        ("train: {lr: 1" + "0" * 400 + "}", ":1:13: broken YAML: an integer of more than 64 bits"),
        ("train: {steps: 0x" + "f" * 6000 + "}", "an integer of more than 64 bits"),
        ("# " + "x" * 10**6, "expected at most 65536 bytes, got 1000002"),
    ],
)
def test_a_small_configuration_does_not_ask_for_much(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with cpu_seconds(5), pytest.raises(ValueError, match=f"{path}.*{message}"):
        load_config(path)


def test_aliases_that_stand_for_little_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {lr: &rate 1e-3, weight_decay: *rate, steps: 3}")
    assert load_config(tmp_path / "config.yaml").train.weight_decay == 1e-3


# ---------------------------------------------------------------------------------------------- configurations


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


@pytest.mark.slow
@trials
@given(path=st.lists(st.integers(0, 99), min_size=1, max_size=2), value=values)
@example(path=[2, 2], value=2.0**64)  # a whole number with more bits than a written configuration may have
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
