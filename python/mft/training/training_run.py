"""Run mft finetune and mft train from the configuration to the result; also for use from Python.

    directory = run_train(load_config("run.yaml", ["train.steps=100"]))      # output_dir/masks
    directory = run_train(Resume("runs/mine"))                               # resumes from its newest checkpoint

Both lock the run's directory while they work, write checkpoints, metrics, a table and a plot there, and print their
progress. The result is written last. A run is finished when the directory has its result.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import CONFIG, DATA_INITS, WAYS, RunConfig
from mft.config_file import save_config
from mft.data.sources import Source, open_source
from mft.data.splits import Splits
from mft.data.streams import count_rows
from mft.data.system_prompt import shared_system
from mft.engines.distributed import ALONE, joined
from mft.engines.mode import place
from mft.engines.placed import Placed
from mft.engines.sharded.score_rows import score_rows
from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation
from mft.evaluation.evaluated_base import check_exact
from mft.evaluation.mask_cost import mask_cost_warning
from mft.files.atomic import NotWritten
from mft.importance.initial_scores import drawn, init_from_data
from mft.masks.budget import grow_budget
from mft.masks.convert import keep_all_weights, mask_model, print_trainable_parameters
from mft.masks.export import base_hash, save_masks
from mft.masks.inspection import flip_share, initial_masks
from mft.masks.location import MASKS
from mft.masks.quantize import quantize_model
from mft.masks.targets import select_targets
from mft.memory.ways import ordered
from mft.models.pretrained import load_outline, save_model
from mft.number_formats import state_bytes
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.tracking.console import console, say
from mft.tracking.metrics import Recorder
from mft.tracking.trackers import check_trackers
from mft.training.checkpoint import BadCheckpoint, Checkpoint
from mft.training.flips import PHASE, POINTS, FirstMasks, FlipCounter
from mft.training.inputs import read_data, read_model
from mft.training.loop import train_loop, train_masks
from mft.training.make_objective import facts_of, make_objective
from mft.training.memory_plan import Plan, plan_training, replan
from mft.training.outputs import VALIDATION, Outputs, evaluation_batch
from mft.training.resume import Begin, Run, Start, open_start, resume_if_restarted
from mft.training.run_checkpoints import RunCheckpoints
from mft.training.run_directory import MODEL, open_run
from mft.training.saver import Stopped
from mft.training.validation import Ended


def run_finetune(start: RunConfig | Start) -> Path:
    """Train all weights of config.model on config.data, and save it as an ordinary model.

    Args: start: A configuration, for a run in a new output_dir; or Begin or Resume.
    Returns: output_dir/model.
    Raises: ValueError if the configuration, the data or the directory do not allow the run, before anything is written;
        OSError if the disk fails; SystemExit after SIGTERM, SIGHUP or Ctrl-C, once a checkpoint is written.
    """
    with _begin_run("mft finetune", start) as run:
        check_exact(run.config.model, "finetune")
        if run.config.objective.of_base:
            raise ValueError(
                "objective.name must be cross_entropy or distill in mft finetune, which changes the base, got "
                f"{run.config.objective.name}, which compares masks with the base: use mft train"
            )
        return _finetune(run)


def run_train(start: RunConfig | Start) -> Path:
    """Train masks on config.model with the settings of config.mask, and save them.

    Args, Raises: as run_finetune.
    Returns: output_dir/masks.
    """
    with _begin_run("mft train", start) as run:
        return _train(run)


# ---------------------------------------------------------------------------------------------- the steps, in order


def _finetune(run: Run) -> Path:
    config, checkpoints = run.config, RunCheckpoints(run)
    run.processes.check(config.train)
    splits = _read_splits(config)
    model, tokenizer = read_model(config.model)
    placed = place(model, objective=make_objective(config), processes=run.processes)
    facts = {"data": splits.key} | facts_of(placed.objective)
    run.processes.agree(facts)
    with _open_outputs(run) as outputs:
        before = outputs.evaluate_start("before, validation", placed, splits.validation)
        model.requires_grad_(True)
        print_trainable_parameters(model)
        with outputs.training("full fine-tune", splits.train) as on_step:
            validation = outputs.validation(on_step, placed, splits.validation, checkpoints.best())
            saver = checkpoints.saver(outputs.events, facts, on_step.go_on, [validation])
            hooks: dict[str, Any] = {"on_step": on_step, "saver": saver, "validation": validation}
            reports = train_loop(placed, splits.train, config.train, **hooks)
        ended = checkpoints.finish(model, reports[-1], validation)
        after = outputs.evaluate_end(placed, splits.validation, ended.exported)
        if run.processes.first:
            with outputs.finishing(before, after, ended, MODEL) as result:
                save_model(model, tokenizer, result)
    return run.directory / MODEL


def _train(run: Run) -> Path:
    plan = _plan(run)
    say(plan.reason)
    config = plan.config
    run = dataclasses.replace(run, config=config)
    source = open_source(config.data)
    splits = _read_splits(config, source)
    system = shared_system(source)
    model = _base_model(run, plan)
    placed = Placed(model, plan.mode, plan.device, run.processes, make_objective(config), remember=plan.remember)
    with _open_outputs(run) as outputs:
        before = _mask(outputs, placed, splits)
        rows = score_rows(model)
        initial = initial_masks(model) if rows is None else rows.masks()
        ended = _learn(outputs, placed, splits, initial)
        after = outputs.evaluate_end(placed, splits.validation, ended.exported)
        masks, share = None, 0.0
        if rows is not None:
            own = rows.masks()
            masks, share = rows.gathered(own), rows.flipped_share(initial, own)
        if run.processes.first:
            flipped = 100 * (flip_share(model, initial) if rows is None else share)
            console.print(f"{flipped:.2f} % of the mask's bits flipped since initialisation", highlight=False)
            with outputs.finishing(before, after, ended, MASKS) as result:
                named = {"base_model_name_or_path": config.model.name, "system_prompt": system}
                save_masks(model, result, masks=masks, coding=config.coding, **named)
    return run.directory / MASKS


def _read_splits(config: RunConfig, source: Source | None = None) -> Splits:
    splits = read_data(config, source)
    if config.train.evaluates:
        splits.rows_of(VALIDATION)
    return splits


def _plan(run: Run) -> Plan:
    """Plan how all processes train, before any weight is loaded."""
    config, found, processes = run.config, run.found, run.processes
    processes.check(config.train)
    if found is not None:
        plan = replan(config, **found.facts()["facts"]["plan"])
    else:
        with processes.together():
            plan = _plan_config(config, processes.count)
        own = plan.config.mask.scores_dtype, plan.config.train.moments
        scores, moments = min(processes.gather(own), key=lambda pair: state_bytes(*pair))
        if (scores, moments) != own:
            mask = dataclasses.replace(config.mask, scores_dtype=scores)
            config = dataclasses.replace(config, mask=mask, train=dataclasses.replace(config.train, moments=moments))
        with processes.together():
            plan = plan if config is run.config else _plan_config(config, processes.count)
        names = processes.gather(plan.mode.name)
        ranked = [way.name for way in ordered(plan.device.type)]
        slowest = max(names, key=ranked.index)  # processes may differ in free memory
        with processes.together():
            if slowest != plan.mode.name:
                plan = _plan_config(dataclasses.replace(config, memory=slowest), processes.count)
                reason = f"{plan.reason} (process {names.index(slowest)} lacks the memory for a faster way)"
                plan = dataclasses.replace(plan, reason=reason)
    config = dataclasses.replace(plan.config, memory=run.config.memory)  # as it was asked for
    return dataclasses.replace(plan, config=config, remember=all(processes.gather(plan.remember)))


def _plan_config(config: RunConfig, processes: int) -> Plan:
    if not config.mask.modules_to_save or config.memory in WAYS:
        return plan_training(config, processes)
    plan = plan_training(dataclasses.replace(config, memory="plain"), processes)
    return dataclasses.replace(plan, reason=f"{plan.reason} (auto is plain with mask.modules_to_save)")


def _base_model(run: Run, plan: Plan) -> nn.Module:
    """Load the model to be masked, as the memory mode needs it. If this raises, nothing has been written."""
    config = run.config
    select_targets(load_outline(config.model), config.mask)  # first, as reading the weights may take minutes
    model = plan.mode.load(config.model, plan.device, run.processes)
    select_targets(model, config.mask)
    return model


def _mask(outputs: Outputs, placed: Placed, splits: Splits) -> Evaluation | None:
    """Mask the model, and quantise its base if planned; return the evaluation of the model before masking, if any."""
    run, model = outputs.run, placed.model
    config, kind, rows = run.config, run.config.model.quantization, score_rows(placed.model)
    if kind is None:
        before = outputs.evaluate_start("before, validation", placed, splits.validation)
        mask_model(model, drawn(config.mask))
        if rows is not None:
            rows.begin(drawn(config.mask))
    else:
        mask_model(model, drawn(config.mask))
        quantize_model(model, kind, masked=config.model.quantize_masked)
        with keep_all_weights(model):
            before = outputs.evaluate_start(f"before in {kind}, validation", placed, splits.validation)
    print_trainable_parameters(model)
    # A checkpoint has the first masks of a whole model; rows of them are found again.
    if (run.found is None or rows is not None) and config.mask.init in DATA_INITS:
        drawn_from = min(config.mask.calibration_rows, count_rows(splits.train) or 0)
        say(f"scores begin by mask.init={config.mask.init} on {drawn_from} rows of the training data")
        init_from_data(placed, config.mask, splits.train, batch_size=evaluation_batch(placed, config.train))
    if rows is None:
        grow_budget(model, 0, 1)  # as before the first step, for what the masks cost then
    if run.found is None and (run.processes.first or rows is not None):
        held_out = splits.validation if len(splits.validation) else splits.train
        alone = dataclasses.replace(placed, processes=ALONE, objective=CROSS_ENTROPY)
        cost = mask_cost_warning(alone, config.mask, held_out, evaluation_batch(placed, config.train))
        if cost is not None:
            say(cost)
    return before


def _learn(outputs: Outputs, placed: Placed, splits: Splits, initial: dict[str, Any]) -> Ended:
    """Train the scores, with checkpoints and a count of flips. The model then has the masks to export."""
    run, model, checkpoints = outputs.run, placed.model, RunCheckpoints(outputs.run)
    config, processes = run.config, run.processes
    steps = config.train.steps_for(count_rows(splits.train))
    # Only if autograd trains them are the scores in the model itself meanwhile.
    counts = placed.mode.trains_by_autograd and processes.first
    write = functools.partial(outputs.recorder.write, phase=PHASE)
    flips = FlipCounter(model, initial, write, every=max(1, -(-steps // POINTS))) if counts else None
    first_masks = FirstMasks(initial) if config.mask.init in DATA_INITS and score_rows(model) is None else None
    facts = {
        "plan": {"way": placed.mode.name, "remember": placed.remember},
        "data": splits.key,
        "base": base_hash(model),
    } | facts_of(placed.objective)
    processes.agree(facts)
    with outputs.training("mask fine-tune", splits.train) as on_step:
        validation = outputs.validation(on_step, placed, splits.validation, checkpoints.best())

        def after_step(report: StepReport) -> None:
            on_step(report)
            if flips is not None:
                flips(report)

        saver = checkpoints.saver(outputs.events, facts, on_step.go_on, [flips, validation, first_masks])
        hooks: dict[str, Any] = {"on_step": after_step, "saver": saver, "validation": validation}
        reports = train_masks(placed, splits.train, config.train, **hooks)
        if flips is not None:
            flips.finish(reports[-1])
    return checkpoints.finish(model, reports[-1], validation)


# ---------------------------------------------------------------------------------------------- shared by both commands


@contextlib.contextmanager
def _begin_run(command: str, start: RunConfig | Start) -> Iterator[Run]:
    """Yield the run, and hold the lock of its directory until the block ends."""
    start = resume_if_restarted(Begin(start) if isinstance(start, RunConfig) else start)
    with joined() as processes, open_start(start, processes, {"the command": command}) as (config, found):
        check_trackers(config.report_to)
        if config.data.streaming:
            config.train.steps_for(None)  # raises before anything is loaded if the number of steps is not set
        _check_same_command(command, start.directory, found)
        yield Run(command, config, start, found, processes)


def _check_same_command(command: str, directory: Path, found: Checkpoint | None) -> None:
    """Raise ValueError if a run is resumed by the command that did not begin it. Only mft train stores a plan."""
    began = "mft train" if found is not None and "plan" in found.facts()["facts"] else "mft finetune"
    if found is not None and began != command:
        raise ValueError(
            f"--resume must name a run of {command}, got {directory}, a run of {began}: {began} --resume {directory}"
        )


@contextlib.contextmanager
def _open_outputs(run: Run) -> Iterator[Outputs]:
    """Open the run's directory and its outputs; finally delete the checkpoints."""
    if not run.processes.first:
        yield Outputs(run, Recorder())
        return
    directory, again = run.directory, "start again"
    try:
        if isinstance(run.start, Begin):
            open_run(directory, run.config, overwrite=run.start.overwrite)
        else:  # a resumed run deletes nothing
            save_config(run.config, directory / CONFIG)
        again = f"go on with {run.command} --resume {directory}"
        with Outputs.open(run) as outputs:
            yield outputs
        again = f"{directory} has its result"
        RunCheckpoints(run).delete()
    except Stopped as stopped:
        say(f"{stopped.message}; go on with {run.command} --resume {directory}")
        raise
    except (NotWritten, BadCheckpoint) as error:
        raise OSError(f"{error}; then {again}") from error
