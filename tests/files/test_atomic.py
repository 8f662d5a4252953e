"""Files and directories appear whole or not at all, and what remains of those that did not."""

import os

import pytest

from mft.files.atomic import NotWritten, atomic_directory, atomic_file, convert_disk_errors, remove, sweep, write_whole


def test_a_file_that_holds_it_already_is_not_touched(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "one")
    before = path.stat()
    write_whole(path, b"one")
    assert os.path.samestat(path.stat(), before)
    write_whole(path, "two")
    assert not os.path.samestat(path.stat(), before)
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("whole", [atomic_file, atomic_directory])
def test_a_failure_is_named_by_the_target_whose_old_content_stays(tmp_path, whole):
    write_whole(tmp_path / "file", "old")
    with (
        pytest.raises(NotWritten, match="new could not be written .No space left on device.: see that"),
        convert_disk_errors("new"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(NotWritten, match="/file could not be written"), whole(tmp_path / "file") as scratch:
        (scratch / "a" / "b").write_text("")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "file"):
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_sweep_deletes_scratch_of_ours_alone_and_brings_back_what_was_being_replaced(tmp_path):
    for name in (".a.12345678.tmp", ".b.12345678.tmp", ".c.12345678.tmp", ".c.12345678.old", ".a.tmp", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".a.abcdefgh.old").write_text("")
    sweep(tmp_path, {"a", "c"}.__contains__)
    assert sorted(os.listdir(tmp_path)) == [".a.tmp", ".b.12345678.tmp", "a", "b", "c"]
    assert (tmp_path / "c" / "file").read_text() == ".c.12345678.old"


def test_removed_means_files_links_and_whole_directories(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "directory" / "in it").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").write_text("")
    for name in ("directory", "link", "file"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]
