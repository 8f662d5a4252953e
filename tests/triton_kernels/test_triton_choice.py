"""Fused or through scratch memory: chosen by the model of the card, or measured once; never by chance."""

import itertools
import json

import pytest
import torch

from mft_kernels.backends.triton import choice, target
from mft_kernels.backends.triton.choice import FUSED, SCRATCH, Product


def product(m, **changes):
    sizes = {"n": 4096, "k": 4096, "transposed": False, "dtype": "torch.bfloat16", "mask": "packed", "exact": False}
    return Product(m, **(sizes | changes))


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Set MFT_AUTOTUNE=1 and a fake clock; return the list of token numbers that were timed."""
    monkeypatch.setenv("MFT_AUTOTUNE", "1")
    timed = []
    monkeypatch.setenv("MFT_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_time", lambda run: run())
    # A CPU build of torch cannot answer these.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    choice._choices.cache_clear()
    yield timed
    choice._choices.cache_clear()


def stored(folder):
    (file,) = (folder / "kernels").iterdir()
    return list(json.loads(file.read_text())["choices"].values())


def candidates(timed, fused, scratch):
    def clock(milliseconds):
        return lambda tokens: timed.append(tokens) or milliseconds

    return {FUSED: clock(fused), SCRATCH: clock(scratch)}


def choose(m, timed, fused, scratch, **changes):
    return choice.automatic(product(m, **changes), target.H100, candidates(timed, fused, scratch))


#: N and K of layers of models with 1 to 8 billion parameters.
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336))
CARDS = (target.A100, target.H100, target.H100_OLD_TRITON, target.B200, target.RTX_4090, target.RTX_5090, target.MI300X)
MASKS = ("packed", "torch.bfloat16", "torch.float32")


def most_fused(card, mask, **changes):
    """Return the largest power of two of tokens that does not go through scratch memory."""
    powers = (2**i for i in range(16))
    return max(m for m in powers if choice.by_model(product(m, mask=mask, **changes), card) != SCRATCH)


def test_few_tokens_are_fused_and_many_go_through_scratch_on_every_card():
    for card, mask, (n, k), transposed in itertools.product(CARDS, MASKS, SHAPES, (False, True)):
        sizes = {"mask": mask, "n": n, "k": k, "transposed": transposed}
        assert {choice.by_model(product(m, **sizes), card) for m in (1, 16, 64)} == {FUSED}, (card, sizes)
        assert choice.by_model(product(16384, **sizes), card) == SCRATCH, (card, sizes)


def test_how_many_tokens_are_fused_hangs_on_the_card_and_on_the_bytes_of_the_mask():
    """Faster tensor cores favour the pass from fewer tokens on.

    Mask bytes slow the fused product and the pass. Hopper's L2 cannot bring scores to every tile as fast as its tensor
    cores multiply.
    """
    found = {card: tuple(most_fused(card, mask) for mask in MASKS) for card in CARDS}
    assert found == {
        target.A100: (512, 512, 256),
        target.H100: (1024, 512, 512),
        target.H100_OLD_TRITON: (512, 512, 256),
        target.B200: (256, 256, 256),
        target.RTX_4090: (512, 512, 1024),
        target.RTX_5090: (512, 512, 512),
        target.MI300X: (1024, 1024, 512),
    }


def test_fp32_in_full_precision_and_rows_that_are_not_aligned_are_fused_up_to_64_tokens():
    for slow in ({"exact": True}, {"aligned": False}):
        assert choice.by_model(product(64, **slow), target.H100) == FUSED
        assert choice.by_model(product(65, **slow), target.H100) == SCRATCH


def test_nothing_is_measured_unless_asked_for(monkeypatch):
    monkeypatch.delenv("MFT_AUTOTUNE", raising=False)
    timed = []
    assert choose(16, timed, fused=9.0, scratch=1.0) == FUSED
    assert timed == []


def test_a_measured_winner_overrules_the_model_and_is_remembered(measuring, tmp_path):
    assert choose(100, measuring, fused=2.0, scratch=1.0) == SCRATCH
    assert measuring == [128, 128]  # the size of the bucket, not of the first batch
    assert choose(128, measuring, fused=1.0, scratch=9.0) == SCRATCH
    assert choose(65, measuring, fused=1.0, scratch=9.0) == SCRATCH
    assert len(measuring) == 2
    choice._choices.cache_clear()  # as in another process
    assert choose(100, measuring, fused=1.0, scratch=9.0) == SCRATCH
    assert len(measuring) == 2
    assert stored(tmp_path) == [SCRATCH]


def test_a_lead_within_the_noise_does_not_overrule_the_model(measuring):
    assert choose(100, measuring, fused=1.02, scratch=1.0) == FUSED
    assert choose(16384, measuring, fused=1.0, scratch=1.02) == SCRATCH


def test_each_dtype_mask_and_direction_is_measured_on_its_own(measuring):
    for changes in ({}, {"dtype": "torch.float16"}, {"mask": "torch.float32"}, {"transposed": True}, {"n": 1024}):
        choose(64, measuring, 1.0, 2.0, **changes)
    assert len(measuring) == 10


def test_deterministic_algorithms_pin_the_model(measuring):
    assert choose(100, measuring, fused=2.0, scratch=1.0) == SCRATCH
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(100, measuring, fused=2.0, scratch=1.0) == FUSED
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_measured_while_a_graph_is_captured(measuring, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(100, measuring, fused=2.0, scratch=1.0) == FUSED
    assert measuring == []
