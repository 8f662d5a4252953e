"""FILE.undo: what it contains, and the errors for damaged or hostile ones."""

import dataclasses
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from gguf_models import make, mask_of, write_gguf
from limits import damages

from mft.patching.patch import patch_gguf, undo_gguf_patch
from mft.patching.undo_file import Facts, Undo, read_undo, undo_path

TRIES = int(os.environ.get("MFT_FUZZ", "300"))
FACTS = Facts("0" * 64, "1" * 64, 1000, "sha256:x", 3)


def undo_of(places, size=1000):
    places = np.array(places, np.int64)
    facts = dataclasses.replace(FACTS, bytes_before=size)
    old = np.arange(len(places), dtype=np.uint8)
    return Undo(facts, np.array([[0, 0, size]]), np.empty(0, np.uint8), places, old)


@pytest.mark.parametrize(
    "places", [[], [0], [999], [0, 1, 2], [254, 508], [255], [0, 255], [509, 510, 766], [1, 2, 600, 999]]
)
def test_places_come_back_as_they_were(places, tmp_path):
    undo_path(tmp_path / "m").write_bytes(undo_of(places).to_bytes())
    found = read_undo(tmp_path / "m")
    assert found.places.tolist() == places
    assert found.old.tolist() == list(range(len(places)))
    assert found.is_in_order


def test_at_1_per_cent_a_changed_byte_takes_little_more_than_two():
    places = np.flatnonzero(np.random.default_rng(0).random(1 << 22) < 0.01)
    undo = dataclasses.replace(undo_of([], 1 << 22), places=places, old=np.zeros(len(places), np.uint8))
    assert 2 * len(places) < len(undo.to_bytes()) < 2.3 * len(places)


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Return a patched file with a tensor that was widened."""
    directory = tmp_path_factory.mktemp("patched")
    path = write_gguf(make("llama", num_hidden_layers=1), directory / "model.gguf", "Q4_1")
    masks, _ = mask_of(path, directory / "masks", target_modules=["k_proj"])
    return patch_gguf(path, masks, directory / "out.gguf", widen="f32").path


def test_a_damaged_undo_file_gives_the_original_or_one_error_that_names_it(patched, tmp_path):
    original = undo_gguf_patch(patched, tmp_path / "original.gguf").read_bytes()
    content = undo_path(patched).read_bytes()
    refused = 0
    try:
        header = 8 + int.from_bytes(content[:8], "little")
        for number, (_, damaged) in enumerate(damages(content, header, TRIES // 3)):
            undo_path(patched).write_bytes(damaged)
            target = tmp_path / f"{number}.gguf"
            try:
                assert undo_gguf_patch(patched, target).read_bytes() == original
            except ValueError as error:
                refused += 1
                told = str(error)
            else:
                continue
            assert patched.name in told
            assert not target.exists()
    finally:
        undo_path(patched).write_bytes(content)
    assert refused > TRIES // 5


def written(path, metadata=None, **tensors):
    """Write an undo file with other metadata and tensors."""
    content = {name: torch.zeros(0, dtype=torch.uint8) for name in ("moved", "gaps", "old")}
    content["segments"] = torch.tensor([[0, 0, 1000]])
    facts = dataclasses.asdict(FACTS) | (metadata or {})
    safe = safetensors.torch.save(content | tensors, {"mft": json.dumps(facts)})
    undo_path(path).write_bytes(safe)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"version": 2}, {}, "version must be 1, or upgrade mft, got 2"),
        ({"bytes_before": 1 << 63}, {}, "bytes_before must be a file's size, got 9223372036854775808"),
        ({"dropped": "3"}, {}, "dropped must be an int, got '3'"),
        ({"more": 1}, {}, "unknown key 'more'"),
        ({}, {"segments": torch.tensor([[0, 0, 999]])}, "segments must be of 1000 bytes together, got 999"),
        ({}, {"segments": torch.tensor([[1, 0, 1000]])}, r"segments must be pieces of .*, got \(1, 0, 1000\)"),
        ({}, {"segments": torch.tensor([[0, -1, 1000]])}, r"segments must be pieces of .*, got \(0, -1, 1000\)"),
        ({}, {"segments": torch.tensor([0, 0, 1000])}, r"segments must be of shape \(n, 3\), got \(3,\)"),
        ({}, {"segments": torch.zeros(1, 3)}, "its tensors must be"),
        ({}, {"gaps": torch.ones(3, dtype=torch.uint8)}, "gaps must be of 0 bytes, got 3"),
        ({}, {"more": torch.zeros(1)}, "its tensors must be"),
        (
            {"bytes_before": 4},
            {
                "segments": torch.tensor([[0, 0, 4]]),
                "gaps": torch.tensor([4], dtype=torch.uint8),
                "old": torch.zeros(1, dtype=torch.uint8),
            },
            "gaps must be within 4 bytes, got 4",
        ),
    ],
)
def test_an_undo_file_that_claims_what_cannot_be_is_told_so(metadata, tensors, message, tmp_path):
    written(tmp_path / "m", metadata, **tensors)
    with pytest.raises(ValueError, match=message) as caught:
        read_undo(tmp_path / "m")
    assert "m.undo" in str(caught.value)


def test_a_file_that_is_no_undo_file_is_told_so(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, undo_path(tmp_path / "m"))
    with pytest.raises(ValueError, match="its metadata must be an undo file's"):
        read_undo(tmp_path / "m")
