"""mft patch as a user types it: what it prints, and which files it leaves."""

import re

import pytest
from tiny_gguf import write_tiny_gguf
from tiny_run import refused, succeed

from mft.config import MaskConfig, ModelConfig
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.models.pretrained import load_model

WEIGHTS = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 32)  # of two blocks


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Make a directory with model.gguf, and masks that drop a quarter of its weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "model.gguf")
    model, _ = load_model(ModelConfig("model.gguf", dtype="float32"))
    save_masks(mask_model(model, MaskConfig(keep_ratio=0.75)), "masks", base_model_name_or_path="model.gguf")
    return tmp_path


def mft(*words):
    return " ".join(succeed("patch", *words).split())


def test_a_patch_and_its_undo(here):
    said = mft("model.gguf", "masks", "out.gguf")
    assert "model.gguf is the base of the masks: its weights have their hash" in said
    assert f"patched: {WEIGHTS // 4:,} weights are 0 in out.gguf, where " in said
    assert "the old bytes lie in out.gguf.undo: mft patch out.gguf ORIGINAL --undo restores the original" in said
    assert "restored: back.gguf has the SHA-256 of the file that was patched" in mft("out.gguf", "back.gguf", "--undo")
    assert (here / "back.gguf").read_bytes() == (here / "model.gguf").read_bytes()


def test_a_patch_in_place_warns_of_what_has_the_file_open(here):
    before = (here / "model.gguf").read_bytes()
    said = mft("model.gguf", "masks", "--in-place")
    assert said.startswith(
        "warning: a running llama.cpp that has model.gguf open computes with the new weights at once"
    )
    assert (here / "model.gguf").read_bytes() != before
    mft("model.gguf", "--undo", "--in-place")
    assert (here / "model.gguf").read_bytes() == before


def test_an_adapter_says_its_size_first_and_whether_it_is_exact(here):
    said = mft("model.gguf", "masks", "--lora", "adapter.gguf")
    size, model = map(int, re.search(r"the adapter takes (\d+) bytes, the model (\d+)", said).groups())
    assert size < (here / "adapter.gguf").stat().st_size < size + 4000
    assert model == (here / "model.gguf").stat().st_size
    assert re.search(
        rf"adapter.gguf: an adapter that subtracts {WEIGHTS // 4:,} dropped weights; float16 rounds [\d,]+ of them",
        said,
    )


def test_a_widened_file_says_what_it_grows_by(here):
    write_tiny_gguf(here / "other.gguf", down="Q4_1")
    output = refused("patch", "other.gguf", "masks", "out.gguf", "--force")
    assert "Q4_1 of blk.0.ffn_down.weight and 1 more: --widen" in " ".join(output.split())
    said = mft("other.gguf", "masks", "out.gguf", "--force", "--widen", "f32")
    assert re.search(
        rf"patched: {WEIGHTS // 4:,} weights are 0 in out.gguf, where [\d,]+ bytes of codes changed; "
        rf"{2 * 16 * 32 // 4:,} of them lie in tensors .* float32, .* the file {2 * 16 * (32 * 4 - 20):,} bytes longer",
        said,
    )


def test_a_quantisation_of_ones_own_is_compared_with_the_base_that_the_masks_name(here):
    write_tiny_gguf(here / "other.gguf", down="Q8_0")
    said = mft("other.gguf", "masks", "out.gguf")
    assert "other.gguf is taken for a quantisation of the base of the masks: shapes agree" in said
