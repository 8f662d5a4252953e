"""Start the engine of a memory mode on a model: its tensors are moved to where that mode keeps them.

A "way" is a memory mode: plain, in_place, resident, quantized, layerwise or sharded.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.config import TrainConfig
from mft.engines.distributed import ALONE, Processes
from mft.engines.in_place import InPlace, InPlaceStates
from mft.engines.layer_calls import LayerCalls
from mft.engines.layer_engine import LayerEngine
from mft.engines.layerwise import Layerwise
from mft.engines.offload import Mover
from mft.engines.plain import Plain
from mft.engines.randomness import draws_at_random
from mft.engines.resident import Resident
from mft.engines.score_states import ScoreStates, current_masks, score_groups, score_optimizer
from mft.engines.sharded.engine import start_sharded
from mft.engines.step import Runner
from mft.masks.budget import budget_of
from mft.masks.convert import masked_modules
from mft.masks.surrogate import Surrogate
from mft.models.causal_lm import split_at_head
from mft.models.frozen_layers import PrefixMemory
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective

Device = torch.device | str | None

# The memory modes that run the model's own forward. ENGINES has those that run its layers one by one.
OWN_FORWARD = ("plain", "in_place")
SHARDED = "sharded"  # runs a spread copy of the model by its own forward
ENGINES: dict[str, type[LayerEngine]] = {"resident": Resident, "quantized": Resident, "layerwise": Layerwise}


def default_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_runner(
    model: nn.Module,
    few: Tensor,
    way: str,
    device: Device,
    train: TrainConfig,
    memory: PrefixMemory | None = None,
    processes: Processes = ALONE,
    *,
    before_update: Callable[[], None] | None = None,
    objective: Objective = CROSS_ENTROPY,
    surrogate: Surrogate | None = None,
) -> Runner:
    """Return the runner that trains model; close() gives the model back.

    Args:
        way: As for start_engine; also "plain" and "in_place", where the model stays on its device, and "sharded",
            where it stays on the CPU.
        before_update: Only for "plain": called when a step's gradients are complete.
        Others: see start_engine.
    """
    check_rule(
        train.batches_at_once is None or way == "layerwise",
        "train.batches_at_once",
        f"be null with memory: {way}, which runs one batch at a time",
        train.batches_at_once,
    )
    check_rule(
        train.reduce_every == "step" or way == SHARDED,
        "train.reduce_every",
        f"be step with memory: {way}, which decides itself when gradients are summed",
        train.reduce_every,
    )
    if way == SHARDED:
        return start_sharded(model, few, _device(device), train, processes, objective, surrogate)
    if way not in OWN_FORWARD:
        return start_engine(
            *(model, few, way, device),
            train=train,
            memory=memory,
            processes=processes,
            objective=objective,
            surrogate=surrogate,
        )
    if memory is not None and draws_at_random(model, few):
        memory = None
    run, head = split_at_head(model, few)
    if way == "in_place":
        optimizer = score_optimizer(score_groups(masked_modules(model).values()), train)
        states = InPlaceStates(model, optimizer, processes, surrogate, grad_dtype=_grad_dtype(train))
        with contextlib.ExitStack() as undo:
            undo.callback(states.close)
            runner = InPlace(model, states, run, head, memory, objective)
            undo.pop_all()
        return runner
    return Plain(model, train, run, head, memory, processes, before_update, objective, surrogate)


def start_engine(
    model: nn.Module,
    few: Tensor,
    way: str,
    device: Device = None,
    *,
    train: TrainConfig | None = None,
    memory: PrefixMemory | None = None,
    processes: Processes = ALONE,
    separate: bool | None = None,
    objective: Objective = CROSS_ENTROPY,
    surrogate: Surrogate | None = None,
) -> LayerEngine:
    """Start an engine on ``device``; close() gives the model back.

    Args:
        model: A model with or without masks, on the CPU or on device.
        few: A few tokens (1, T) on the model's device, for forward passes that find out how the model is run.
        way: "resident", "quantized" (the same over a base that is quantised already) or "layerwise".
        train: None for evaluation only.
        processes: The processes that train together; their gradients are summed for a step.
        separate: See Mover.
        objective: The objective to minimise.
        surrogate: The gradient of the scores; see ScoreStates.
    """
    if way not in ENGINES:
        raise ValueError(f"way must be one of {', '.join((*OWN_FORWARD, *ENGINES, SHARDED))}, got {way!r}")
    device = _device(device)
    masks = current_masks(masked_modules(model))
    with contextlib.ExitStack() as undo:
        for mask in masks:  # an earlier engine may have left the scores on another device than the weights
            mask.packed = mask.packed.to(few.device)
            mask.hold(None)
            undo.callback(mask.module.release)
        if train is not None and draws_at_random(model, few):
            raise ValueError(
                f"memory must be plain for a model with dropout, or other noise in training, got {way}: layers are run "
                "twice, and the two runs must agree; set the dropout of the model's configuration to 0"
            )
        run, head = split_at_head(model, few)
        calls = LayerCalls(model, run)
        calls.check(few)
        mover = Mover(device, separate=separate)
        states = None
        if train is not None:
            optimizer = score_optimizer(score_groups(mask.module for mask in masks), train)
            states = ScoreStates(masks, optimizer, mover, processes, surrogate, budget_of(model))
        dtype = None if train is None else _grad_dtype(train)
        engine = ENGINES[way](
            *(calls, head, masks, mover),
            states=states,
            grad_dtype=dtype,
            at_once=None if train is None else train.batches_at_once,
            memory=memory,
            objective=objective,
        )
        undo.pop_all()
    return engine


def _device(device: Device) -> torch.device:
    """Return the device of this name, or the default device."""
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch finds, got {device} and no GPU: leave it out, or say cpu")
    return device


def _grad_dtype(train: TrainConfig) -> torch.dtype | None:
    return None if train.grad_dtype is None else getattr(torch, train.grad_dtype)
