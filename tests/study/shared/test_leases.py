"""Leases on one directory: who holds which, when a holder counts as dead, and what is refused."""

import errno
import functools
import json
import multiprocessing
import os
import time

import pytest
from joiners import at_once, until

from mft_study.shared import leases as module
from mft_study.shared.leases import ALONE, FOLDER, JOINED, Leases, Pace, open_leases

PACE = Pace(beat=0.05, expiry=0.4, look=0.05)
KEPT = Pace(beat=60.0, expiry=0.4, look=0.05)  # for a holder that does not beat


@pytest.fixture
def entered(tmp_path):
    """Return a function that makes leases on one directory, each as if from another process."""
    made = []

    def enter(pace=PACE):
        made.append(Leases(tmp_path, pace=pace).__enter__())
        return made[-1]

    yield enter
    for one in made:
        one.__exit__()


@pytest.fixture
def foreign(monkeypatch):
    """Hide whether a process is alive, as if it ran on another machine."""
    monkeypatch.setattr(module, "_process", lambda process: ({}, ""))


def test_one_of_many_takes_a_name(entered):
    many = [entered() for _ in range(16)]
    taken = at_once([functools.partial(leases.take, "unit") for leases in many])
    assert taken.count(True) == 1
    many[taken.index(True)].release("unit")
    time.sleep(PACE.look)
    assert many[0].take("unit")


def test_a_holder_that_beats_is_never_taken_over(entered, foreign):
    one, other = entered(), entered()
    assert one.take("unit")
    end = time.monotonic() + 4 * PACE.expiry
    while time.monotonic() < end:
        assert not other.take("unit")
        time.sleep(0.02)


def test_a_holder_that_stopped_is_taken_over_and_learns_it(entered, foreign, tmp_path):
    one, other = entered(KEPT), entered()
    assert one.take("unit")
    assert one.holds("unit")
    assert until(lambda: other.take("unit"), "it is taken over", 10) >= KEPT.expiry
    assert (one.holds("unit"), other.holds("unit"), other.holds("another")) == (False, True, False)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"unit.1", "unit.2"}
    assert not one._beat(tmp_path / FOLDER / "unit.1")
    one.release("unit")  # it no longer holds the lease
    assert not entered().take("unit")
    other.release("unit")
    assert not list((tmp_path / FOLDER).glob("unit.*"))


def test_a_process_of_this_machine_that_was_killed_is_taken_over_at_once_and_leaves_nothing(tmp_path):
    def hold():
        leases = Leases(tmp_path, pace=KEPT).__enter__()
        leases.enter(joins=True)
        leases.take("unit")
        os.kill(os.getpid(), 9)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    process.join()
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    with Leases(tmp_path, pace=Pace(expiry=3600.0)) as leases:
        assert leases.take("unit")
    assert not (tmp_path / FOLDER).exists()


def test_no_clock_that_others_could_disagree_on_is_read(entered, foreign, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: pytest.fail("a wall clock was read"))
    one, other = entered(KEPT), entered()
    assert one.take("unit")
    for path in one._files():
        os.utime(path, (0, 0))  # in 1970: file times are not read either
    assert not other.take("unit")
    until(lambda: other.take("unit"), "it is taken over", 10)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe rubbish", b"[]\n", b'{"host": 1}\n', b"x" * 100_000, b"[" * 4000])
def test_a_lease_of_rubbish_is_told_and_expires(tmp_path, content):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "unit.1").write_bytes(content)
    said = []
    with Leases(tmp_path, said.append, PACE) as leases:
        until(lambda: leases.take("unit"), "it is taken over", 10)
    assert "leases/unit.1 must say who holds it, got b'" in said[0]
    assert "taken over from a process that the file does not name" in said[1]


def test_a_lease_that_another_machine_deletes_while_it_is_read_is_gone(tmp_path, monkeypatch):
    """NFS says so with ESTALE."""

    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "unit.1").touch()
    with Leases(tmp_path, pace=PACE) as leases, monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", stale)
        assert not leases.take("unit")


def test_the_folder_may_vanish_while_a_lease_is_created(tmp_path, monkeypatch):
    (tmp_path / FOLDER).mkdir()
    with Leases(tmp_path, pace=PACE) as leases, monkeypatch.context() as patch:
        real = os.mkdir

        def mkdir(path, *mode):
            try:
                real(path, *mode)
            finally:
                (tmp_path / FOLDER).rmdir()
                patch.undo()

        patch.setattr(os, "mkdir", mkdir)
        assert leases.take("unit")


def test_a_directory_in_place_of_a_lease_is_named(tmp_path):
    (tmp_path / FOLDER / "unit.1").mkdir(parents=True)
    with (
        Leases(tmp_path, pace=PACE) as leases,
        pytest.raises(OSError, match=r"unit\.1 must be a lease that can be read"),
    ):
        leases.take("unit")


def test_those_that_join_stand_beside_each_other_and_one_alone_beside_nobody(tmp_path, foreign):
    with open_leases(tmp_path, joins=True, pace=PACE), open_leases(tmp_path, joins=True, pace=PACE):
        refused = pytest.raises(RuntimeError, match=r"in use by process \d+ on .*, one of several: pass --join too")
        with refused, open_leases(tmp_path, joins=False, pace=PACE):
            pass
    with open_leases(tmp_path, joins=False, pace=PACE):
        refused = pytest.raises(RuntimeError, match=r"works alone: wait for it, or stop it and pass --join to each")
        with refused, open_leases(tmp_path, joins=True, pace=PACE):
            pass
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(("joins", "left"), [(True, ALONE), (False, ALONE), (False, JOINED)])
def test_what_killed_processes_left_on_another_machine_is_waited_for_and_cleared(tmp_path, joins, left):
    (tmp_path / FOLDER).mkdir()
    owner = {"host": "far", "process": 7, "nonce": "x"}
    (tmp_path / FOLDER / f"{left}x.1").write_text(json.dumps(owner) + "\n1\n")
    said = []
    with open_leases(tmp_path, said.append, joins=joins, pace=PACE):
        pass
    assert said == [f"{tmp_path / FOLDER}: checking for up to 0.4 s whether process 7 on far is alive"]
    assert not (tmp_path / FOLDER).exists()


def test_one_of_many_does_what_is_done_once(entered, tmp_path):
    many, done = [entered() for _ in range(4)], tmp_path / "done"
    made = []

    def make():
        made.append(1)
        time.sleep(0.2)
        done.write_text("")

    at_once([functools.partial(one.call_once, "what", done.exists, make) for one in many])
    assert made == [1]
