"""Fused or through scratch: by a table, or measured once; never by chance."""

import json
import logging

import pytest
import torch

from mft_kernels.triton import choice, target
from mft_kernels.triton.choice import FUSED, SCRATCH, Product


def product(m, **changes):
    sizes = {"n": 4096, "k": 4096, "transposed": False, "dtype": "torch.bfloat16", "mask": "packed", "exact": False}
    return Product(m, **(sizes | changes))


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """MFT_AUTOTUNE=1 with a clock that says what a test wants; the list of the tokens that were timed."""
    monkeypatch.setenv("MFT_AUTOTUNE", "1")
    timed = []
    monkeypatch.setenv("MFT_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_time", lambda run: run())
    # A CPU build of torch cannot tell either.
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


def test_the_table_takes_the_fused_kernel_for_few_tokens_and_scratch_for_many():
    for card in (target.A100, target.H100, target.H100_OLD_TRITON, target.B200, target.MI300X):
        assert choice.by_table(product(1), card) == FUSED
        assert choice.by_table(product(1024), card) == FUSED
        assert choice.by_table(product(16384), card) == SCRATCH
    assert choice.by_table(product(4096), target.H100) == FUSED
    assert choice.by_table(product(4096), target.H100_OLD_TRITON) == SCRATCH
    for slow in ({"exact": True}, {"aligned": False}):
        assert choice.by_table(product(64, **slow), target.H100) == FUSED
        assert choice.by_table(product(1024, **slow), target.H100) == SCRATCH


def test_nothing_is_measured_unless_asked_for(monkeypatch):
    monkeypatch.delenv("MFT_AUTOTUNE", raising=False)
    timed = []
    assert choose(16, timed, fused=9.0, scratch=1.0) == FUSED
    assert timed == []


def test_the_choice_is_said_once_for_each_layer(monkeypatch, caplog):
    monkeypatch.delenv("MFT_AUTOTUNE", raising=False)
    choice._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="mft_kernels"):
        for m in (16, 17, 16384, 16385):
            choose(m, [], fused=1.0, scratch=1.0)
    assert [r.getMessage() for r in caplog.records] == [
        "forward of 4096 x 4096 on sm_90: fused, by the table for its number of tokens",
        "forward of 4096 x 4096 on sm_90: scratch, by the table for its number of tokens",
    ]


def test_a_measured_winner_overrules_the_table_and_is_remembered(measuring, tmp_path):
    assert choose(100, measuring, fused=2.0, scratch=1.0) == SCRATCH
    assert measuring == [128, 128]  # the bucket's own size, not that of the batch that came first
    assert choose(128, measuring, fused=1.0, scratch=9.0) == SCRATCH
    assert choose(65, measuring, fused=1.0, scratch=9.0) == SCRATCH
    assert len(measuring) == 2
    choice._choices.cache_clear()  # another process
    assert choose(100, measuring, fused=1.0, scratch=9.0) == SCRATCH
    assert len(measuring) == 2
    assert stored(tmp_path) == [SCRATCH]


def test_a_lead_within_the_noise_does_not_overrule_the_table(measuring):
    assert choose(100, measuring, fused=1.02, scratch=1.0) == FUSED
    assert choose(16384, measuring, fused=1.0, scratch=1.02) == SCRATCH


def test_each_dtype_mask_and_direction_is_measured_on_its_own(measuring):
    for changes in ({}, {"dtype": "torch.float16"}, {"mask": "torch.float32"}, {"transposed": True}, {"n": 1024}):
        choose(64, measuring, 1.0, 2.0, **changes)
    assert len(measuring) == 10


def test_deterministic_algorithms_pin_the_table(measuring):
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


def test_a_file_of_choices_that_there_are_not_is_measured_anew(measuring, tmp_path, caplog):
    choose(100, measuring, fused=1.0, scratch=2.0)
    (file,) = (tmp_path / "kernels").iterdir()
    file.write_text(file.read_text().replace(f'"{FUSED}"', '"both"'))
    choice._choices.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mft_kernels"):
        assert choose(100, measuring, fused=2.0, scratch=1.0) == SCRATCH
    assert "made anew" in caplog.text
    assert stored(tmp_path) == [SCRATCH]


def test_the_file_belongs_to_device_versions_and_kernels(monkeypatch):
    made_for = []
    for device in ("NVIDIA H100", "NVIDIA A100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        made_for.append(choice._made_for())
    assert made_for[0] != made_for[1]
    assert set(made_for[0]) == {"device", "torch", "triton", "kernels"}
