"""mft evaluate: measure held-out loss, or lm-eval's tasks, of a model without masks and with them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.config import ModelConfig, RunConfig
from mft.evaluation.evaluated_base import base_words, evaluated_base, evaluated_config
from mft.evaluation.lm_eval_tasks import load_tasks, score_tasks, task_table, write_scores
from mft.evaluation.table import evaluation_tables, figure_lines
from mft.masks.bank import load_mask_bank
from mft.masks.convert import keeping_all
from mft.masks.export import load_masks
from mft.masks.export_format import read_export
from mft.masks.quantize import quantize_model
from mft.tracking.console import console, say
from mft.tracking.metrics import Recorder
from mft.tracking.progress import Progress
from mft.training.inputs import read_data, read_model
from mft.training.objectives import make_objective


def masks_config(masks: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the base and the data of the run that wrote masks, with overrides, and print where they were found."""
    config, words = evaluated_config(masks, overrides)
    say(words)
    return config


def run_evaluate(config: RunConfig, masks: Mapping[str, Path], split: str, *, force: bool, unquantized: bool) -> None:
    """mft evaluate"""
    if split not in ("validation", "test"):
        raise ValueError(f"--split must be validation or test, got {split!r}")
    stages = _Stages(config.model, masks, unquantized=unquantized)
    dataset = read_data(config).rows_of(split)
    model, _ = read_model(config.model)
    recorder, objective = Recorder(progress=Progress(console)), make_objective(config)
    results = {
        name: recorder.evaluate(f"{name}, {split}", model, dataset, objective=objective)
        for name in stages.reached(model, force=force)
    }
    for table in evaluation_tables(split, results):
        console.print(table)
    for line in figure_lines(objective.name, results):
        say(line)
    say(stages.words)


def run_lm_eval(
    config: RunConfig,
    masks: Mapping[str, Path],
    names: Sequence[str],
    *,
    tasks_dir: Path | None,
    run_task_code: bool,
    limit: int | None,
    run_code: bool,
    output: Path | None,
    force: bool,
    unquantized: bool,
) -> None:
    """mft evaluate --lm-eval"""
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"--output must be a file in a directory that exists, got {output}")
    stages = _Stages(config.model, masks, unquantized=unquantized)
    tasks = load_tasks(names, tasks_dir=tasks_dir, run_task_code=run_task_code, run_code=run_code)
    model, tokenizer = read_model(config.model)
    results = {name: score_tasks(model, tokenizer, tasks, limit=limit) for name in stages.reached(model, force=force)}
    console.print(task_table(results))
    say(stages.words)
    if output is not None:
        write_scores(output, results, limit)
        say(f"scores: {output}")


class _Stages:
    """The states in which a model is evaluated: without masks, then with the masks of each directory, on one base.

    masks: directories by name. If there are several, their names are the names of the states.
    words: a line about the base.
    """

    def __init__(self, model: ModelConfig, masks: Mapping[str, Path], *, unquantized: bool) -> None:
        self._masks = masks
        exports = [read_export(directory) for directory in masks.values()]
        first = exports[0] if exports else None
        bases = {evaluated_base(model, export, unquantized) for export in (first, *exports[1:])}
        if len(masks) > 1 and bases != {(None, False)}:
            raise ValueError(
                f"--masks must be learned on exact weights if several are given, got {len(masks)} masks, some of "
                "them learned on a quantised base: pass --unquantized, or evaluate one at a time"
            )
        ((self._kind, self._quantize_masked),) = bases
        self._base = model.name if self._kind is None else f"{model.name} in {self._kind}"
        self.words = base_words(self._kind, self._quantize_masked, first)

    def reached(self, model: Any, *, force: bool) -> Iterator[str]:
        """Yield the name of each state while model is in it."""
        if self._kind is None:
            yield self._base
        if len(self._masks) > 1:
            bank = load_mask_bank(model, self._masks, force=force)
            for name in self._masks:
                with bank.use(name):
                    yield name
            return
        for directory in self._masks.values():
            load_masks(model, directory, force=force)
        if self._kind is not None:
            quantize_model(model.requires_grad_(False), self._kind, masked=self._quantize_masked)
            with keeping_all(model):
                yield self._base
        if self._masks:
            yield "with masks"
