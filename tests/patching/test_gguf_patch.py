"""Masks in GGUF files: transformers reads the mask on the base, the original can be restored, nothing is lost."""

import errno
import fcntl
import hashlib
import os

import gguf
import pytest
import torch
from gguf_models import logits, make, mask_of, read_gguf, write_gguf

from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.masks.export import recode_masks, save_masks
from mft.patching import patch as patching
from mft.patching.block_codes import CODES
from mft.patching.patch import patch_gguf, patch_gguf_in_place, undo_gguf_patch, undo_gguf_patch_in_place
from mft.patching.undo_file import undo_path

WITHOUT_ZERO = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "IQ4_NL")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture
def q8(model, tmp_path):
    """Return (a file in Q8_0, masks of its weights)."""
    path = write_gguf(model, tmp_path / "model.gguf", "Q8_0")
    return path, mask_of(path, tmp_path / "masks")[0]


@pytest.mark.parametrize("kind", CODES)
def test_a_patched_file_is_the_mask_on_the_base_and_its_undo_the_original(kind, model, tmp_path):
    path = write_gguf(model, tmp_path / "model.gguf", kind)
    masks, expected = mask_of(path, tmp_path / "masks")
    before = sha256(path)
    patched = patch_gguf(path, masks, tmp_path / "out.gguf")
    assert torch.equal(logits(read_gguf(patched.path)), expected)
    assert not torch.equal(logits(read_gguf(path)), expected)
    assert (sha256(path), patched.grown) == (before, 0)
    undo_gguf_patch(patched.path, tmp_path / "back.gguf")
    assert sha256(tmp_path / "back.gguf") == before


@pytest.mark.parametrize("kind", WITHOUT_ZERO)
def test_a_type_without_a_zero_is_refused_by_name_and_can_be_widened(kind, model, tmp_path):
    path = write_gguf(model, tmp_path / "model.gguf", kind)
    masks, expected = mask_of(path, tmp_path / "masks", layers_to_transform=[1], target_modules=["up_proj", "q_proj"])
    with pytest.raises(
        ValueError, match=rf"exact zero \(F32, .*, got {kind} of blk.1.attn_q.weight and 1 more: --widen"
    ):
        patch_gguf(path, masks, tmp_path / "out.gguf")
    assert names_in(tmp_path) == ["masks", "model.gguf"]
    patched = patch_gguf(path, masks, tmp_path / "out.gguf", widen="f32")
    assert torch.equal(logits(read_gguf(patched.path)), expected)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert patched.grown == 2 * 256 * 256 * (4 - size / block) == os.path.getsize(patched.path) - os.path.getsize(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(patched.path).tensors}
    assert [
        name for name, found in types.items() if found != kind and name.startswith("blk") and "norm" not in name
    ] == [
        "blk.1.attn_q.weight",
        "blk.1.ffn_up.weight",
    ]
    undo_gguf_patch(patched.path, tmp_path / "back.gguf")
    assert sha256(tmp_path / "back.gguf") == sha256(path)


def test_a_widened_file_has_its_tensors_one_after_the_other_as_ggml_asks(model, tmp_path):
    path = write_gguf(model, tmp_path / "model.gguf", "Q4_1")
    masks, _ = mask_of(path, tmp_path / "masks", target_modules=["up_proj"])
    patched = patch_gguf(path, masks, tmp_path / "out.gguf", widen="f32")
    reader = gguf.GGUFReader(patched.path)
    end = reader.data_offset
    for tensor in reader.tensors:
        assert tensor.data_offset == end
        end += tensor.n_bytes + -tensor.n_bytes % reader.alignment


def test_only_the_masked_tensors_change(q8, tmp_path):
    path, _ = q8
    masks, _ = mask_of(path, tmp_path / "few", layers_to_transform=[1], target_modules=["up_proj"])
    patched = patch_gguf(path, masks, tmp_path / "out.gguf").path
    pairs = zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(patched).tensors)
    assert [one.name for one, two in pairs if one.data.tobytes() != two.data.tobytes()] == ["blk.1.ffn_up.weight"]


def test_masks_coded_by_weight_are_read_with_the_files_own_weights(q8, model, tmp_path):
    path, masks = q8
    coded = recode_masks(masks, tmp_path / "coded", coding="by_weight", model=read_gguf(path))
    one = patch_gguf(path, masks, tmp_path / "one.gguf").path
    assert sha256(one) == sha256(patch_gguf(path, coded, tmp_path / "two.gguf").path)


def test_a_patch_in_place_is_the_patch_and_comes_back(q8, tmp_path):
    path, masks = q8
    before, patched = sha256(path), patch_gguf(path, masks, tmp_path / "out.gguf").path
    patch_gguf_in_place(path, masks)
    assert sha256(path) == sha256(patched)
    with pytest.raises(
        ValueError, match="must not have been patched before, got model.gguf.undo next to it: undo that"
    ):
        patch_gguf_in_place(path, masks)
    undo_gguf_patch_in_place(path)
    assert sha256(path) == before
    assert not undo_path(path).exists()


def test_a_patch_in_place_that_was_broken_off_comes_back(q8, tmp_path, monkeypatch):
    path, masks = q8
    before, overwrite = sha256(path), patching._overwrite

    def half(path, places, new):
        overwrite(path, places[: len(places) // 2], new)
        raise OSError("the disk is gone")

    monkeypatch.setattr(patching, "_overwrite", half)
    with pytest.raises(OSError, match="the disk is gone"):
        patch_gguf_in_place(path, masks)
    monkeypatch.setattr(patching, "_overwrite", overwrite)
    assert sha256(path) != before
    undo_gguf_patch_in_place(path)
    assert sha256(path) == before


def test_a_widened_file_is_not_restored_in_place(model, tmp_path):
    path = write_gguf(model, tmp_path / "model.gguf", "Q4_1")
    masks, _ = mask_of(path, tmp_path / "masks")
    out = patch_gguf(path, masks, tmp_path / "out.gguf", widen="f32").path
    content = sha256(out)
    with pytest.raises(ValueError, match="got a widened file: name a new file for the original"):
        undo_gguf_patch_in_place(out)
    assert sha256(out) == content


class TestTheBase:
    """Whether the file holds the weights that the masks were learned on."""

    def test_masks_of_a_model_in_16_bits_know_a_file_of_equal_weights(self, model, tmp_path):
        path = write_gguf(model, tmp_path / "model.gguf", "Q8_0")
        masks = save_masks(mask_model(read_gguf(path).bfloat16(), MaskConfig(keep_ratio=0.9)), tmp_path / "masks")
        assert "is the base of the masks: its weights have their hash" in patch_gguf(path, masks, tmp_path / "o").base

    def test_a_quantisation_of_ones_own_is_held_against_the_base(self, model, tmp_path):
        path = write_gguf(model, tmp_path / "model.gguf", "Q4_0")
        masks = save_masks(mask_model(make("llama"), MaskConfig(keep_ratio=0.9)), tmp_path / "masks")
        words = patch_gguf(path, masks, tmp_path / "out.gguf", load_base=lambda: model).base
        assert "a quantisation of the base of the masks: shapes agree, and the correlation of weights is 0.99" in words

    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_a_model_in_floats_whose_weights_differ_is_no_quantisation(self, kind, model, tmp_path):
        tuned = make("llama")
        with torch.no_grad():
            tuned.model.layers[1].mlp.up_proj.weight[:8].mul_(1.1)
        masks = save_masks(mask_model(make("llama"), MaskConfig(keep_ratio=0.9)), tmp_path / "masks")
        path = write_gguf(tuned, tmp_path / "model.gguf", kind)
        words = patch_gguf(path, masks, tmp_path / "out.gguf", load_base=lambda: model).base
        assert words.startswith(f"warning: {path} holds other weights than the base of the masks, in {kind}: ")
        assert "it is no quantisation, and may be another model, such as a fine-tune or a merged model" in words
        assert "correlation of weights is 0.99" in words
        assert "(lowest in model.layers.1.mlp.up_proj)" in words

    @pytest.mark.parametrize("kind", ["F16", "BF16"])
    def test_the_base_rounded_to_16_bits_is_known_as_that(self, kind, model, tmp_path):
        masks = save_masks(mask_model(make("llama"), MaskConfig(keep_ratio=0.9)), tmp_path / "masks")
        path = write_gguf(model, tmp_path / "model.gguf", kind)
        words = patch_gguf(path, masks, tmp_path / "out.gguf", load_base=lambda: model).base
        assert words == f"{path} is the base of the masks, rounded to {kind}"

    def test_rows_in_another_order_are_refused(self, model, tmp_path):
        """In a Llama's file with q and k in the wrong order, the correlation is that of unrelated weights."""
        path = write_gguf(model, tmp_path / "model.gguf", "Q8_0")
        content = bytearray(path.read_bytes())
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight")
        start, row = tensor.data_offset, tensor.n_bytes // 256
        for half in range(0, 256, 2):
            place = start + half * row
            content[place : place + 2 * row] = content[place + row : place + 2 * row] + content[place : place + row]
        path.write_bytes(content)
        masks = save_masks(mask_model(make("llama"), MaskConfig(keep_ratio=0.9)), tmp_path / "masks")
        with pytest.raises(ValueError, match="weights of model.layers.0.self_attn.q_proj whose correlation"):
            patch_gguf(path, masks, tmp_path / "out.gguf", load_base=lambda: model)


class TestNothingIsLost:
    """Whatever fails, the files are unchanged."""

    def test_a_file_that_is_there_is_not_replaced(self, q8, tmp_path):
        path, masks = q8
        for output in (path, tmp_path / "mine.txt"):
            output.touch()
            before = sha256(output)
            with pytest.raises(ValueError, match=r"output must be a new file, got .*, which exists: name another one"):
                patch_gguf(path, masks, output)
            assert sha256(output) == before

    def test_an_undo_file_whose_patched_file_was_moved_is_not_replaced(self, q8, tmp_path):
        path, masks = q8
        patch_gguf(path, masks, tmp_path / "out.gguf")
        (tmp_path / "out.gguf").rename(tmp_path / "moved.gguf")
        with pytest.raises(
            ValueError, match=r"out.gguf.undo must not exist, got an undo file without the patched file: delete it if a"
        ):
            patch_gguf(path, masks, tmp_path / "out.gguf")
        (tmp_path / "out.gguf.undo").rename(tmp_path / "moved.gguf.undo")
        undo_gguf_patch(tmp_path / "moved.gguf", tmp_path / "back.gguf")
        assert sha256(tmp_path / "back.gguf") == sha256(path)

    def test_what_a_killed_patch_left_is_cleared_away(self, q8, tmp_path):
        path, masks = q8
        (tmp_path / "out.gguf.undo").touch()
        (tmp_path / ".out.gguf.abcdefgh.tmp").write_bytes(b"half")
        patch_gguf(path, masks, tmp_path / "out.gguf")
        assert names_in(tmp_path) == ["masks", "model.gguf", "out.gguf", "out.gguf.undo"]

    @pytest.mark.parametrize("left", range(3))
    def test_a_disk_that_is_full_at_a_sync_leaves_nothing(self, q8, tmp_path, monkeypatch, left):
        """The syncs are those of the undo file, of the patched file, and of their directory. left: those that work."""
        path, masks = q8
        done, sync = [], os.fsync

        def fsync(descriptor):
            done.append(descriptor)
            if len(done) > left:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"out.gguf(.undo)? could not be written \(No space left on device\)"):
            patch_gguf(path, masks, tmp_path / "out.gguf")
        assert len(done) == left + 1
        assert names_in(tmp_path) == ["masks", "model.gguf"]
        monkeypatch.setattr(os, "fsync", sync)
        patch_gguf(path, masks, tmp_path / "out.gguf")

    def test_a_directory_that_is_not_there_is_named(self, q8, tmp_path):
        path, masks = q8
        with pytest.raises(OSError, match=r"nowhere/out.gguf.undo could not be opened \(No such file or directory\)"):
            patch_gguf(path, masks, tmp_path / "nowhere" / "out.gguf")

    @pytest.mark.parametrize("held", [".undo", ""])
    def test_two_patches_at_once_are_one(self, held, q8, tmp_path):
        path, masks = q8
        busy = tmp_path / "out.gguf.undo" if held else path
        with busy.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(
                RuntimeError, match=r"must be free, got one that another mft patch works on: wait for it"
            ):
                patch_gguf(path, masks, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()

    def test_a_file_that_is_read_is_not_patched_in_place(self, q8):
        path, masks = q8
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            with pytest.raises(RuntimeError, match="must be free"):
                patch_gguf_in_place(path, masks)

    def test_a_changed_file_is_not_restored(self, q8, tmp_path):
        path, masks = q8
        out = patch_gguf(path, masks, tmp_path / "out.gguf").path
        content = bytearray(out.read_bytes())
        content[-5] ^= 1
        out.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"out.gguf must be the patched file, from which the undo file restores SHA-256 .* changed since",
        ):
            undo_gguf_patch(out, tmp_path / "back.gguf")
        with pytest.raises(ValueError, match="must be the patched file"):
            undo_gguf_patch_in_place(out)
        assert out.read_bytes() == content
        assert not (tmp_path / "back.gguf").exists()


def test_a_file_whose_padding_is_not_0_comes_back_to_the_bit(model, tmp_path):
    path = write_gguf(model, tmp_path / "model.gguf", "Q4_1")
    content = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    path.write_bytes(content[:end] + b"\xff" * (len(content) - end) + b"and more")
    masks, _ = mask_of(path, tmp_path / "masks", target_modules=["down_proj"])
    out = patch_gguf(path, masks, tmp_path / "out.gguf", widen="f32").path
    undo_gguf_patch(out, tmp_path / "back.gguf")
    assert sha256(tmp_path / "back.gguf") == sha256(path)
