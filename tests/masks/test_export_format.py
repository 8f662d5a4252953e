"""The two files of an export: the error names what is missing, damaged or in another format, and where."""

import dataclasses

import pytest
import torch
from exports import CONFIG, MASKS, UP, assert_same_tensors, edit_config, edit_masks, llama, masks
from limits import peak_of
from tiny import save_llama
from tiny_mixtures import mixture

import mft
from mft.config import CODINGS, MaskConfig
from mft.files.mask_coding import BY_NAME, packed_mask
from mft.files.safetensors_file import MOST_HEADER
from mft.masks import export_format
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import load_masks, save_masks
from mft.masks.export_format import read_config

UP_SHAPE = (48, 40)


@pytest.mark.parametrize("name", [CONFIG, MASKS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"export/{name}: missing; an export has {CONFIG} and {MASKS}"):
        load_masks(llama(), saved)


def one_module(shape, kept=0, times=1):
    return {"modules": times * [{"name": "a", "shape": shape, "dtype": "x", "kept": kept}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 0}, "expected format_version 4, got 0: use the version"),
        ({"format_version": 3}, "missing key 'coding'"),
        ({"format_version": 3, "coding": ["rice"]}, r"coding must be rice, got \['rice'\]"),
        ({"format_version": 3, "coding": "by_weight"}, "coding must be rice, got 'by_weight'"),
        ({"format_version": 4}, "missing key 'coding'"),
        ({"format_version": 4, "coding": "rice"}, "coding must be by_weight, got 'rice'"),
        ({"coding": "rice"}, "unknown key 'coding'"),
        ({"content_hash": KeyError}, "missing key 'content_hash'"),
        ({"content_hash": None}, 'content_hash must be a string "sha256:" and 64 hexadecimal digits, got None'),
        ({"base_quantization": KeyError}, "missing key 'base_quantization'"),
        ({"base_quantization": "nf5"}, "base_quantization must be nf4 or nf4-dq or int8, or null, got 'nf5'"),
        ({"quantize_masked": True}, "quantize_masked must be true or false, and false if .* is null, got True"),
        ({"base_quantisation": None}, r"unknown key 'base_quantisation'; did you mean base_quantization\?"),
        ({"base_hash": KeyError}, "missing key 'base_hash'"),
        ({"base_hash": "sha256:"}, "base_hash must be a string"),
        ({"mode": "sideways"}, "mode must be magnitude or value, got 'sideways'"),
        ({"keep_ratio": 1.5}, r"keep_ratio must be a number in \[0, 1\] or null, got 1.5"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of strings, got 'q_proj'"),
        ({"layers_to_transform": [1.5]}, r"layers_to_transform must be a list of ints or null, got \[1.5\]"),
        ({"base_model_name_or_path": []}, r"base_model_name_or_path must be a string or null, got \[\]"),
        ({"system_prompt": ["Sort."]}, r"system_prompt must be Unicode text or null, got \['Sort.'\]"),
        ({"system_prompt": "half a pair: \ud800"}, "system_prompt must be Unicode text or null, got 'half a pair: "),
        ({"modules": []}, r"modules must be a list of masked layers, got \[\]"),
        ({"modules": [7]}, r"modules\[0\] must be an object, got 7"),
        ({"modules": [{"name": "a", "shape": [4, 4], "dtype": "float32"}]}, r"missing key 'kept' in modules\[0\]"),
        (one_module([4, 0]), r"modules\[0\].shape must be two positive ints \[N, K\], or three for experts"),
        (one_module([2, 4, 8], kept=65), r"modules\[0\].kept must be an int from 0 to 64, got 65"),
        (one_module([10**4000] * 2), r"modules\[0\].shape must be two .* below 2\*\*31, got \[1000*[.]{3}"),
        (one_module([4, 4], times=2), r"modules must be layers of different names, got \['a'\]"),
    ],
)
def test_a_wrong_description_names_file_key_and_value(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=f"export/{CONFIG}: {message}"):
        load_masks(llama(), saved)


def test_a_broken_description_names_the_line(saved):
    (saved / CONFIG).write_text('{\n"peft_type": "MFT",\n}')
    with pytest.raises(ValueError, match=rf"{CONFIG}:[23]: expected JSON, "):
        load_masks(llama(), saved)
    (saved / CONFIG).write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=f"{CONFIG}: expected UTF-8 text, got an invalid byte at position 7"):
        load_masks(llama(), saved)


def set_padding(tensors, _):
    tensors[f"{UP}.mask"][5, 1] |= 1 << 30


def flip_bit(tensors, _):
    tensors[f"{UP}.mask"][5, 1] ^= 1 << 3


def cut(tensors, _):
    tensors[f"{UP}.mask"] = tensors[f"{UP}.mask"][:-1].clone()


def edit_packed(tensors, coding, change):
    weight = llama().get_parameter(f"{UP}.weight")
    packed = packed_mask(BY_NAME[coding].pieces(tensors[f"{UP}.mask"], UP_SHAPE, weight), UP_SHAPE)
    change(packed)
    tensors[f"{UP}.mask"] = BY_NAME[coding].store(packed, UP_SHAPE, weight)


def drop_another(tensors, coding):
    """Change the mask to another one that keeps as many weights."""

    def swap(packed):
        row = next(i for i, word in enumerate((packed[:, 0] & 3).tolist()) if word in (1, 2))
        packed[row, 0] ^= 3

    edit_packed(tensors, coding, swap)


def drop_one_more(tensors, coding):
    edit_packed(tensors, coding, lambda packed: packed[7].zero_())


MISSING = (lambda t, _: t.pop(f"{UP}.mask"), f"{MASKS}: missing tensor '{UP}.mask', a module that {CONFIG} lists")
COUNT = (
    rf"{MASKS}: {UP}.mask must keep \d+ weights as {CONFIG} says, got \d+: the two files come from different exports"
)
UNKNOWN = f"{MASKS}: unknown tensor 'more.mask', which belongs to no module in {CONFIG}"
WRONG_PACKED = [
    MISSING,
    (lambda t, _: t.update({"more.mask": torch.zeros(1)}), UNKNOWN),
    (cut, rf"{MASKS}: {UP}.mask must be int32 \(48, 2\) for a weight of \(48, 40\), got I32 \(47, 2\)"),
    (
        set_padding,
        f"{MASKS}: {UP}.mask: mask must have 0 in each row's last 24 bits, its padding: damaged; copy the export",
    ),
    (flip_bit, COUNT),
]
WRONG_CODED = [
    MISSING,
    (
        lambda t, _: t.update({f"{UP}.mask": torch.zeros(48, 2, dtype=torch.int32)}),
        rf"{MASKS}: {UP}.mask must be uint8 \(bytes,\) as its coding says, got I32 \(48, 2\)",
    ),
    (cut, f"{MASKS}: {UP}.mask: stream must .*: damaged; copy the export again"),
    (drop_one_more, COUNT),
    (drop_another, f"{CONFIG}: expected content_hash sha256"),
]
WRONG = [(coding, *wrong) for coding in CODINGS for wrong in (WRONG_PACKED if coding == "packed" else WRONG_CODED)]


@pytest.mark.parametrize(("coding", "change", "message"), WRONG)
def test_wrong_masks_name_file_and_tensor(masked, tmp_path, coding, change, message):
    directory = save_masks(masked, tmp_path / "export", coding=coding)
    edit_masks(directory, lambda tensors: change(tensors, coding))
    model = llama()
    with pytest.raises(ValueError, match=f"export/{message}"):
        load_masks(model, directory)
    assert not masked_modules(model)


def swap_layers(tensors):
    """Swap two layers of the same shape and count."""
    first, second = (f"model.layers.{layer}.mlp.up_proj.mask" for layer in (1, 2))
    assert not torch.equal(tensors[first], tensors[second])
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize("coding", CODINGS)
def test_swapped_layers_are_told_by_the_content_hash(saved, coding):
    mft.recode_masks(saved, saved, coding=coding, model=llama())
    edit_masks(saved, swap_layers)
    with pytest.raises(ValueError, match=f"{CONFIG}: expected content_hash sha256:.*: damaged, or changed by hand"):
        load_masks(llama(), saved)


def test_an_old_export_without_a_content_hash_loads_and_it_is_said_what_that_cannot_tell(saved, masked, caplog):
    assert_same_tensors(masks(load_masks(llama(), saved)), masks(masked))
    assert caplog.text == ""
    missing = dict.fromkeys(("content_hash", "base_quantization", "quantize_masked"), KeyError)
    edit_config(saved, format_version=1, **missing)
    loaded = load_masks(llama(), saved)
    assert_same_tensors(masks(loaded), masks(masked))
    assert (
        "no content_hash, as in format_version 1: swapped masks cannot be detected; save_masks writes one"
        in caplog.text
    )
    save_masks(loaded, saved)
    caplog.clear()
    load_masks(llama(), saved)
    assert caplog.text == ""


READERS = """
import contextlib
from pathlib import Path
from mft.cli.masks import run_inspect
from mft.cli.verify import run_verify
from mft.masks.export_format import read_export
from mft.publishing.content_kinds import read_contents
"""
READ = """
path = Path({!r})
read_export(path)
read_contents(path).use_base("user/name")
with contextlib.redirect_stdout(None):
    run_verify(str(path), None, None, base=False)
run_inspect(str(path), None, None, force=False)
"""


@pytest.mark.parametrize("coding", ["packed", "rice"])
def test_an_export_is_read_in_little_memory_whatever_it_says_of_the_model(tmp_path, coding):
    """Unpacked whole, a mask would take 64 times its words; a coded file may be 1024 times smaller than them."""
    save_llama(tmp_path / "base")
    shape, name = (5120, 1 << 16), "model.layers.0.mlp.up_proj"
    packed = {name: torch.zeros(5120, 1 << 11, dtype=torch.int32)}  # 40 MiB
    packed[name][5, 7] = -1
    export = export_format.MaskExport(
        base_model_name_or_path=str(tmp_path / "base"),
        base_hash=f"sha256:{'0' * 64}",
        mode="magnitude",
        keep_ratio=None,
        target_modules=["up_proj"],
        layers_to_transform=None,
        modules=[export_format.MaskEntry(name, shape, "float32", 32)],
        coding=coding,
    )
    export = dataclasses.replace(export, content_hash=export_format.content_hash(export, packed))
    for file, content in export_format.export_files(export, packed).items():
        (tmp_path / file).write_bytes(content)
    taken = peak_of(READERS, READ.format(str(tmp_path)))
    assert taken.said.endswith(
        f"the mask is for a weight of {shape}, the model's is (64, 32): load the base that it was learned on"
    )
    assert taken.bytes < 2 * (tmp_path / MASKS).stat().st_size + (32 << 20)


def test_what_is_fetched_of_experts_has_room_for_the_words_of_each(tmp_path):
    directory = save_masks(mask_model(mixture("Olmoe"), MaskConfig()), tmp_path / "masks", coding="packed")
    export, packed, _ = export_format.read_whole_export(directory)
    assert export_format.most_bytes(export) == MOST_HEADER + 8 + sum(words.nbytes for words in packed.values())
    base = mixture("Olmoe")
    coded, by_weight = (mft.recode_masks(directory, tmp_path / c, coding=c, model=base) for c in CODINGS[1:])
    assert export_format.most_bytes(read_config(coded / CONFIG)) == export_format.most_bytes(export) + 5 * len(packed)
    assert (by_weight / MASKS).stat().st_size < export_format.most_bytes(read_config(by_weight / CONFIG))
