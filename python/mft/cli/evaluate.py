"""mft evaluate: measure held-out loss, or lm-eval's tasks, of a model without masks and with them."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.config import ModelConfig, RunConfig
from mft.evaluation.continuation import end_tokens
from mft.evaluation.evaluated_base import base_words, evaluated_base, evaluated_config
from mft.evaluation.exact_match import greedy, match_answers
from mft.evaluation.exchanges import Exchange, find_answers
from mft.evaluation.lm_eval_tasks import load_tasks, score_tasks, task_table, write_scores
from mft.evaluation.table import answer_table, evaluation_tables, figure_lines
from mft.masks.bank import load_mask_bank
from mft.masks.convert import keep_all_weights
from mft.masks.export import load_masks
from mft.masks.export_format import read_export
from mft.masks.quantize import quantize_model
from mft.models.next_tokens import longest_row
from mft.tracking.console import console, say
from mft.tracking.metrics import Recorder
from mft.tracking.progress import Progress
from mft.training.inputs import read_data, read_model
from mft.training.make_objective import make_objective

LONGEST_ANSWER = 32  # tokens with the one that ends it: two longer texts are hardly ever the same


def masks_config(masks: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the base and the data of the run that wrote masks, with overrides, and print where they were found."""
    config, words = evaluated_config(masks, overrides)
    say(words)
    return config


def run_evaluate(
    config: RunConfig, masks: Mapping[str, Path], split: str, *, answers: int, force: bool, unquantized: bool
) -> None:
    """mft evaluate. answers: Most answers that are generated and compared with the data's own."""
    if split not in ("validation", "test"):
        raise ValueError(f"--split must be validation or test, got {split!r}")
    stages = _Stages(config.model, masks, unquantized=unquantized)
    dataset = read_data(config).rows_of(split)
    model, tokenizer = read_model(config.model)
    recorder, objective = Recorder(progress=Progress(console)), make_objective(config)
    ends = end_tokens(model, tokenizer)
    found = find_answers(dataset, ends, pairs=config.objective.takes_pairs) if answers else []
    asked = _short_answers(found, answers, longest_row(model.config))
    results, matches = {}, {}
    for name in stages.each(model, force=force):
        results[name] = recorder.evaluate(f"{name}, {split}", model, dataset, objective=objective)
        if asked:
            say(f"{name}, {split}: answering {len(asked)} prompts", style="dim")
            most = max(len(each.completion) for each in asked)  # a longer answer is another one
            matches[name] = match_answers(model, tokenizer, asked, greedy(ends, most))
    for table in evaluation_tables(split, results):
        console.print(table)
    for line in figure_lines(objective.name, results):
        say(line)
    if matches:
        console.print(answer_table(split, matches, len(found)))
    elif found:
        say(f"{split}: no answer has at most {LONGEST_ANSWER} tokens, so none was compared as a text", style="dim")
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
    results = {name: score_tasks(model, tokenizer, tasks, limit=limit) for name in stages.each(model, force=force)}
    console.print(task_table(results))
    say(stages.words)
    if output is not None:
        write_scores(output, results, limit)
        say(f"scores: {output}")


def _short_answers(found: Sequence[Exchange], most: int, positions: int | None) -> list[Exchange]:
    """Draw answers that can be compared as texts: those of few tokens, with room for as many among the positions."""
    room = math.inf if positions is None else positions - LONGEST_ANSWER
    short = [each for each in found if len(each.completion) <= LONGEST_ANSWER and len(each.prompt) <= room]
    return random.Random(0).sample(short, min(most, len(short)))


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

    def each(self, model: Any, *, force: bool) -> Iterator[str]:
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
            with keep_all_weights(model):
                yield self._base
        if self._masks:
            yield "with masks"
