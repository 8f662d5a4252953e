"""Train among processes, kill one of them with -9 at a named stage of a step, and continue afterwards.

    python tests/engines/lost_ranks.py                  each of three ranks, at each stage, of three steps: 63 kills
    python tests/engines/lost_ranks.py --cases 10       ten of them, spread over all
    python tests/engines/lost_ranks.py --only "rank 1"  those whose line contains this

Each case is an mft train among three processes on the tiny model, which saves after every step and evaluates after
every second one. When a process reaches the stage, the chosen rank is killed. The others must end with exit code 2
within BOUND seconds, and name the rank. The run continues with --resume, and must end with the masks, losses and
validation losses of an undisturbed run, bit for bit.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from ranks import Ended, Ranks
from tiny_run import assert_same_masks, run_main, steps, write_run

from mft.engines.distributed import Processes
from mft.training.saver import Saver

COUNT, STEPS = 3, 5
BOUND = 10.0  # seconds within which the others must end
LEARN = (
    *("train.lr=1e-2", "train.epochs=null", f"train.steps={STEPS}", "train.batch_size=2", "train.eval_every=2"),
    *("mask.layers_to_transform=2-3", "mask.keep_ratio=0.8", "checkpoint_minutes=0"),
)


@dataclass(frozen=True)
class Stage:
    """A place in a step: the function that is called there, and whether only the first rank calls it."""

    name: str
    module: str
    function: str
    after: bool = False  # after the call, instead of before it
    first_alone: bool = False


STAGES = {
    stage.name: stage
    for stage in (
        Stage("before the forward", "mft.engines.own_forward", "OwnForward.step"),
        Stage("in the backward", "mft.objectives.cross_entropy", "backward_labelled_loss"),
        Stage("before the sum of gradients", "mft.engines.distributed", "Processes.sum_gradients"),
        Stage("in the optimiser step", "mft.engines.master_weights", "MasterAdamW.copy_masters"),
        Stage("in the validation", "mft.training.validation", "evaluate"),
        Stage("while a checkpoint is written", "mft.training.checkpoint", "save_file", after=True, first_alone=True),
        Stage("before a checkpoint is renamed", "mft.files.atomic", "_move_into_place", first_alone=True),
    )
}


class Lab:
    """Data, model and configuration below one directory, for runs among COUNT processes forked from this one."""

    def __init__(self, work: Path) -> None:
        self.work = work
        torch.set_num_threads(1)
        os.environ["MFT_CACHE"] = str(work / "cache")
        write_run(work)
        self.begin = ("train", "--config", str(work / "config.yaml"), *LEARN, f"train.accumulation={COUNT}")
        importlib.import_module("mft.training.training_run")  # once for all children
        importlib.import_module("matplotlib.figure")

    def run(self, directory: Path, *command: str, prepare: Callable[[int], None] = lambda rank: None) -> list[Ended]:
        """Run mft among COUNT processes in ``directory``; prepare is called in each of them with its rank."""

        def work(rank: int) -> int:
            prepare(rank)
            return run_main(command)

        return Ranks(directory, COUNT, work).wait()

    def failing(self, directory: Path, case: "Case", act: Callable[[], None]) -> list[Ended]:
        """Run mft train in ``directory``; ``act`` is called once, at the stage and step of the case."""

        def prepare(rank: int) -> None:
            if rank == (0 if STAGES[case.stage].first_alone else case.rank):
                call_at(STAGES[case.stage], case.step, act)

        return self.run(directory, *self.begin, prepare=prepare)

    def straight(self) -> Path:
        """Return the directory of an undisturbed run."""
        directory = self.work / "straight"
        if not directory.exists():
            directory.mkdir()
            for ended in self.run(directory, *self.begin):
                assert ended.code == 0, ended.output
        return directory / "run"

    def kill(self, case: "Case") -> float:
        """Kill one rank, continue, and compare; return the seconds until the others ended.

        Raises: AssertionError if anything differs.
        """
        directory = Path(tempfile.mkdtemp(dir=self.work))

        def act() -> None:
            os.kill(json.loads(Path("pids").read_text())[case.rank], signal.SIGKILL)

        found = self.failing(directory, case, act)
        killed = found.pop(case.rank)
        assert killed.code == -signal.SIGKILL, killed.output
        failed = float((directory / FAILED).read_text())
        for ended in found:
            assert ended.code == 2, ended.output
            assert f"process {case.rank} of {COUNT} ended without an error message" in ended.error, ended.output
            assert ended.when - failed < BOUND, f"ended after {ended.when - failed:.1f} s"
        for ended in self.run(directory, "train", "--resume", "run"):
            assert ended.code == 0, ended.output
        run = directory / "run"
        assert_same_masks(run, self.straight())
        for phase in ("mask fine-tune", "validation"):
            assert steps(run, phase) == steps(self.straight(), phase), phase
        shutil.rmtree(directory)
        return max(ended.when for ended in found) - failed


FAILED = "failed at"  # a file in the run's working directory: time.time()


@dataclass(frozen=True)
class Case:
    rank: int
    stage: str
    step: int  # from 1

    def __str__(self) -> str:
        return f"rank {self.rank} {self.stage} of step {self.step}"


def call_at(stage: Stage, step: int, act: Callable[[], None]) -> None:
    """Make this process call ``act`` at that stage of that step; ``act`` may return."""
    holder = importlib.import_module(stage.module)
    *classes, name = stage.function.split(".")
    for each in classes:
        holder = getattr(holder, each)
    original, after_step, agree_on = getattr(holder, name), Saver.after_step, Processes.agree_on
    training, done, now = False, False, 1

    def begun(self, tensors):  # train_loop calls it before its first step
        nonlocal training
        training = True
        agree_on(self, tensors)

    def counted(self, runner, reports, ended=False):
        nonlocal now
        after_step(self, runner, reports, ended)
        now = reports[-1].step + 1

    def there(*arguments, **options):
        nonlocal done
        result = original(*arguments, **options) if stage.after else None
        if training and now == step and not done:
            done = True
            Path(FAILED).write_text(str(time.time()))
            act()
        return result if stage.after else original(*arguments, **options)

    Processes.agree_on, Saver.after_step = begun, counted
    setattr(holder, name, there)


def cases() -> list[Case]:
    """Return every rank at every stage of three steps. Of the odd steps, only the last has a validation."""
    return [
        Case(rank, name, step)
        for name in STAGES
        for step in ((2, 4, STEPS) if name == "in the validation" else (1, 2, STEPS))
        for rank in range(COUNT)
    ]


def main() -> int:
    """Run the cases and print a line for each; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="only so many, spread over all")
    parser.add_argument("--only", default="", help="those whose line holds this, such as 'rank 1 in the backward'")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in str(case)]
    if options.cases is not None:
        chosen = [chosen[i * len(chosen) // options.cases] for i in range(options.cases)]
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name).resolve())
        gc.collect()
        gc.freeze()
        for case in chosen:
            try:
                print(f"{case}: the others ended after {lab.kill(case):.1f} s, then went on bit-equal", flush=True)
            except (AssertionError, TimeoutError) as error:
                wrong += 1
                print(f"{case}: WRONG: {error}", flush=True)
    print(f"{len(chosen)} kills, {wrong} went wrong")
    gc.unfreeze()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
