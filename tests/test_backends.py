"""The table: explicit requests never fall back, and the report says why."""

import logging

import pytest
import torch

import mft_kernels
from mft_kernels import backends
from mft_kernels.testing import integer_inputs


def test_an_explicit_request_that_cannot_be_served_raises_with_the_reason():
    t = integer_inputs(2, 3, 4)
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve masked_linear: .*; use 'auto'"):
        mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0), backend="triton")


def test_the_environment_variable_chooses_and_is_named_in_errors(monkeypatch):
    t = integer_inputs(2, 3, 4)
    monkeypatch.setenv("MFT_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="MFT_KERNELS='cuda' cannot serve"):
        mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0))
    monkeypatch.setenv("MFT_KERNELS", "fast")
    with pytest.raises(ValueError, match="MFT_KERNELS must be one of .*got 'fast'"):
        mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0))
    monkeypatch.setenv("MFT_KERNELS", "reference")
    assert mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0)).shape == (2, 3)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        backends.register(backends.Backend("reference", frozenset(), frozenset(), {}))


def test_a_backend_says_why_it_refuses():
    backend = backends.Backend("cpu", frozenset({"cpu"}), frozenset({torch.float32}), {"masked_linear": print})
    cpu, floats = torch.device("cpu"), (torch.float32,)
    assert backend.refusal("masked_linear", cpu, floats) is None
    assert backend.refusal("pack_mask", cpu, floats) == "it has no pack_mask"
    assert "runs on cpu, got a tensor on meta" in backend.refusal("masked_linear", torch.device("meta"), floats)
    assert "takes float32, got float64" in backend.refusal("masked_linear", cpu, (torch.float64,))


def test_the_report_names_every_backend_and_what_auto_chooses():
    report = mft_kernels.backend_report()
    assert list(report["backends"]) == list(backends.PREFERENCE)
    for row in report["backends"].values():
        assert row["available"] == (row["reason"] is None)
    assert report["backends"]["reference"]["available"]
    assert report["backends"][report["auto"]["cpu"]]["available"]


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.delenv("MFT_KERNELS", raising=False)
    with caplog.at_level(logging.INFO, logger="mft_kernels"):
        for _ in range(2):
            mft_kernels.kept_threshold(torch.ones(2, 2), 0.5)
    assert len([r for r in caplog.records if "kept_threshold on cpu" in r.message]) == 1


def test_auto_takes_a_backends_own_choice_and_a_request_its_plain_function(monkeypatch):
    def plain():
        pass

    def chosen():
        pass

    backend = backends.Backend("cpu", frozenset(), frozenset(), {"op": plain, "other": plain}, automatic={"op": chosen})
    monkeypatch.setattr(backends, "_TABLE", {"cpu": backend})
    cpu, floats = torch.device("cpu"), (torch.float32,)
    assert backends.choose("op", cpu, floats) is chosen
    assert backends.choose("other", cpu, floats) is plain
    assert backends.choose("op", cpu, floats, "cpu") is plain


def test_auto_passes_over_a_backend_for_tests_and_a_request_does_not(monkeypatch):
    slow = backends.Backend("triton", frozenset(), frozenset(), {"op": print}, on_request="for tests")
    fast = backends.Backend("cpu", frozenset(), frozenset(), {"op": repr})
    monkeypatch.setattr(backends, "_TABLE", {"triton": slow, "cpu": fast})
    monkeypatch.setattr(backends, "_announced", set())
    cpu, floats = torch.device("cpu"), (torch.float32,)
    assert backends.choose("op", cpu, floats) is repr
    assert backends.choose("op", cpu, floats, "triton") is print
