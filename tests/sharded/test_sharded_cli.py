"""mft train memory=sharded: two processes write the same run as one; they stop, and one process continues."""

import os
import signal

import pytest
from ranks import Ranks
from tiny_run import LEARN, assert_same_masks, run_main, steps

from mft.training.checkpoint import newest_checkpoint

COUNT = 2
SHARDED = [*LEARN, f"train.accumulation={COUNT}", "memory=sharded", "mask.keep_ratio=0.8"]


def on_two(directory, *changes):
    """Return (exit codes, what was printed) of a run in the directory on two processes."""
    command = ["train", "--config", "config.yaml", *SHARDED, *changes]
    found = Ranks(directory, COUNT, lambda rank: run_main(command)).wait()
    return [each.code for each in found], "".join(each.output for each in found)


@pytest.mark.slow
def test_two_processes_write_the_run_of_one(cli, tmp_path):
    more = ["train.eval_every=2", "train.keep_best=true", "checkpoint_minutes=0"]
    output = cli.done("train", "--config", "config.yaml", *SHARDED, *more, "output_dir=one")
    assert "memory: sharded" in output
    codes, output = on_two(tmp_path, *more, "output_dir=two")
    assert codes == [0, 0], output
    assert output.count("result: two/masks") == 1
    assert_same_masks(tmp_path / "one", tmp_path / "two")
    assert steps(tmp_path / "one") == steps(tmp_path / "two")
    assert steps(tmp_path / "one", "validation") == steps(tmp_path / "two", "validation")
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))


@pytest.mark.slow
def test_one_process_goes_on_from_two(cli, tmp_path, monkeypatch):
    from mft.training.saver import Saver

    cli.done("train", "--config", "config.yaml", *SHARDED, "output_dir=straight")
    after_step = Saver.after_step

    def stopping(self, runner, reports, ended=False):
        if reports[-1].step == 2:
            self.told = signal.SIGTERM
        after_step(self, runner, reports, ended)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", stopping)
        codes, output = on_two(tmp_path, "checkpoint_minutes=0", "output_dir=run")
    assert codes == [143, 143], output
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint.step == 2
    assert len(list(checkpoint.path.glob("shard-*"))) == COUNT
    output = cli.done("train", "--resume", "run")
    assert "goes on after step 2" in output
    assert_same_masks(tmp_path / "straight", tmp_path / "run")
