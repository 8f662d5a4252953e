"""What the verbs of the command line do, in the order in which they do it."""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mft.config import CONFIG, ModelConfig, RunConfig, config_values, save_config
from mft.data.sources import open_source
from mft.data.splits import Splits, load_splits
from mft.engines.distributed import Processes, joined
from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation, paired_difference
from mft.evaluation.evaluated_base import base_words, check_exact, evaluated_base, evaluated_config
from mft.evaluation.lm_eval_tasks import load_tasks, score_tasks, task_table, write_scores
from mft.evaluation.mask_cost import said_of_cost
from mft.evaluation.table import evaluation_table
from mft.files.atomic import NotWritten, remove, write_whole
from mft.masks.convert import keeping_all, mask_model, print_trainable_parameters
from mft.masks.export import MASKS, base_hash, load_masks, masks_directory, save_masks
from mft.masks.export_format import read_export
from mft.masks.inspection import flip_share, initial_masks
from mft.masks.quantize import quantize_model
from mft.masks.targets import select_targets
from mft.models.pretrained import load_model, load_outline, load_tokenizer, save_model
from mft.study.sensitivity import (
    kind_groups,
    layer_groups,
    layer_sensitivity,
    plot_sensitivity,
    recommendation,
    sensitivity_markdown,
    sensitivity_table,
)
from mft.training.checkpoint import BadCheckpoint, Checkpoint
from mft.training.console import console, new_console, say
from mft.training.curves import plot_curves
from mft.training.flips import PHASE, POINTS, FlipCounter
from mft.training.loop import finetune, train_masks
from mft.training.metrics import Recorder, Steps
from mft.training.plan import Plan, plan_training, replan
from mft.training.progress import Progress
from mft.training.resume import Begin, Start, started
from mft.training.run_directory import (
    CHECKPOINTS,
    MODEL,
    PLOT,
    TABLE_JSON,
    TABLE_MARKDOWN,
    check_run_directory,
    holding,
    next_steps,
    open_run,
)
from mft.training.saver import Saver, Stopped


def run_finetune(start: Start) -> None:
    """mft finetune"""
    with joined() as processes, started(start, processes) as (config, found):
        check_exact(config.model, "finetune")
        _finetune(config, start, found, processes)


def run_train(start: Start) -> None:
    """mft train"""
    with joined() as processes, started(start, processes) as (config, found):
        _train(config, start, found, processes)


def masks_config(masks: Path, overrides: Sequence[str]) -> RunConfig:
    """The base and the data of the run that wrote masks, with overrides; says where they were found."""
    config, words = evaluated_config(masks_directory(masks), overrides)
    say(words)
    return config


def run_evaluate(config: RunConfig, masks: Path | None, split: str, *, force: bool, unquantized: bool) -> None:
    """mft evaluate"""
    if split not in ("validation", "test"):
        raise ValueError(f"--split must be validation or test, got {split!r}")
    stages = _Stages(config.model, masks, unquantized=unquantized)
    dataset = getattr(_load_data(config), split)
    model, _ = _load(config.model)
    recorder = Recorder(progress=Progress(console))
    results = {
        name: recorder.evaluate(f"{name}, {split}", model, dataset) for name in stages.reached(model, force=force)
    }
    console.print(evaluation_table(split, results))
    say(stages.words)


def run_lm_eval(
    config: RunConfig,
    masks: Path | None,
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
    model, tokenizer = _load(config.model)
    results = {name: score_tasks(model, tokenizer, tasks, limit=limit) for name in stages.reached(model, force=force)}
    console.print(task_table(results))
    say(stages.words)
    if output is not None:
        write_scores(output, results, limit)
        say(f"scores: {output}")


def run_sensitivity(config: RunConfig, size: int | None, *, overwrite: bool) -> None:
    """mft sensitivity"""
    check_exact(config.model, "sensitivity")
    check_run_directory(config.output_dir, overwrite=True)
    with holding(Path(config.output_dir)):
        check_run_directory(config.output_dir, overwrite=overwrite)
        _sensitivity(config, size, overwrite=overwrite)


# ---------------------------------------------------------------------------------------------- private


def _sensitivity(config: RunConfig, size: int | None, *, overwrite: bool) -> None:
    splits = _load_data(config)
    outline = load_outline(config.model)
    groups = kind_groups(outline, config.mask) if size is None else layer_groups(outline, config.mask, size=size)
    model, _ = _load(config.model)
    directory = open_run(config.output_dir, config, overwrite=overwrite)
    recorder = Recorder(directory, Progress(console))
    rows = layer_sensitivity(
        model, splits.train, splits.validation, config.mask, groups, config.train, recorder=recorder
    )
    console.print(sensitivity_table(rows))
    say(recommendation(rows))
    write_whole(directory / TABLE_MARKDOWN, sensitivity_markdown(rows))
    write_whole(directory / TABLE_JSON, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    plot_sensitivity(sorted(rows, key=lambda row: groups.index(row.group)), directory / PLOT)
    say(f"table and plot: {directory}/")


def _finetune(config: RunConfig, start: Start, found: Checkpoint | None, processes: Processes) -> None:
    processes.check(config.train, "plain")
    splits = _load_data(config)
    model, tokenizer = _load(config.model)
    processes.agree({"data": splits.key})
    with _running(config, start, found, processes) as (directory, recorder):
        before = _before(recorder, found, "before, validation", model, splits.validation)
        model.requires_grad_(True)
        print_trainable_parameters(model)
        with recorder.training("full fine-tune", splits.train, config.train) as on_step:
            saver = _saver(config, start, found, {"data": splits.key}, recorder, on_step, processes)
            finetune(model, splits.train, config.train, on_step=on_step, saver=saver, processes=processes)
        after = recorder.evaluate("after, validation", model, splits.validation)
        if processes.first:
            with _finishing(directory, recorder, before, after, directory / MODEL) as result:
                save_model(model, tokenizer, result)


def _train(config: RunConfig, start: Start, found: Checkpoint | None, processes: Processes) -> None:
    plan = _plan(config, found, processes)
    say(plan.reason)
    kind = config.model.quantization = plan.quantization
    splits = _load_data(config)
    select_targets(load_outline(config.model), config.mask)  # before the weights are read, which may take minutes
    model, _ = load_model(config.model)
    if plan.way == "plain":
        model.to(plan.device)
    select_targets(model, config.mask)  # raises before anything is written
    where: dict[str, Any] = {"way": plan.way, "device": plan.device}
    evaluated = where if plan.way == "plain" else where | {"batch_size": config.train.batch_size}
    with _running(config, start, found, processes) as (directory, recorder):
        if kind is None:
            before = _before(recorder, found, "before, validation", model, splits.validation, **evaluated)
        mask_model(model, config.mask)
        if kind is not None:
            quantize_model(model, kind, masked=config.model.quantize_masked)
            with keeping_all(model):
                name = f"before in {kind}, validation"
                before = _before(recorder, found, name, model, splits.validation, **evaluated)
        print_trainable_parameters(model)
        initial = initial_masks(model)
        if found is None and processes.first:
            cost = said_of_cost(model, config.mask, splits.validation, **evaluated)
            if cost is not None:
                say(cost)
        steps = config.train.steps_for(len(splits.train))
        # The other ways keep scores elsewhere while they train.
        counts = plan.way == "plain" and processes.first
        flips = FlipCounter(model, initial, every=max(1, -(-steps // POINTS))) if counts else None
        facts = {
            "plan": {"way": plan.way, "remember": plan.remember},
            "data": splits.key,
            "base": base_hash(model),
        }
        processes.agree(facts)
        with recorder.training("mask fine-tune", splits.train, config.train) as on_step:

            def after_step(report: StepReport) -> None:
                on_step(report)
                if flips is not None and (counted := flips(report)) is not None:
                    recorder.write(phase=PHASE, **counted)

            saver = _saver(config, start, found, facts, recorder, on_step, processes, flips)
            options = where | {"remember": plan.remember, "saver": saver, "processes": processes}
            train_masks(model, splits.train, config.train, on_step=after_step, **options)
        after = recorder.evaluate("after, validation", model, splits.validation, **evaluated)
        if not processes.first:
            return
        console.print(
            f"{100 * flip_share(model, initial):.2f} % of the mask's bits flipped since initialisation", highlight=False
        )
        with _finishing(directory, recorder, before, after, directory / MASKS) as result:
            save_masks(model, result, base_model_name_or_path=config.model.name)
    for line in ("next:", *next_steps(directory)):
        say(line)


def _plan(config: RunConfig, found: Checkpoint | None, processes: Processes) -> Plan:
    """How all processes train, before a weight is loaded."""
    if found is not None:
        plan = replan(config, **found.facts()["facts"]["plan"])
    elif processes.count > 1 and config.memory == "auto":
        plan = plan_training(dataclasses.replace(config, memory="plain"))
        plan = dataclasses.replace(plan, reason=f"{plan.reason} (auto is plain on several processes)")
    elif config.mask.modules_to_save and config.memory == "auto":
        plan = plan_training(dataclasses.replace(config, memory="plain"))
        plan = dataclasses.replace(plan, reason=f"{plan.reason} (auto is plain with mask.modules_to_save)")
    else:
        plan = plan_training(config)
    processes.check(config.train, plan.way)
    # Each process has found other memory free.
    return dataclasses.replace(plan, remember=all(processes.gather(plan.remember)))


class _Stages:
    """The states in which a model is evaluated: without masks, then with those of a directory, on the base that is due.

    words: a line on that base.
    """

    def __init__(self, model: ModelConfig, masks: Path | None, *, unquantized: bool) -> None:
        self._directory = None if masks is None else masks_directory(masks)
        export = None if self._directory is None else read_export(self._directory)[0]
        self._kind, self._quantize_masked = evaluated_base(model, export, unquantized)
        self._base = model.name if self._kind is None else f"{model.name} in {self._kind}"
        self.words = base_words(self._kind, self._quantize_masked, export)

    def reached(self, model: Any, *, force: bool) -> Iterator[str]:
        """The name of each state, while model is in it."""
        if self._kind is None:
            yield self._base
        if self._directory is not None:
            load_masks(model, self._directory, force=force)
        if self._kind is not None:
            quantize_model(model.requires_grad_(False), self._kind, masked=self._quantize_masked)
            with keeping_all(model):
                yield self._base
        if self._directory is not None:
            yield "with masks"


@contextlib.contextmanager
def _running(
    config: RunConfig, start: Start, found: Checkpoint | None, processes: Processes
) -> Iterator[tuple[Path, Recorder]]:
    """The run's directory, as it was at the checkpoint; its checkpoints go when it has its result.

    Of several processes the first one alone writes there.
    """
    directory = start.directory
    if not processes.first:
        yield directory, Recorder()
        return
    again = "start again"
    try:
        if isinstance(start, Begin):
            open_run(directory, config, overwrite=start.overwrite)
        else:  # deletes nothing
            save_config(config, directory / CONFIG)
        again = f"go on with --resume {directory}"
        events = found.run()["events"] if found is not None else []
        yield directory, Recorder(directory, Progress(console), events=events)
        again = f"{directory} has its result"
        if (directory / CHECKPOINTS).exists():
            remove(directory / CHECKPOINTS)
    except Stopped as stopped:
        say(f"{stopped.message}; go on with --resume {directory}")
        raise
    except (NotWritten, BadCheckpoint) as error:
        raise OSError(f"{error}; then {again}") from error


def _before(recorder: Recorder, found: Checkpoint | None, *arguments: Any, **options: Any) -> Evaluation:
    """Evaluate; what a run that goes on has written already, it does not write again."""
    own = recorder if found is None else Recorder(progress=recorder.progress)
    return own.evaluate(*arguments, **options)


def _saver(
    config: RunConfig,
    start: Start,
    found: Checkpoint | None,
    facts: dict[str, Any],
    recorder: Recorder,
    on_step: Steps,
    processes: Processes,
    flips: FlipCounter | None = None,
) -> Saver | None:
    if config.checkpoint_minutes is None and found is None:
        return None
    minutes = math.inf if config.checkpoint_minutes is None else config.checkpoint_minutes

    def run() -> dict[str, Any]:
        return {"config": config_values(config), "events": [] if recorder.metrics is None else recorder.metrics.events}

    return Saver(
        start.directory / CHECKPOINTS,
        minutes,
        found,
        facts=facts,
        run=run,
        force=start.force,
        on_found=on_step.go_on,
        processes=processes,
        counter=flips,
    )


def _load(config: ModelConfig) -> tuple[Any, Any]:
    """(model, tokenizer) of load_model, the model on the GPU if there is one."""
    model, tokenizer = load_model(config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _load_data(config: RunConfig) -> Splits:
    """Without the model, and what can be said without its tokenizer, which may have to be fetched, first."""
    source = open_source(config.data)
    splits = load_splits(config.data, load_tokenizer(config.model, sequence_length=config.data.sequence_length), source)
    for note in splits.notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    return splits


@contextlib.contextmanager
def _finishing(
    directory: Path, recorder: Recorder, before: Evaluation, after: Evaluation, result: Path
) -> Iterator[Path]:
    """Table, plot and metrics; then the block writes the result, which makes the run a finished one."""
    results = {"before": before, "after": after}
    table = evaluation_table("validation", results)
    console.print(table)
    markdown = io.StringIO()
    new_console(markdown, width=120).print(table)
    write_whole(directory / TABLE_MARKDOWN, markdown.getvalue())
    difference, error = paired_difference(after, before)
    numbers: dict[str, Any] = {
        name: {"loss": result.loss, "accuracy": result.accuracy} for name, result in results.items()
    }
    numbers |= {"loss after - before": difference, "standard error": error}
    write_whole(directory / TABLE_JSON, json.dumps(numbers, indent=2) + "\n")
    plot_curves(recorder.curves, directory / PLOT)
    if recorder.metrics is not None:
        recorder.metrics.sync()
    yield result
    say(f"result: {result}; metrics, table and plot: {directory}/")
