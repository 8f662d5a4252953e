"""Checkpoints on disk: whatever happens to the writer or files, the last complete one loads, or an error says why."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny import equal

from mft.training.checkpoint import (
    FACTS,
    MANIFEST,
    TENSORS,
    BadCheckpoint,
    newest_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)

KILLS = int(os.environ.get("MFT_KILLS", "50"))


def tensors_of(step):
    """Return tensors that only this step has."""
    generator = torch.Generator().manual_seed(step)
    return {
        "scores": torch.randn(40, 70, generator=generator),
        "codes": torch.randint(-9, 9, (300,), generator=generator).to(torch.int16),
        "empty": torch.empty(0, 3),
    }


def assert_holds(checkpoint, step):
    assert checkpoint.facts() == {"step squared": step**2}
    assert equal(checkpoint.tensors(), tensors_of(step))


def write(root, step):
    return write_checkpoint(root, step, tensors_of(step), {"step squared": step**2})


def test_the_newest_is_kept_and_holds_what_was_given(tmp_path):
    root = tmp_path / "new" / "checkpoints"
    assert newest_checkpoint(root) == (None, [])
    for step in (9, 10, 100):
        assert_holds(write(root, step), step)
        assert os.listdir(root) == [f"step-{step:08d}"]
    found, _ = newest_checkpoint(root)
    assert found.step == 100
    modes = {path.stat().st_mode & 0o777 for path in found.path.iterdir()}
    assert len(modes) == 1, "the files are open to the same readers"


def save_on_and_on(root, first):
    for step in range(first, first + 10**6):
        write(root, step)


@pytest.mark.slow
def test_a_writer_killed_at_any_point_leaves_a_checkpoint_that_loads(tmp_path):
    """MFT_KILLS=1000 kills more often."""
    began = time.monotonic()
    chance, written = random.Random(0), write(tmp_path, 1).step
    longest = max(0.06, 20 * (time.monotonic() - began))  # busy or not: most are killed while they write
    survived = 0
    for _ in range(KILLS):
        writer = multiprocessing.get_context("fork").Process(target=save_on_and_on, args=(tmp_path, written + 1))
        writer.start()
        time.sleep(chance.uniform(0.0, longest))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found, skipped = newest_checkpoint(tmp_path)
        assert skipped == []  # only complete checkpoints have their final name
        assert_holds(found, found.step)
        assert found.step >= written
        survived += found.step > written
        written = found.step
    assert survived >= KILLS // 4, "killed before anything was written: the test says little"
    write(tmp_path, written + 1)
    assert os.listdir(tmp_path) == [f"step-{written + 1:08d}"], "what killed writers left is cleared away"
    print(f"{KILLS} writers killed, {written} checkpoints written")


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002 could not be written \(.*too large.*\): see that"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert_holds(newest_checkpoint(tmp_path)[0], 1)


def test_a_directory_that_cannot_be_written_is_named():
    with pytest.raises(OSError, match="/proc/checkpoints"):
        write(Path("/proc/checkpoints"), 1)


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-2])  # a manifest is valid without its last newline
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "grown":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "grown", "flipped"])
@pytest.mark.parametrize("name", [TENSORS, FACTS, MANIFEST])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, name, how):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    (tmp_path / "b" / "step-00000002").rename(tmp_path / "a" / "step-00000002")
    damage(tmp_path / "a" / "step-00000002" / name, how)
    found, skipped = newest_checkpoint(tmp_path / "a")
    assert_holds(found, 1)
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]
    assert "expected" in skipped[0]
    assert "got" in skipped[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": True}, "expected format_version 1, got True"),
        ({"step": 8}, "expected step 7, got 8"),
        ({"files": {"../x": {}}}, r"expected files \['state.json', 'state.safetensors'\], got \['../x'\]"),
        ({"files": 3}, "expected files .* got 3"),
        ({"more": 1}, r"expected keys .*, got \['files', 'format_version', 'more', 'step'\]"),
    ],
)
def test_a_manifest_from_elsewhere_is_refused(tmp_path, changes, message):
    path = write(tmp_path, 7).path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadCheckpoint, match=message):
        verify_checkpoint(path.parent)


def test_a_foreign_file_and_a_huge_manifest_are_refused(tmp_path):
    path = write(tmp_path, 7).path
    (path / "more").write_text("")
    with pytest.raises(BadCheckpoint, match="got .*'more'"):
        verify_checkpoint(path)
    (path / MANIFEST).write_text(" " * 10**6)
    with pytest.raises(BadCheckpoint, match="expected at most 65536 bytes, got 1000000"):
        verify_checkpoint(path)
