"""One process at a time in a run directory."""

import fcntl
import json
import os
import threading
import time

import pytest

from mft.training.run_lock import LOCK, hold


def test_a_second_holder_is_told_who_the_first_is(tmp_path):
    with hold(tmp_path / "run"):
        refused = pytest.raises(RuntimeError, match=rf"run is in use by process {os.getpid()} on \S+: wait for it")
        with refused, hold(tmp_path / "run"):
            pass
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()
    with hold(tmp_path / "run"):
        pass


def test_who_shares_a_lock_is_told_from_who_works_alone(tmp_path):
    with hold(tmp_path, shared=True), hold(tmp_path, shared=True):
        refused = pytest.raises(RuntimeError, match=rf"by process {os.getpid()} on \S+, one of several: pass --join")
        with refused, hold(tmp_path):
            pass
        with hold(tmp_path, shared=True):
            pass
    with hold(tmp_path):
        refused = pytest.raises(RuntimeError, match=r", which works alone: wait for it, or stop it and pass --join to")
        with refused, hold(tmp_path, shared=True):
            pass


def test_a_lock_with_words_of_another_program_is_shown_as_it_is(tmp_path):
    with hold(tmp_path):
        (tmp_path / LOCK).write_text("[1]")
        with pytest.raises(RuntimeError, match=r"is in use by \[1\]: wait for it"), hold(tmp_path):
            pass


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_left_alone(tmp_path, exists):
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(victim)
    refused = pytest.raises(OSError, match=r"run/\.lock must be a file of mft's own, got a symbolic link: remove it")
    with refused, hold(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious" if exists else not victim.exists()


def test_never_two_at_once(tmp_path):
    """Although each release removes the file."""
    inside, most, turns = [], [], []
    give_up = time.monotonic() + 60  # on a busy machine most attempts find the lock taken

    def work():
        while len(turns) < 200 and time.monotonic() < give_up:
            try:
                with hold(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    turns.append(1)
            except RuntimeError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(turns) >= 200


def test_one_that_shares_waits_for_another_that_leaves(tmp_path):
    """To remove the file, the one that leaves holds the lock alone for a moment."""
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open() as leaving:
        fcntl.flock(leaving, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, fcntl.flock, (leaving, fcntl.LOCK_UN))
        timer.start()
        with hold(tmp_path, shared=True):
            pass
        timer.join()
