"""The training loop. It trains all weights, scores, or the weights of some layers.

Each step backpropagates the loss of each micro-batch, then runs AdamW at the scheduled rate. The engines run a step:
plain.py, and others such as layer_engine.py and layerwise.py, which give the same update with less memory.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from mft.config import TrainConfig
from mft.data.batches import MicroBatch
from mft.engines.mode import Device, place
from mft.engines.placed import Placed
from mft.engines.randomness import seeded
from mft.engines.step import NonFiniteLoss, Runner, StepReport
from mft.masks.budget import budget_of
from mft.masks.convert import masked_modules
from mft.masks.inspection import kept_weights
from mft.masks.saved_modules import saved_modules, train_whole
from mft.masks.surrogate import Surrogate, surrogate_of
from mft.models.causal_lm import FEW, input_device
from mft.models.frozen_layers import PrefixMemory
from mft.models.next_tokens import check_next_tokens
from mft.models.packed_rows import keep_apart
from mft.models.weight_files import weight_files
from mft.objectives.objective import Objective
from mft.training.row_source import RowSource, open_rows
from mft.training.saver import Saver
from mft.training.validation import Validation


@dataclass(frozen=True)
class Hooks:
    """What a training loop calls besides the engine.

    Args:
        on_step: Called with the report of each step, but not for the steps before a checkpoint that is resumed.
        before_update: Called with (step, steps) when a step's gradients are complete and not yet clipped or applied. It
            may change the gradients (for fp32 parameters: .grad) and the parameters. Only for way "plain".
        saver: Writes checkpoints, and may resume from one.
        validation: Evaluates as often as the settings say, and may end the run. It must be one of the saver's counters.
    """

    on_step: Callable[[StepReport], None] | None = None
    before_update: Callable[[int, int], None] | None = None
    saver: Saver | None = None
    validation: Validation | None = None


def finetune(model: nn.Module, dataset, train: TrainConfig, **options: Any) -> list[StepReport]:
    """Train all weights of model in place. options: see train_loop."""
    model.requires_grad_(True)
    return train_loop(model, dataset, train, **options)


def train_masks(
    model: nn.Module | Placed, dataset, train: TrainConfig, *, way: str = "plain", device: Device = None, **options: Any
) -> list[StepReport]:
    """Train the scores of a masked model in place, and its modules_to_save; nothing else.

    Scores learn from the straight-through or the surrogate gradient (surrogate.py), in every memory mode alike.

    Args:
        way: The memory mode: "plain", "in_place", "resident", "quantized", "layerwise" or "sharded"
            (docs/how-to/memory.md). All give the same update.
        device: For the last four modes; None: the first GPU, or the CPU. model is on the CPU or on this device.
        options: See train_loop.
    """
    placed = place(model, way=way, device=device)
    model, by_autograd = placed.model, placed.mode.trains_by_autograd
    masked = masked_modules(model)
    if not masked:
        raise ValueError("model must hold masked layers, found none: call mask_model(model, config) first")
    model.requires_grad_(False)
    for name, module in masked.items() if by_autograd else ():
        if not module.scores.is_floating_point():
            raise ValueError(
                f"memory must not be plain with int16 scores, which autograd cannot reach, got {name}: set memory: "
                "resident"
            )
        module.scores.requires_grad_(True)
    whole = saved_modules(model)
    if whole and not by_autograd:
        raise ValueError(
            f"memory must be plain to train modules_to_save ({', '.join(whole)}), got {placed.mode.name}, which trains "
            "scores alone: set memory: plain"
        )
    train_whole(model, whole)
    return train_loop(placed, dataset, train, surrogate=checked_surrogate(model), **options)


def checked_surrogate(model: nn.Module) -> Surrogate | None:
    """Return the surrogate gradient of a masked model, or None. Raises: ValueError if a mask has no fixed threshold."""
    surrogate = surrogate_of(model)
    free = [name for name, module in masked_modules(model).items() if module.threshold is None]
    if surrogate is not None and free:
        raise ValueError(
            "threshold must be a number with mask.sharpness, which is measured from the threshold, got None in "
            f"{free[0]}"
        )
    return surrogate


def train_loop(model: nn.Module | Placed, dataset, train: TrainConfig, **options: Any) -> list[StepReport]:
    """Train the parameters that require grad; the model ends in eval mode.

    Random operations are seeded by train.seed. torch's generators are restored afterwards.

    Args:
        dataset: Rows of input_ids, labels (-100: not scored) and document; or StreamedRows, which continue from where
            they are and whose frozen layers' outputs are not cached.
        options: The fields of Hooks, and the options of engines.mode.place: way, device, objective (see
            docs/how-to/objectives.md), processes, memory and remember.
    Raises: ValueError if the model predicts no next tokens, or has too few positions; NonFiniteLoss, which names step,
        rows and documents (the step's gradients are not applied); RuntimeError if memory runs out.
    """
    hooks = Hooks(**{field.name: options.pop(field.name) for field in fields(Hooks) if field.name in options})
    return _train(place(model, **options), dataset, train, hooks)


def _train(placed: Placed, dataset, train: TrainConfig, hooks: Hooks) -> list[StepReport]:
    model, mode, processes, objective = placed.model, placed.mode, placed.processes, placed.objective
    saver, validation = hooks.saver, hooks.validation
    rows = open_rows(dataset, train, processes)
    if hooks.before_update is not None and not mode.trains_by_autograd:
        raise ValueError(
            "before_update must be None unless way is plain, because it may only change the gradients of plain, got "
            f"{mode.name!r}"
        )
    if train.evaluates != (validation is not None):
        given = "given" if train.evaluates else "None"
        raise ValueError(
            f"validation must be {given} if train.eval_every is {train.eval_every} and train.eval_minutes is "
            f"{train.eval_minutes}, got {type(validation).__name__}"
        )
    processes.check(train)
    _check_objective(objective, model, dataset)
    objective.forget()
    first_row = rows.first()
    check_next_tokens(model.config, type(model).__name__, first_row.shape[1])
    steps = train.steps_for(rows.count)
    if rows.count is None or not placed.remember:
        placed = replace(placed, memory=None)
    elif placed.memory is None and steps * train.batch_size * train.accumulation > rows.count:
        placed = replace(placed, memory=PrefixMemory())
    sample = first_row[:, :FEW].to(input_device(model))
    if weight_files(model) is None:
        processes.check_model(model, sample)
    counted_weights = _weights_of_free_masks(model)
    reports: list[StepReport] = []
    with (
        seeded(train.seed),
        keep_apart(model, dataset, sample, train.batch_size),
        training_mode(model, checkpointed=train.gradient_checkpointing and not mode.runs_by_layers),
        contextlib.nullcontext() if saver is None else saver.handle_signals(),
    ):
        hook = hooks.before_update
        runner = placed.start(sample, train, None if hook is None else lambda: hook(len(reports) + 1, steps))
        placed = replace(placed, runner=runner)
        try:
            runner.check_apart(dataset, sample, train.batch_size)
            if mode.runs_by_layers:
                _rehearse(runner, rows, train)
            if saver is not None:
                with contextlib.nullcontext() if runner.in_lockstep else processes.together():
                    reports += saver.begin(runner, rows)
            _take_steps(placed, rows, train, hooks, reports, counted_weights)
            runner.states.check_learned()
            if not runner.in_lockstep:  # they differ if the processes' machines compute differently
                processes.agree_on(runner.states.learned())
            runner.finish()
        finally:
            runner.close()
    return reports


def _take_steps(
    placed: Placed,
    rows: RowSource,
    train: TrainConfig,
    hooks: Hooks,
    reports: list[StepReport],
    counted_weights: int,
) -> None:
    """Take the steps after those in reports, and append theirs. counted_weights: of _weights_of_free_masks."""
    runner, processes, objective, surrogate = placed.runner, placed.processes, placed.objective, placed.surrogate
    assert runner is not None, "it was started"
    saver, validation, budget = hooks.saver, hooks.validation, budget_of(placed.model)
    steps = train.steps_for(rows.count)
    if budget is not None:
        budget.grow(len(reports), steps)
        runner.states.refresh()
    if not runner.in_lockstep:
        processes.agree_on(runner.states.learned())
    ended = False
    if validation is not None:
        validation.begin(lambda: 0 if saver is None else saver.told)
        # A signal may have come after the checkpoint's step and before its evaluation.
        ended = bool(reports) and validation.after_step(placed, reports[-1], train)
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
        runner.states.check()
        (loss,) = processes.sum(losses.total)
        seconds = time.perf_counter() - begin
        logged = step % train.log_every == 0 or step == steps
        dropped = None
        if counted_weights and logged:
            kept: float = kept_weights(runner.states.packed_masks())
            kept = processes.sum(kept)[0] if runner.in_lockstep else kept
            dropped = 1 - kept / counted_weights
        reports.append(StepReport(step, steps, loss / max(count, 1), lr, tokens, seconds, dropped))
        if hooks.on_step is not None:
            hooks.on_step(reports[-1])
        if validation is not None:
            before = time.perf_counter()
            ended = validation.after_step(placed, reports[-1], train)
            begin += time.perf_counter() - before  # tokens/s are those of training only
        if saver is not None:
            saver.after_step(runner, reports, ended)
        if ended:
            break


def _weights_of_free_masks(model: nn.Module) -> int:
    """Return the number of masked weights if the dropped share can change: fixed thresholds, or a budget; else 0."""
    masked = masked_modules(model).values()
    free = budget_of(model) is not None or any(m.threshold is not None for m in masked)
    return sum(m.scores.numel() for m in masked) if free else 0


def _check_objective(objective: Objective, model: nn.Module, dataset) -> None:
    objective.check_rows(dataset)
    scores = {id(module.scores) for module in masked_modules(model).values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in scores]
    if objective.of_base and (others or not scores):
        raise ValueError(
            f"objective {objective.name} must train masks alone, because it compares the masked model with its base, "
            f"got {others[0] if others else 'no mask'} to train: take another objective, or leave out "
            "mask.modules_to_save"
        )


def _rehearse(runner: Runner, rows: RowSource, train: TrainConfig) -> None:
    """Run the rows with the most scored tokens, without an update, so that a lack of memory shows before training."""
    heaviest = rows.heaviest()
    if heaviest is not None:
        runner.step([heaviest], 1.0, None, train.max_grad_norm, _Losses("the rehearsal", train))


class _Losses:
    """Adds up the losses of a step's micro-batches. The first loss that is not finite stops the step."""

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
    """Return the factor of train.lr at a step counted from 1.

    It rises over the first warmup_ratio of the steps. After that it stays 1 ("constant") or falls towards 0: with
    "linear" from 1 at the first step after the warm-up to 1 / (steps - warm-up) at the last.
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
    """Enter training mode, with gradient checkpointing if asked for; afterwards eval mode without checkpointing."""
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
