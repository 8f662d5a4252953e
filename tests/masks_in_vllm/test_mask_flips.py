"""Only the bits that flip are sent between two masks."""

import json

import numpy as np
import pytest
import torch

from mft.vllm.mask_flips import Flips, dropped_places, flipped_places, flips_between, read_flips
from mft_kernels import pack_mask


def mask(rows, columns, share, seed=0):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return pack_mask(scores, torch.tensor(share)), scores.abs() < share


@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (5, 33), (64, 100)])
def test_places_are_those_that_the_mask_drops(shape):
    packed, dropped = mask(*shape, 0.3)
    assert dropped_places(packed, shape).tolist() == dropped.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", [(3, 32), (5, 33), (64, 100)])
def test_flips_are_the_places_where_two_masks_differ(shape):
    (before, dropped), (after, dropped_then) = mask(*shape, 0.3), mask(*shape, 0.3, seed=1)
    stream = flips_between({"a": before}, {"a": after}, {"a": shape})["a"]
    assert (
        flipped_places("a", stream, shape).tolist() == (dropped ^ dropped_then).flatten().nonzero().flatten().tolist()
    )


def test_a_layer_that_does_not_change_sends_nothing_and_an_unknown_one_kept_everything():
    (same, _), (new, dropped) = mask(8, 40, 0.2), mask(8, 40, 0.2, seed=1)
    streams = flips_between({"same": same}, {"same": same, "new": new}, {"same": (8, 40), "new": (8, 40)})
    assert list(streams) == ["new"]
    assert len(flipped_places("new", streams["new"], (8, 40))) == dropped.sum()


def test_few_flips_take_few_bytes():
    packed, _ = mask(512, 512, 0.1)
    changed = packed.clone()
    changed[::8, 3] ^= 1  # 64 of 262,144 bits
    stream = flips_between({"a": packed}, {"a": changed}, {"a": (512, 512)})["a"]
    assert len(stream) < 160


@pytest.mark.parametrize("text", [False, True])
def test_a_message_gives_the_flips_again(text):
    flips = Flips(0, 3, {"a": b"\x01\xff"}, {"a": (2, 3)}, {"a": "bfloat16"}, "sha256:0")
    message = flips.message(text=text)
    assert read_flips(json.loads(json.dumps(message)) if text else message) == flips
    later = Flips(1, 3, {"a": b"\x01\xff"})
    assert read_flips(later.message(text=text)) == later
    assert "shapes" not in later.message(text=text)


@pytest.mark.parametrize("message", [None, [], {}, {"step": 0, "dropped": 1, "streams": {"a": "*"}}, {"step": "x"}])
def test_another_message_is_refused(message):
    with pytest.raises(ValueError, match="flips must be what mft.vllm.MaskStream sends"):
        read_flips(message)


def test_a_damaged_stream_is_refused_with_its_layer():
    stream = flips_between({}, {"a": mask(5, 33, 0.3)[0]}, {"a": (5, 33)})["a"]
    padded = np.zeros((5, 2), np.uint32)
    padded[[0, 4], 1] = 1 << 7  # column 39 of 33
    for damaged in (stream + b"\xff", b"\x40\0\0\0\0" + padded.tobytes()):
        with pytest.raises(ValueError, match=r"^a: its flips must be a stream for a weight of \(5, 33\)"):
            flipped_places("a", damaged, (5, 33))
    assert flipped_places("a", stream, (5, 33)).dtype == np.int32
