"""Carry out a regime from its declaration to its table: runs, two at a time, each written when it is finished.

    DIRECTORY/regime.json           the declaration
              base/                 the model from scratch
              runs/<name>.json      a run's result
              result.json, table.md

Validation chooses the rate of every arm with the first seed. An interrupted command continues where it stopped.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mft.config import DataConfig, ModelConfig
from mft.data.splits import Splits, load_splits
from mft.engines.step import NonFiniteLoss
from mft.files.atomic import write_whole
from mft.models.pretrained import load_model
from mft_kernels.ops.checks import NonFiniteScores
from mft_study.arms.setting import Setting
from mft_study.config import ScratchConfig
from mft_study.evidence.environment import environment
from mft_study.evidence.power import Spread, power_words
from mft_study.from_scratch import train_from_scratch
from mft_study.grid import neighbours

from .findings import Documents

REGIME, BASE, RUNS, RESULT, TABLE = "regime.json", "base", "runs", "result.json", "table.md"
CHOICE, DIVERGED, SECONDS = "choice", "diverged", "seconds"  # keys of a run's result
Found = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """An arm at a rate, with a seed."""

    arm: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Regime:
    """The declaration that is made before the first run."""

    rates: dict[str, list[float]]  # by arm; validation chooses the best, and its untried neighbours run too
    seeds: list[int]  # the first chooses the rates
    scratch: ScratchConfig = dataclasses.field(default_factory=ScratchConfig)
    extensions: int = 2  # further rates that an arm may try while its best one is at an end
    workers: int = 2  # processes of one thread each

    assumed = Spread(0.05, 0.2, "a guess before any run")  # of differences

    def run(self, base: Path, run: Run) -> Found:
        """Return a run's result as JSON; validation chooses the smallest value under CHOICE."""
        raise NotImplementedError

    def texts(self) -> dict[str, DataConfig]:
        """Return the data by the name of its text."""
        raise NotImplementedError

    def splits(self, tokenizer: Any, seed: int) -> dict[str, Splits]:
        """Return the splits by text; the seed selects the training rows."""
        return {
            text: load_splits(dataclasses.replace(data, seed=seed), tokenizer) for text, data in self.texts().items()
        }

    def arms(self, found: dict[Run, Found], documents: Documents) -> dict[str, Any]:
        """Return each arm's outcome as JSON."""
        raise NotImplementedError

    def table(self, arms: dict[str, Any]) -> str:
        """Return the Markdown table."""
        raise NotImplementedError


def run_command(
    description: str, name: str, declare: Callable[..., Regime], given: Sequence[str] | None = None
) -> None:
    """Run the command of a regime: python -m benchmarks.regimes.NAME [--out DIRECTORY] [--quick]."""
    command = f"python -m benchmarks.regimes.{name}"
    parser = argparse.ArgumentParser(
        prog=command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / name.replace("_", "-"))
    parser.add_argument("--quick", action="store_true", help="a smaller model, little text, two seeds: minutes")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, in quotes; the reference must be one")
    asked = parser.parse_args(given)
    regime = declare(asked.out / "texts", quick=asked.quick)
    if asked.arms is not None:
        if unknown := sorted(set(asked.arms) - regime.rates.keys()):
            parser.error(f"--arms must name arms of {', '.join(regime.rates)}, got {', '.join(unknown)}")
        regime = dataclasses.replace(regime, rates={arm: regime.rates[arm] for arm in asked.arms})
    carry_out(regime, asked.out, " ".join([command, *(sys.argv[1:] if given is None else given)]))


def quick_scratch() -> ScratchConfig:
    """Return the base model's configuration for a quick look."""
    scratch = ScratchConfig(hidden_size=64, intermediate_size=176, layers=2)
    scratch.data.max_train_tokens = 262_144
    return scratch


def carry_out(regime: Regime, directory: Path, command: str) -> dict[str, Any]:
    """Do all runs and write RESULT and TABLE into directory; returns the result.

    Raises: ValueError if directory holds another regime; RuntimeError if an arm diverges at every rate.
    """
    model, tokenizer = load_base(prepare(regime, directory))
    tests = {text: splits.test for text, splits in regime.splits(tokenizer, regime.seeds[0]).items()}
    documents = Documents.of(model, tests)
    power = power_words(regime.assumed, len(regime.seeds), documents.number, digits=3)
    _say(power)
    found = complete(regime, directory)
    arms, notes = regime.arms(found, documents), open_ends(regime, found)
    result = {
        "environment": environment() | {"command": command},
        "declared": dataclasses.asdict(regime),
        "power": power,
        "notes": notes,
        "documents": dataclasses.asdict(documents),
        "arms": arms,
        "runs": [dataclasses.asdict(run) | one for run, one in found.items()],
    }
    table = "\n\n".join([regime.table(arms), power, *notes]) + "\n"
    write_whole(directory / RESULT, json.dumps(result, allow_nan=False))
    write_whole(directory / TABLE, table)
    _say(table)
    return result


def load_base(base: Path) -> tuple[nn.Module, Any]:
    """Return the base model, frozen, and its tokenizer."""
    model, tokenizer = load_model(ModelConfig(name=str(base), dtype="float32"))
    return model.requires_grad_(False).eval(), tokenizer


def prepare(regime: Regime, directory: Path) -> Path:
    """Declare the regime in directory and make its base model; returns the base model's folder.

    Raises: ValueError if directory holds another regime.
    """
    declared, path, base = json.dumps(dataclasses.asdict(regime), indent=1), directory / REGIME, directory / BASE
    if path.is_file() and path.read_text(encoding="utf-8") != declared:
        raise ValueError(f"{path} must be what runs, got another regime: name another directory with --out")
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, declared)
    if not base.exists():
        _say("the base model is trained from scratch first")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # like all that follows
        train_from_scratch(regime.scratch, base)
        torch.set_num_threads(threads)
    return base


def complete(regime: Regime, directory: Path) -> dict[Run, Found]:
    """Do all runs that the regime needs: every rate with the first seed, then each arm's best one with every seed.

    Call prepare first. Raises: RuntimeError if an arm diverges at every rate.
    """
    found, first = dict[Run, Found](), regime.seeds[0]

    def finish(runs: Iterable[Run]) -> None:
        missing = [run for run in runs if run not in found]
        kept = {run: _path(directory, run) for run in missing if _path(directory, run).is_file()}
        found.update({run: json.loads(path.read_text(encoding="utf-8")) for run, path in kept.items()})
        missing, begin = [run for run in missing if run not in kept], time.perf_counter()
        for number, (run, one) in enumerate(_run_all(regime, directory / BASE, missing), start=1):
            found[run] = one
            write_whole(_path(directory, run), json.dumps(one, allow_nan=False))
            left = (time.perf_counter() - begin) / number * (len(missing) - number) / 60
            words = one.get(DIVERGED) or f"validation {one[CHOICE]:.4f}"
            _say(f"{run}: {words}, {one[SECONDS]:.0f} s ({number}/{len(missing)}, {left:.0f} minutes left of these)")

    (directory / RUNS).mkdir(exist_ok=True)
    finish(Run(arm, lr, first) for arm, rates in regime.rates.items() for lr in rates)
    for _ in range(regime.extensions):
        finish([Run(arm, lr, first) for arm in regime.rates for lr in _neighbouring_rates(regime, found, arm)[:1]])
    chosen = {arm: best_rate(regime, found, arm) for arm in regime.rates}
    finish(Run(arm, lr, seed) for seed in regime.seeds for arm, lr in chosen.items())
    return found


def best_rate(regime: Regime, found: dict[Run, Found], arm: str) -> float:
    """Return the rate with the best validation value for the first seed. Raises: RuntimeError if all runs diverged."""
    losses = _losses(regime, found, arm)
    if not losses:
        raise RuntimeError(f"{arm} must stay finite at one of its rates, it diverged at each: add smaller ones")
    return min(losses, key=losses.__getitem__)


def chosen_runs(regime: Regime, found: dict[Run, Found], arm: str) -> dict[int, Found]:
    """Return the results at the chosen rate by seed, without runs that diverged."""
    lr = best_rate(regime, found, arm)
    return {seed: one for seed in regime.seeds if DIVERGED not in (one := found[Run(arm, lr, seed)])}


def open_ends(regime: Regime, found: dict[Run, Found]) -> list[str]:
    """Return a line for each arm whose best rate is at the end of those tried, or that diverged with a seed."""
    lines = []
    for arm in regime.rates:
        lr = best_rate(regime, found, arm)
        if _neighbouring_rates(regime, found, arm):
            lines.append(f"{arm}: its best rate, {lr:g}, lies at the end of those that were tried")
        if lost := [seed for seed in regime.seeds if DIVERGED in found[Run(arm, lr, seed)]]:
            lines.append(f"{arm}: diverged at its chosen rate with the seeds {', '.join(map(str, lost))}")
    return lines


# ---------------------------------------------------------------------------------------------- private

_say = functools.partial(print, flush=True)  # so that the reader of an output file can follow


def _losses(regime: Regime, found: dict[Run, Found], arm: str) -> dict[float, float]:
    """Return the validation losses of the first seed by rate, without runs that diverged."""
    runs = {run: one for run, one in found.items() if (run.arm, run.seed) == (arm, regime.seeds[0])}
    return {run.lr: one[CHOICE] for run, one in runs.items() if DIVERGED not in one}


def _neighbouring_rates(regime: Regime, found: dict[Run, Found], arm: str) -> list[float]:
    """Return the untried neighbours of the best rate, the smaller one first."""
    grid = [Setting(lr=lr) for lr in regime.rates[arm]]
    tried = [Setting(lr=run.lr) for run in found if (run.arm, run.seed) == (arm, regime.seeds[0])]
    losses = _losses(regime, found, arm)
    best = Setting(lr=min(losses, key=losses.__getitem__) if losses else min(regime.rates[arm]))
    return [one.value for one in neighbours(best, grid, tried)]


def _path(directory: Path, run: Run) -> Path:
    return directory / RUNS / f"{run}.json"


def _run_all(regime: Regime, base: Path, runs: list[Run]) -> Iterator[tuple[Run, Found]]:
    """Yield runs in the order in which they end: in this process, or in several fresh ones."""
    if regime.workers == 1:
        for run in runs:
            yield run, _result(regime, base, run)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(regime.workers, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(_result, regime, base, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _result(regime: Regime, base: Path, run: Run) -> Found:
    """Return the run's result and its seconds; a run that becomes non-finite is a result too."""
    begin = time.perf_counter()
    try:
        found = regime.run(base, run)
    except (NonFiniteLoss, NonFiniteScores) as error:
        found = {DIVERGED: str(error)}
    return found | {SECONDS: round(time.perf_counter() - begin, 1)}
