"""The training loop, and the three things that it trains: all weights, scores, or the weights of some layers.

For each step: backpropagate the loss of each of its micro-batches, then AdamW at the scheduled rate. How a step runs is
the business of plain.py and of the engines (layer_engine.py, layerwise.py), which give the same update in less memory.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from mft.budget.budget import budget_of
from mft.config import TrainConfig
from mft.data.batches import MicroBatch
from mft.engines.distributed import ALONE, Processes
from mft.engines.randomness import seeded
from mft.engines.start import OWN_FORWARD, SHARDED, Device, start_runner
from mft.engines.step import NonFiniteLoss, Runner, StepReport
from mft.masks.convert import masked_modules
from mft.masks.inspection import dropped_share
from mft.masks.saved_modules import saved_modules, train_whole
from mft.models.causal_lm import FEW
from mft.models.frozen_layers import PrefixMemory
from mft.models.linears import weight_name
from mft.models.next_tokens import check_next_tokens
from mft.models.packed_rows import keeping_apart
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective
from mft.surrogate.surrogate import Surrogate, surrogate_of
from mft.training.row_source import RowSource, open_rows
from mft.training.saver import Saver
from mft.training.validation import Validation


def finetune(model: nn.Module, dataset, train: TrainConfig, **options) -> list[StepReport]:
    """Train all weights of model in place; options as of train_loop."""
    model.requires_grad_(True)
    return train_loop(model, dataset, train, **options)


def train_masks(
    model: nn.Module, dataset, train: TrainConfig, *, way: str = "plain", device: Device = None, **options
) -> list[StepReport]:
    """Train the scores of a masked model in place, and its modules_to_save; nothing else.

    Scores learn by the straight-through gradient, or as sharpness and deletion_penalty of the MaskConfig say
    (surrogate.py), whatever way is taken; clipping is of what they learn by.

    Args:
        way: "plain", "in_place", "resident", "quantized", "layerwise" or "sharded" (docs/how-to/memory.md). All give
            the same update.
        device: of the four latter; None: the first GPU, or the CPU. model lies on the CPU, or there.
        options: as of train_loop.
    """
    masked = masked_modules(model)
    if not masked:
        raise ValueError("model must hold masked layers, found none: call mask_model(model, config) first")
    model.requires_grad_(False)
    for name, module in masked.items():
        if way != "plain":
            continue
        if not module.scores.is_floating_point():
            raise ValueError(
                f"memory must not be plain with int16 scores, which autograd cannot reach, got {name}: set memory: "
                "resident"
            )
        module.scores.requires_grad_(True)
    whole = saved_modules(model)
    if whole and way != "plain":
        raise ValueError(
            f"memory must be plain to train modules_to_save ({', '.join(whole)}), got {way}, which trains scores "
            "alone: set memory: plain"
        )
    train_whole(model, whole)
    return train_loop(model, dataset, train, way=way, device=device, surrogate=checked_surrogate(model), **options)


def checked_surrogate(model: nn.Module) -> Surrogate | None:
    """What the scores of a masked model learn by; None: the straight-through gradient.

    Raises: ValueError where a mask has no threshold to count from.
    """
    surrogate = surrogate_of(model)
    free = [name for name, module in masked_modules(model).items() if module.threshold is None]
    if surrogate is not None and free:
        raise ValueError(f"threshold must be a number with mask.sharpness, which counts from it, got None in {free[0]}")
    return surrogate


def train_weights(model: nn.Module, modules: list[str], dataset, train: TrainConfig, **options) -> list[StepReport]:
    """Train the weights of the named modules in place: what masks must beat. Options as of train_loop."""
    model.requires_grad_(False)
    for name in modules:
        model.get_parameter(weight_name(model, name)).requires_grad_(True)
    return train_loop(model, dataset, train, **options)


def train_loop(
    model: nn.Module,
    dataset,
    train: TrainConfig,
    *,
    way: str = "plain",
    device: Device = None,
    memory: PrefixMemory | None = None,
    remember: bool = True,
    before_update: Callable[[int, int], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    saver: Saver | None = None,
    processes: Processes = ALONE,
    objective: Objective = CROSS_ENTROPY,
    validation: Validation | None = None,
    surrogate: Surrogate | None = None,
) -> list[StepReport]:
    """Train what requires grad; the model ends in eval mode.

    What is random in it, dropout say, comes from train.seed; torch's generators are the caller's again afterwards.

    Args:
        dataset: rows of input_ids, labels (-100: not scored) and document; or StreamedRows, whose frozen layers'
            outputs are not remembered, and which go on where they are.
        way, device: see train_masks.
        memory: of the frozen layers' outputs, shared with other runs on the same rows.
        remember: whether to remember them at all; without a memory, done when rows are seen twice. Not done where the
            model draws at random in training: a frozen layer's dropout is drawn anew in each pass.
        before_update: called with (step, steps) when a step's gradients are complete and not yet clipped or applied; it
            may change them (of fp32 parameters: the .grad) and the parameters. Belongs to way "plain".
        saver: writes checkpoints, and may begin at one; on_step does not hear of the steps done before.
        processes: those that train together, each of which calls this with the same arguments; see distributed.py.
        objective: what is made smaller, cross entropy unless given; see docs/how-to/objectives.md.
        validation: evaluates as train says, and may end the run before its last step; it must be one of saver's
            counters to go on with the run.
        surrogate: what the scores of model learn by, in place of the straight-through gradient.
    Raises: ValueError if the model predicts no next tokens, or has too few positions. NonFiniteLoss, naming step, rows
        and documents; the step's gradients are not applied. RuntimeError for a lack of memory, naming rows or layer.
    """
    rows = open_rows(dataset, train, processes)
    if before_update is not None and way != "plain":
        raise ValueError(f"before_update must be None unless way is plain, whose gradients it may change, got {way!r}")
    if train.evaluates != (validation is not None):
        given = "given" if train.evaluates else "None"
        raise ValueError(
            f"validation must be {given} where train.eval_every is {train.eval_every} and train.eval_minutes is "
            f"{train.eval_minutes}, got {type(validation).__name__}"
        )
    processes.check(train)
    _check_objective(objective, model, dataset)
    objective.forget()
    first_row = rows.first()
    check_next_tokens(model.config, type(model).__name__, first_row.shape[1])
    steps = train.steps_for(rows.count)
    if rows.count is None or not remember:
        memory = None
    elif memory is None and steps * train.batch_size * train.accumulation > rows.count:
        memory = PrefixMemory()
    few = first_row[:, :FEW].to(next(model.parameters()).device)
    processes.check_model(model, few)
    counted_weights = _weights_of_free_masks(model)
    budget = budget_of(model)
    reports: list[StepReport] = []
    with (
        seeded(train.seed),
        keeping_apart(model, dataset, few, train.batch_size),
        training_mode(model, checkpointed=way in (*OWN_FORWARD, SHARDED) and train.gradient_checkpointing),
        contextlib.nullcontext() if saver is None else saver.listening(),
    ):
        updated = None if before_update is None else lambda: before_update(len(reports) + 1, steps)
        runner = start_runner(
            *(model, few, way, device, train, memory, processes),
            before_update=updated,
            objective=objective,
            surrogate=surrogate,
        )
        try:
            if way not in (*OWN_FORWARD, SHARDED):
                _rehearse(runner, rows, train)
            if saver is not None:
                with contextlib.nullcontext() if runner.in_lockstep else processes.together():
                    reports += saver.begin(runner, rows)
            if budget is not None:
                budget.grow(len(reports), steps)
                runner.relearned()
            if not runner.in_lockstep:
                processes.agree_on(runner.learned())
            ended = False
            if validation is not None:
                validation.begin(lambda: 0 if saver is None else saver.told)
                # Of the step that a checkpoint was of, if a signal came before it was evaluated.
                ended = bool(reports) and validation.after_step(model, runner, reports[-1], train, processes)
            begin = time.perf_counter() - (reports[-1].seconds if reports else 0.0)
            for step in range(len(reports) + 1, 1 if ended else steps + 1):
                batches = rows.next_step()
                counted = sum(objective.count(batch) for batch in batches)
                length = sum(batch.input_ids.numel() for batch in batches)
                count, tokens = (int(total) for total in processes.sum(counted, length))
                losses = _Losses(f"step {step} of {steps}", train)
                lr = train.lr * schedule_factor(step, steps, train)
                if surrogate is not None:
                    surrogate.sharpen(step, steps)
                if budget is not None:
                    budget.grow(step, steps)
                runner.step(batches, 1 / max(count, 1), lr, train.max_grad_norm, losses)
                runner.check()
                (loss,) = processes.sum(losses.total)
                seconds = time.perf_counter() - begin
                logged = step % train.log_every == 0 or step == steps
                dropped = dropped_share(runner.packed_masks(), counted_weights) if counted_weights and logged else None
                reports.append(StepReport(step, steps, loss / max(count, 1), lr, tokens, seconds, dropped))
                if on_step is not None:
                    on_step(reports[-1])
                if validation is not None:
                    before = time.perf_counter()
                    ended = validation.after_step(model, runner, reports[-1], train, processes)
                    begin += time.perf_counter() - before  # tokens a second are those of training
                if saver is not None:
                    saver.after_step(runner, reports, ended)
                if ended:
                    break
            runner.check_learned()
            if not runner.in_lockstep:
                processes.agree_on(runner.learned())  # else their machines compute differently
            runner.finish()
        finally:
            runner.close()
    return reports


def _weights_of_free_masks(model: nn.Module) -> int:
    """Of masks whose share is free, with a threshold that stays or a budget that grows; 0 where a ratio says it."""
    masked = masked_modules(model).values()
    free = budget_of(model) is not None or any(m.threshold is not None for m in masked)
    return sum(m.scores.numel() for m in masked) if free else 0


def _check_objective(objective: Objective, model: nn.Module, dataset) -> None:
    objective.check_rows(dataset)
    scores = {id(module.scores) for module in masked_modules(model).values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in scores]
    if objective.of_base and (others or not scores):
        raise ValueError(
            f"objective {objective.name} must train masks alone, since it holds them to the base that they lie on, got "
            f"{others[0] if others else 'no mask'} to train: take another objective, or leave out mask.modules_to_save"
        )


def _rehearse(runner: Runner, rows: RowSource, train: TrainConfig) -> None:
    """The rows that score most tokens first, without an update: what does not fit shows before anything is learned.

    Rows have one length, so nothing else can make one step larger than another.
    """
    heaviest = rows.heaviest()
    if heaviest is not None:
        runner.step([heaviest], 1.0, None, train.max_grad_norm, _Losses("the rehearsal", train))


class _Losses:
    """Adds up the losses of a step's micro-batches; the first that is not finite stops the step."""

    def __init__(self, step: str, train: TrainConfig) -> None:
        self.total = 0.0
        self._step, self._train = step, train

    def __call__(self, batch: MicroBatch, total: Tensor) -> None:
        loss = total.item()
        if not math.isfinite(loss):
            of = f" of {', '.join(batch.sources)}" if batch.sources else ""
            raise NonFiniteLoss(
                f"the loss must stay finite, got {loss} at {self._step} in the batch of rows {batch.rows} (documents "
                f"{batch.documents}{of}): lower train.lr (now {self._train.lr:g}) or look at these rows"
            )
        self.total += loss


def schedule_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Share of train.lr at a step counted from 1: rises over warmup_ratio of the steps, then falls towards 0.

    linear: the first step after the warm-up takes the whole rate, the last one 1 / (steps - warm-up) of it.
    """
    warmup = int(train.warmup_ratio * steps)
    if step <= warmup:
        return step / (warmup + 1)
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup - 1) / max(1, steps - warmup)
    return 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def training_mode(model: nn.Module, *, checkpointed: bool) -> Iterator[None]:
    """Training mode, with gradient checkpointing if asked for; eval mode and no checkpointing afterwards."""
    # TODO: drop the old names when transformers >= 6 is the floor
    renamed = hasattr(model, "activation_checkpointing_enable")
    kind = "activation_checkpointing" if renamed else "gradient_checkpointing"
    model.train()
    if checkpointed:
        getattr(model, f"{kind}_enable")(**{f"{kind}_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        if checkpointed:
            getattr(model, f"{kind}_disable")()
        model.eval()
