"""A choice measured once is remembered by the process and in a file, which neither damage nor others can spoil."""

import json
import logging

import pytest
import torch

from mft_kernels.backends.autotune import Choices, measuring

KEY, OTHER = {"m": 8, "n": 24}, {"m": 16, "n": 24}
MADE_FOR = {"device": "a card", "torch": "2.13"}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def choices(made_for=MADE_FOR):
    """Return the choices as another process finds them."""
    return Choices(made_for, lambda facts, choice: "m" in facts and choice in ("fused", "slabs"))


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_measuring_is_asked_for_by_name(monkeypatch, value, expected):
    monkeypatch.delenv("MFT_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("MFT_AUTOTUNE", value)
    assert measuring() == expected


def test_deterministic_algorithms_measure_nothing(monkeypatch):
    monkeypatch.setenv("MFT_AUTOTUNE", "1")
    torch.use_deterministic_algorithms(True)
    try:
        assert not measuring()
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_added_is_known_to_this_process_and_the_next():
    found = choices()
    assert found.get(KEY) is None
    found.add(KEY, "slabs")
    assert found.get(KEY) == "slabs"
    assert choices().get(dict(reversed(KEY.items()))) == "slabs"
    assert choices().get(OTHER) is None


def test_what_another_process_has_stored_meanwhile_stays(folder):
    ours, theirs = choices(), choices()
    theirs.add(KEY, "fused")
    ours.add(OTHER, "slabs")
    assert (choices().get(KEY), choices().get(OTHER)) == ("fused", "slabs")
    assert [path.suffix for path in folder.iterdir()] == [".json"]


DAMAGED = [
    *("{", "[1, 2]", "{}", '{"made_for": {}, "choices": {}}', "\x80", "[" * 100_000),
    json.dumps({"made_for": MADE_FOR, "choices": {"[" * 100_000: "fused"}}),
    json.dumps({"made_for": MADE_FOR}),
    *(json.dumps({"made_for": MADE_FOR, "choices": found}) for found in ([], {"m": "fused"}, {"[1]": "fused"})),
    *(json.dumps({"made_for": MADE_FOR, "choices": {json.dumps(KEY): found}}) for found in ("both", 7, None)),
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_or_foreign_file_is_said_once_and_measured_anew(caplog, content):
    choices().add(KEY, "slabs")
    choices().file.write_bytes(content.encode("latin-1"))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mft_kernels"):
        found = choices()
        assert found.get(KEY) is None
        found.add(OTHER, "fused")
    assert [record.getMessage().split(" is ignored")[0] for record in caplog.records] == [str(found.file)]
    assert choices().get(OTHER) == "fused"


def test_a_folder_that_cannot_be_written_is_said_once(folder, caplog):
    folder.write_text("a file stands where the folder would be")
    with caplog.at_level(logging.WARNING, logger="mft_kernels"):
        found = choices()
        caplog.clear()
        found.add(KEY, "slabs")
        found.add(OTHER, "fused")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"cannot keep measurements in {folder}"]
    assert (found.get(KEY), found.get(OTHER)) == ("slabs", "fused")


def test_a_write_that_fails_leaves_the_file_as_it_was(folder, monkeypatch, caplog):
    found = choices()
    found.add(KEY, "slabs")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mft_kernels.backends.autotune.os.fsync", full)
    found.add(OTHER, "fused")
    assert "No space left" in caplog.text
    assert choices().get(KEY) == "slabs"
    assert [path.suffix for path in folder.iterdir()] == [".json"]
