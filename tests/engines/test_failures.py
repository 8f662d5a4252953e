"""If one of several processes fails or is killed, the others end within a bounded time, with its error message."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lost_ranks import BOUND, COUNT, FAILED, STAGES, Case, Lab, cases
from ranks import Ranks
from tiny_run import run_main

from mft.engines import failures
from mft.engines.distributed import joined

QUICK = {"BEAT": 0.1, "GRACE": 1.5, "SILENCE": 0.6}  # seconds


@pytest.fixture
def quick(monkeypatch):
    """Shorten the waiting times of failures."""
    for name, seconds in QUICK.items():
        monkeypatch.setattr(failures, name, seconds)


def fail(error):
    raise error


def meet(processes):
    processes.wait()


def forever(processes):
    time.sleep(60)


WITHOUT_A_WORD = (
    "process {} of 2 ended without an error message (killed? out of memory?), so all processes end: look at"
)
# name: what the failing rank does, what the other one does meanwhile, the expected message.
ENDS = {
    "an error": (
        lambda: fail(ValueError("a word")),
        meet,
        "process {} of 2 has stopped, so all processes stop: ValueError: a",
    ),
    "an error while the other computes": (
        lambda: fail(OSError("a word")),
        forever,
        "so all processes stop: OSError: a word",
    ),
    "Ctrl-C": (lambda: fail(KeyboardInterrupt()), meet, "so all processes stop: KeyboardInterrupt"),
    "sys.exit": (lambda: sys.exit(7), meet, "so all processes stop: SystemExit: 7"),
    "kill -9": (lambda: os.kill(os.getpid(), signal.SIGKILL), meet, WITHOUT_A_WORD),
    "an exit without a word": (lambda: os._exit(0), meet, WITHOUT_A_WORD),
}


def in_ranks(tmp_path, work, count=2):
    """Return how processes end that join and call work(rank, processes), as mft would."""

    def run(rank):
        try:
            with joined() as processes:
                processes.wait()
                work(rank, processes)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return Ranks(tmp_path, count, run).wait(30)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", ENDS)
def test_the_others_end_with_the_words_of_the_one_that_fails(tmp_path, quick, end, rank):
    act, meanwhile, words = ENDS[end]
    begin = time.time()
    found = in_ranks(tmp_path, lambda own, processes: act() if own == rank else meanwhile(processes))
    other = found[1 - rank]
    assert other.code == 2, other.output
    assert words.format(rank) in other.error
    assert other.when - begin < sum(QUICK.values()) + 3


def test_a_process_that_lives_on_after_its_error_does_not_keep_the_others(tmp_path, quick):
    def run(rank):
        try:
            with joined() as processes:
                processes.wait()
                if rank == 0:
                    processes.wait()  # the other process never arrives
                raise ValueError("a word")
        except ValueError:
            time.sleep(4)  # its sockets stay open
        return 0

    first, second = Ranks(tmp_path, 2, run).wait(30)
    assert first.code == 2
    assert first.error == "error: process 1 of 2 has stopped, so all processes stop: ValueError: a word"
    assert first.when < second.when


def test_nobody_leaves_before_all_are_done(tmp_path):
    """The first process may still fail while it writes the result."""

    def work(rank, processes):
        if rank == 0:
            time.sleep(0.5)
            fail(OSError("a full disk"))

    first, second = in_ranks(tmp_path, work)
    assert first.error == "error: a full disk"
    assert second.error == "error: process 0 of 2 has stopped, so all processes stop: OSError: a full disk"


def test_processes_killed_together_are_named_together(tmp_path, quick):
    def work(rank, processes):
        if rank > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.wait()

    first, *_ = in_ranks(tmp_path, work, 3)
    assert "processes 1 and 2 of 3 ended without an error message" in first.error


def test_torchrun_shows_the_error_of_the_one_that_failed(tmp_path, quick, monkeypatch):
    """torchrun reads it from a file for each process, as torch.distributed.elastic's record writes it."""

    def work(rank, processes):
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"error of {rank}"
        if rank == 1:
            fail(ValueError("a word"))
        processes.wait()

    in_ranks(tmp_path, work)
    assert json.loads((tmp_path / "error of 1").read_text())["message"]["message"] == "ValueError: a word"
    assert not (tmp_path / "error of 0").exists()


# ---------------------------------------------------------------------------------------------- mft train


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_CACHE", "")  # Lab sets it; the patch restores it afterwards
        yield Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_at_any_stage_of_a_step_ends_all_processes(lab, tmp_path, stage):
    """In the second process, or in the first one if only that reaches the stage."""
    rank = 0 if STAGES[stage].first_alone else 1
    found = lab.failing(tmp_path, Case(rank, stage, 2), lambda: fail(RuntimeError("out of memory")))
    failed = float((tmp_path / FAILED).read_text())
    assert found[rank].error == "error: out of memory"
    for other in found[:rank] + found[rank + 1 :]:
        assert other.code == 2
        assert (
            other.error
            == f"error: process {rank} of {COUNT} has stopped, so all processes stop: RuntimeError: out of memory"
        )
        assert other.when - failed < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("case", cases()[4::22], ids=str)
def test_a_killed_rank_is_named_and_the_run_goes_on_bit_equal(lab, case):
    """A few of the 63 cases; python tests/engines/lost_ranks.py tries all."""
    lab.kill(case)


# ---------------------------------------------------------------------------------------------- ranks that disagree


def other_torch(rank):
    torch.__version__ = "2.13.0" if rank == 0 else "2.14.1"


def other_kernels(rank):
    os.environ["MFT_KERNELS"] = "reference" if rank == 0 else "cpu"


DISAGREE = {
    "versions": (other_torch, "the version of torch is 2.14.1 in process 1, 2.13.0 in process 0"),
    "kernels": (other_kernels, "MFT_KERNELS is cpu in process 1, reference in process 0"),
}


@pytest.mark.parametrize("kind", DISAGREE)
def test_ranks_that_disagree_in_their_software_are_told_in_what(tmp_path, kind):
    change, words = DISAGREE[kind]

    def run(rank):
        change(rank)
        with pytest.raises(ValueError, match="every process must have the same versions, ") as caught, joined():
            pass
        print(f"error: {caught.value}")
        return 2

    for ended in Ranks(tmp_path, 2, run).wait(30):
        assert words in ended.error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("train", "train.lr=1e-3"), "train.lr is 0.001 in process 1, 0.01 in process 0"),
        (("finetune",), "the command is mft finetune in process 1, mft train in process 0"),
        (("train", "data.source={}/other.jsonl"), "data.source is "),
    ],
    ids=["configuration", "command", "data"],
)
def test_ranks_that_were_told_different_things_are_told_in_what(lab, tmp_path, command, words):
    shutil.copy(lab.work / "data.jsonl", tmp_path / "other.jsonl")
    verb, *changes = command

    def run(rank):
        verb_of, more = ("train", []) if rank != 1 else (verb, [change.format(tmp_path) for change in changes])
        return run_main((verb_of, *lab.begin[1:], *more))

    for ended in Ranks(tmp_path, COUNT, run).wait():
        assert ended.code == 2
        assert words in ended.error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_whose_data_file_differs_are_told(lab, tmp_path):
    """The file has the same name, on machines without a shared disk."""
    lines = (lab.work / "data.jsonl").read_text().splitlines(keepends=True)

    def run(rank):
        os.mkdir(f"of {rank}")
        Path(f"of {rank}/data.jsonl").write_text("".join(lines[: len(lines) - (rank == 1)]))
        os.chdir(f"of {rank}")
        return run_main((*lab.begin, "data.source=data.jsonl"))

    for ended in Ranks(tmp_path, COUNT, run).wait():
        assert ended.code == 2
        assert "but data is " in ended.error
