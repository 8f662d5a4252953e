"""Run mft finetune and mft train from the configuration to the result; also for use from Python.

    directory = run_train(load_config("run.yaml", ["train.steps=100"]))      # output_dir/masks
    directory = run_train(Resume("runs/mine"))                               # resumes from its newest checkpoint

Both lock the run's directory while they work, write checkpoints, metrics, a table and a plot there, and print their
progress. The result is written last. A run is finished when the directory has its result.
"""

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import CONFIG, DATA_INITS, WAYS, RunConfig, TrainConfig
from mft.config_file import config_values, save_config
from mft.data.sources import Source, open_source
from mft.data.splits import Splits
from mft.data.streams import count_rows
from mft.data.system_prompt import shared_system
from mft.engines.distributed import Processes, joined
from mft.engines.sharded.score_rows import ScoreRows, score_rows
from mft.engines.start import OWN_FORWARD, SHARDED
from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation, paired_difference
from mft.evaluation.evaluated_base import check_exact
from mft.evaluation.mask_cost import said_of_cost
from mft.evaluation.table import evaluation_tables, figure_lines, source_losses
from mft.files.atomic import NotWritten, remove, write_whole
from mft.files.json_file import finite
from mft.importance.scores import drawn, init_from_data
from mft.masks.budget import grow_budget
from mft.masks.convert import keeping_all, mask_model, print_trainable_parameters
from mft.masks.export import base_hash, save_masks
from mft.masks.inspection import flip_share, initial_masks
from mft.masks.location import MASKS
from mft.masks.quantize import quantize_model
from mft.masks.targets import select_targets
from mft.models.pretrained import load_model, load_outline, load_unread, save_model
from mft.models.weight_files import weight_files
from mft.number_formats import state_bytes
from mft.objectives.objective import Objective
from mft.tracking.console import console, say
from mft.tracking.curves import PLOT
from mft.tracking.markdown import markdown_table
from mft.tracking.metrics import EVALUATION_BATCH, Recorder, Steps
from mft.tracking.progress import Progress
from mft.tracking.trackers import Trackers, check_trackers
from mft.training.best import Best
from mft.training.checkpoint import BadCheckpoint, Checkpoint
from mft.training.core_watch import CoreWatch
from mft.training.flips import PHASE, POINTS, FirstMasks, FlipCounter
from mft.training.inputs import read_data, read_model
from mft.training.loop import finetune, train_masks
from mft.training.objectives import facts_of, make_objective
from mft.training.plan import Plan, plan_training, replan
from mft.training.resume import Begin, Start, after_restart, flat, started
from mft.training.run_directory import (
    BEST,
    CHECKPOINTS,
    MODEL,
    TABLE_JSON,
    TABLE_MARKDOWN,
    open_run,
)
from mft.training.saver import Counter, Saver, Stopped
from mft.training.validation import Ended, Standing, Validation, said_of, said_of_stop

VALIDATION = "validation"  # the name of the phase in the metrics


def run_finetune(start: RunConfig | Start) -> Path:
    """Train all weights of config.model on config.data, and save it as an ordinary model.

    Args: start: A configuration, for a run in a new output_dir; or Begin or Resume.
    Returns: output_dir/model.
    Raises: ValueError if the configuration, the data or the directory do not allow the run, before anything is written;
        OSError if the disk fails; SystemExit after SIGTERM, SIGHUP or Ctrl-C, once a checkpoint is written.
    """
    with _begun("mft finetune", start) as run:
        check_exact(run.config.model, "finetune")
        if run.config.objective.of_base:
            raise ValueError(
                "objective.name must be cross_entropy or distill in mft finetune, which changes the base, got "
                f"{run.config.objective.name}, which compares masks with the base: use mft train"
            )
        return _finetune(run)


def run_train(start: RunConfig | Start) -> Path:
    """Train masks on config.model with the settings of config.mask, and save them.

    config.memory names the memory mode; with "auto" the fastest mode that fits is used.

    Args, Raises: as run_finetune.
    Returns: output_dir/masks.
    """
    with _begun("mft train", start) as run:
        return _train(run)


# ---------------------------------------------------------------------------------------------- the steps, in order


def _finetune(run: "_Run") -> Path:
    config = run.config
    run.processes.check(config.train)
    splits = _read_splits(config)
    model, tokenizer = read_model(config.model)
    objective = make_objective(config)
    facts = {"data": splits.key} | facts_of(objective)
    run.processes.agree(facts)
    with run.opened() as recorder:
        before = run.before(recorder, "before, validation", model, splits.validation, objective=objective)
        model.requires_grad_(True)
        print_trainable_parameters(model)
        with run.training(recorder, "full fine-tune", splits.train) as on_step:
            validation = run.validation(recorder, on_step, splits.validation, objective)
            reports = finetune(
                model,
                splits.train,
                config.train,
                on_step=on_step,
                saver=run.saver(recorder, on_step, facts, [validation]),
                processes=run.processes,
                objective=objective,
                validation=validation,
            )
        ended = run.ended(model, reports[-1], validation)
        after = run.after(recorder, model, splits.validation, step=ended.exported, objective=objective)
        if run.processes.first:
            with run.finishing(recorder, before, after, ended, MODEL) as result:
                save_model(model, tokenizer, result)
    return run.directory / MODEL


def _train(run: "_Run") -> Path:
    config = run.config
    plan = _plan(run)
    say(plan.reason)
    plan.write_into(config)
    source = open_source(config.data)
    splits = _read_splits(config, source)
    system = shared_system(source)
    model = _base_model(run, plan)
    objective = make_objective(config)
    with run.opened() as recorder:
        before = _mask(run, plan, model, splits, recorder, objective)
        rows = score_rows(model)
        initial = initial_masks(model) if rows is None else rows.masks()
        ended = _learn(run, plan, model, splits, recorder, initial, objective)
        asked = {"step": ended.exported, "objective": objective, **_evaluated(config, plan, model)}
        after = run.after(recorder, model, splits.validation, **asked)
        masks, share = None, 0.0
        if rows is not None:
            own = rows.masks()
            masks, share = rows.gathered(own), rows.flipped(initial, own)
        if run.processes.first:
            flipped = 100 * (flip_share(model, initial) if rows is None else share)
            console.print(f"{flipped:.2f} % of the mask's bits flipped since initialisation", highlight=False)
            with run.finishing(recorder, before, after, ended, MASKS) as result:
                named = {"base_model_name_or_path": config.model.name, "system_prompt": system}
                save_masks(model, result, masks=masks, coding=config.coding, **named)
    return run.directory / MASKS


def _read_splits(config: RunConfig, source: Source | None = None) -> Splits:
    splits = read_data(config, source)
    if config.train.evaluates:
        splits.rows_of(VALIDATION)
    return splits


def _plan(run: "_Run") -> Plan:
    """Plan how all processes train, before any weight is loaded."""
    config, found, processes = run.config, run.found, run.processes
    processes.check(config.train)
    if found is not None:
        plan = replan(config, **found.facts()["facts"]["plan"])
    else:
        with processes.together():
            plan = _planned(config, processes.count)
        formats = min(processes.gather((plan.scores, plan.moments)), key=lambda pair: state_bytes(*pair))
        if formats != (plan.scores, plan.moments):
            config = copy.deepcopy(config)
            config.mask.scores_dtype, config.train.moments = formats
        with processes.together():
            plan = plan if config is run.config else _planned(config, processes.count)
        ways = processes.gather(plan.way)
        slowest = max(ways, key=WAYS.index)  # processes may differ in free memory
        with processes.together():
            if slowest != plan.way:
                plan = _planned(dataclasses.replace(config, memory=slowest), processes.count)
                reason = f"{plan.reason} (process {ways.index(slowest)} lacks the memory for a faster way)"
                plan = dataclasses.replace(plan, reason=reason)
    return dataclasses.replace(plan, remember=all(processes.gather(plan.remember)))


def _planned(config: RunConfig, processes: int) -> Plan:
    if not (config.mask.modules_to_save and config.memory == "auto"):
        return plan_training(config, processes)
    plan = plan_training(dataclasses.replace(config, memory="plain"), processes)
    return dataclasses.replace(plan, reason=f"{plan.reason} (auto is plain with mask.modules_to_save)")


def _base_model(run: "_Run", plan: Plan) -> nn.Module:
    """Load the model to be masked; with memory: sharded its weights stay in their files, if they can be read there.

    If this raises, nothing has been written.
    """
    config = run.config
    select_targets(load_outline(config.model), config.mask)  # first, as reading the weights may take minutes
    model, _ = (load_unread if plan.way == SHARDED else load_model)(config.model)
    if weight_files(model) is not None:
        ScoreRows(model, run.processes, plan.device)
    if plan.way in OWN_FORWARD:
        model.to(plan.device)
    select_targets(model, config.mask)
    return model


def _evaluated(config: RunConfig, plan: Plan, model: nn.Module) -> dict[str, Any]:
    """Return the options of evaluate that say where the model runs."""
    way = plan.way
    if way == SHARDED and score_rows(model) is None:  # the whole model is then in host memory
        way = "plain" if plan.device.type == "cpu" else "layerwise"
    where: dict[str, Any] = {"way": way, "device": plan.device}
    return where if way in OWN_FORWARD else where | {"batch_size": config.train.batch_size}


def _mask(
    run: "_Run", plan: Plan, model: nn.Module, splits: Splits, recorder: Recorder, objective: Objective
) -> Evaluation | None:
    """Mask the model, and quantise its base if planned; return the evaluation of the model before masking, if any."""
    config, kind, options = run.config, plan.quantization, _evaluated(run.config, plan, model)
    measured = options | {"objective": objective}
    rows = score_rows(model)
    if kind is None:
        before = run.before(recorder, "before, validation", model, splits.validation, **measured)
        mask_model(model, drawn(config.mask))
        if rows is not None:
            rows.begin(drawn(config.mask))
    else:
        mask_model(model, drawn(config.mask))
        quantize_model(model, kind, masked=config.model.quantize_masked)
        with keeping_all(model):
            before = run.before(recorder, f"before in {kind}, validation", model, splits.validation, **measured)
    print_trainable_parameters(model)
    # A checkpoint has the first masks of a whole model; rows of them are found again.
    if (run.found is None or rows is not None) and config.mask.init in DATA_INITS:
        drawn_from = min(config.mask.calibration_rows, count_rows(splits.train) or 0)
        say(f"scores begin by mask.init={config.mask.init} on {drawn_from} rows of the training data")
        init_from_data(model, config.mask, splits.train, processes=run.processes, **options)
    if rows is None:
        grow_budget(model, 0, 1)  # as before the first step, for what the masks cost then
    if run.found is None and (run.processes.first or rows is not None):
        cost = said_of_cost(
            model, config.mask, splits.validation if len(splits.validation) else splits.train, **options
        )
        if cost is not None:
            say(cost)
    return before


def _learn(
    run: "_Run",
    plan: Plan,
    model: nn.Module,
    splits: Splits,
    recorder: Recorder,
    initial: dict[str, Any],
    objective: Objective,
) -> Ended:
    """Train the scores, with checkpoints and a count of flips. The model then has the masks to export."""
    config, processes = run.config, run.processes
    steps = config.train.steps_for(count_rows(splits.train))
    # Only with memory: plain are the scores in the model itself while they train.
    counts = plan.way == "plain" and processes.first
    flips = FlipCounter(model, initial, every=max(1, -(-steps // POINTS))) if counts else None
    begun = FirstMasks(initial) if config.mask.init in DATA_INITS and score_rows(model) is None else None
    facts = {
        "plan": {"way": plan.way, "remember": plan.remember},
        "data": splits.key,
        "base": base_hash(model),
    } | facts_of(objective)
    processes.agree(facts)
    with run.training(recorder, "mask fine-tune", splits.train) as on_step:
        batch = _evaluated(config, plan, model).get("batch_size", EVALUATION_BATCH)
        validation = run.validation(recorder, on_step, splits.validation, objective, batch)

        def after_step(report: StepReport) -> None:
            on_step(report)
            if flips is not None and (counted := flips(report)) is not None:
                recorder.write(phase=PHASE, **counted)

        reports = train_masks(
            model,
            splits.train,
            config.train,
            way=plan.way,
            device=plan.device,
            remember=plan.remember,
            on_step=after_step,
            saver=run.saver(recorder, on_step, facts, [flips, validation, begun]),
            processes=processes,
            objective=objective,
            validation=validation,
        )
        if flips is not None and (counted := flips.finish(reports[-1])) is not None:
            recorder.write(phase=PHASE, **counted)
    return run.ended(model, reports[-1], validation)


# ---------------------------------------------------------------------------------------------- shared by both commands


@contextlib.contextmanager
def _begun(command: str, start: RunConfig | Start) -> Iterator["_Run"]:
    """Yield the run, and hold the lock of its directory until the block ends."""
    start = after_restart(Begin(start) if isinstance(start, RunConfig) else start)
    with joined() as processes, started(start, processes, {"the command": command}) as (config, found):
        check_trackers(config.report_to)
        if config.data.streaming:
            config.train.steps_for(None)  # raises before anything is loaded if the number of steps is not set
        _check_same_command(command, start.directory, found)
        cores = CoreWatch.of(processes)
        yield _Run(command, copy.deepcopy(config), start, found, processes, cores)  # a plan changes the config


def _check_same_command(command: str, directory: Path, found: Checkpoint | None) -> None:
    """Raise ValueError if a run is resumed by the command that did not begin it. Only mft train stores a plan."""
    began = "mft train" if found is not None and "plan" in found.facts()["facts"] else "mft finetune"
    if found is not None and began != command:
        raise ValueError(
            f"--resume must name a run of {command}, got {directory}, a run of {began}: {began} --resume {directory}"
        )


@dataclass(frozen=True)
class _Run:
    """A run. found: the checkpoint from which it resumes. Of several processes only the first one writes files."""

    command: str
    config: RunConfig
    start: Start
    found: Checkpoint | None
    processes: Processes
    cores: CoreWatch

    @property
    def directory(self) -> Path:
        return self.start.directory

    @contextlib.contextmanager
    def opened(self) -> Iterator[Recorder]:
        """Yield the recorder of the run's directory, restored to the checkpoint; finally delete the checkpoints."""
        directory, found = self.directory, self.found
        if not self.processes.first:
            yield Recorder()
            return
        again = "start again"
        try:
            if isinstance(self.start, Begin):
                open_run(directory, self.config, overwrite=self.start.overwrite)
            else:  # a resumed run deletes nothing
                save_config(self.config, directory / CONFIG)
            again = f"go on with {self.command} --resume {directory}"
            events = found.run()["events"] if found is not None else []
            with self._trackers(events) as trackers:
                more: dict[str, Any] = {"trackers": trackers, "plot": True, "objective": self.config.objective.name}
                yield Recorder(directory, Progress(console), events=events, **more)
            again = f"{directory} has its result"
            for name in (CHECKPOINTS, BEST):
                if (directory / name).exists():
                    remove(directory / name)
        except Stopped as stopped:
            say(f"{stopped.message}; go on with {self.command} --resume {directory}")
            raise
        except (NotWritten, BadCheckpoint) as error:
            raise OSError(f"{error}; then {again}") from error

    @contextlib.contextmanager
    def _trackers(self, events: list[dict[str, Any]]) -> Iterator[Trackers]:
        """Open the trackers of config.report_to until the block ends."""
        config, begun = self.config, isinstance(self.start, Begin)
        told = None if begun else events
        trackers = Trackers(config.report_to, self.directory, config.project, flat(config), told, say)
        try:
            yield trackers
        finally:
            trackers.close()

    def before(self, recorder: Recorder, phase: str, model: nn.Module, rows: Any, **options: Any) -> Evaluation | None:
        """Call recorder.evaluate, if there are rows. A resumed run does not record the result again."""
        if not len(rows):
            return None
        own = recorder if self.found is None else Recorder(progress=recorder.progress)
        self.cores.begin()
        before = own.evaluate(phase, model, rows, step=0, **options)
        self.cores.look("evaluation")
        return before

    def after(self, recorder: Recorder, model: nn.Module, rows: Any, **options: Any) -> Evaluation | None:
        return recorder.evaluate("after, validation", model, rows, **options) if len(rows) else None

    @contextlib.contextmanager
    def training(self, recorder: Recorder, phase: str, rows: Any) -> Iterator[Steps]:
        """Enter recorder.training, after a line about the amount of data. Warns if busy cores slow the run down."""
        train = self.config.train
        if self.processes.first:
            say(said_of_training(train, rows))
        self.cores.begin()
        with recorder.training(phase, rows, train, after_step=lambda: self.cores.look("a step")) as on_step:
            yield on_step

    def saver(
        self, recorder: Recorder, on_step: Steps, facts: dict[str, Any], counters: Sequence[Counter | None]
    ) -> Saver | None:
        """Return what writes the checkpoints and resumes from found; None if neither is needed."""
        config, minutes = self.config, self.config.checkpoint_minutes
        if minutes is None and self.found is None:
            return None

        def kept() -> dict[str, Any]:
            events = [] if recorder.metrics is None else recorder.metrics.events
            return {"config": config_values(config), "events": events}

        return Saver(
            self.directory / CHECKPOINTS,
            math.inf if minutes is None else minutes,
            self.found,
            facts=facts,
            run=kept,
            force=self.start.force,
            on_found=on_step.go_on,
            processes=self.processes,
            counters=[counter for counter in counters if counter is not None],
        )

    def validation(
        self, recorder: Recorder, on_step: Steps, rows: Any, objective: Objective, batch_size: int = EVALUATION_BATCH
    ) -> Validation | None:
        """Return what evaluates the run on rows while it trains; None if the configuration asks for no evaluation."""
        train = self.config.train
        if not train.evaluates:
            return None

        @contextlib.contextmanager
        def shown(step: int) -> Iterator[Callable[[int, int], None]]:
            with on_step.shown.within(f"step {step}, {VALIDATION}", len(rows)) as phase:
                yield lambda done, tokens: phase.advance(done, tokens=tokens)

        def on_result(step: int, result: Evaluation, seconds: float, standing: Standing) -> None:
            stands = {"best": standing.best, "without": standing.without, "seconds": seconds}
            recorder.evaluated(VALIDATION, result, step, objective, **stands)
            if self.processes.first:
                say(f"{VALIDATION} after step {step}: {said_of(result, step, standing, train)}")

        best = Best(self.directory / BEST) if train.keep_best else None
        return Validation(rows, objective=objective, best=best, batch_size=batch_size, shown=shown, on_result=on_result)

    def ended(self, model: nn.Module, last: StepReport, validation: Validation | None) -> Ended:
        """Return how the run ended, and print it. Puts the exported step (the best or the last) into the model."""
        if validation is None:
            return Ended(last.step, last.step, last.steps)
        standing, train = validation.standing, self.config.train
        if standing.stopped and last.step < last.steps:
            say(said_of_stop(standing, last, train))
        if not train.keep_best:
            return Ended(last.step, last.step, last.steps)
        if standing.best != last.step and (self.processes.first or score_rows(model) is not None):
            Best(self.directory / BEST).put(model, standing.best)
        say(f"the best step is {standing.best} of {last.step}, with a validation loss of {standing.best_loss:.4f}")
        return Ended(standing.best, last.step, last.steps)

    @contextlib.contextmanager
    def finishing(
        self, recorder: Recorder, before: Evaluation | None, after: Evaluation | None, ended: Ended, name: str
    ) -> Iterator[Path]:
        """Write table, plot and metrics; then the block writes the result under this name, which finishes the run."""
        directory = self.directory
        if before is not None and after is not None:
            self._write_table(before, after, ended)
        best = ended.exported if ended.exported < ended.last else None
        recorder.draw(directory / PLOT, best=best, note=ended.note)
        if recorder.metrics is not None:
            recorder.metrics.sync()
        yield directory / name
        table = "" if before is None else ", table"
        say(f"result: {directory / name}; metrics{table} and plot: {directory}/")

    def _write_table(self, before: Evaluation, after: Evaluation, ended: Ended) -> None:
        directory, results = self.directory, {"before": before, f"after{ended.words}": after}
        tables = evaluation_tables("validation", results)
        for table in tables:
            console.print(table)
        write_whole(directory / TABLE_MARKDOWN, "\n".join(map(markdown_table, tables)))
        objective = self.config.objective.name
        for line in figure_lines(objective, results):
            say(line)
        difference, error = paired_difference(after, before)
        numbers: dict[str, Any] = {
            name: {"loss": result.loss, "accuracy": result.accuracy}
            | {f"{objective}/{key}": figure for key, figure in result.figures.items()}
            for name, result in (("before", before), ("after", after))
        }
        numbers |= {"loss after - before": difference, "standard error": error}
        numbers |= {"documents": len(after.documents), "tokens": int(after.tokens.sum())} | ended.numbers
        if parts := source_losses({"before": before, "after": after}):
            numbers["sources"] = parts
        write_whole(directory / TABLE_JSON, json.dumps(finite(numbers), indent=2) + "\n")


def said_of_training(train: TrainConfig, rows: Any) -> str:
    """Return the line with the amount of data and the units of the figures shown while training."""
    count = count_rows(rows)
    steps, taken = train.steps_for(count), train.batch_size * train.accumulation
    seen = "" if count is None else f", so each of {count} rows about {steps * taken / count:.2g} times"
    return f"{steps} steps of {taken} rows{seen}; loss is in nats per token, tokens/s count padding too"
