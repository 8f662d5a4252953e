"""The training loop, and the three things that it trains: all weights, scores, or the weights of some layers.

For each step: for each of its micro-batches backpropagate the loss, then AdamW at the scheduled rate. What trains is
what requires grad; frozen leading layers run without autograd (see prefix.py).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mft.causal_lm import split_at_head
from mft.config import TrainConfig
from mft.convert import masked_modules
from mft.evaluate import take_rows
from mft.master_weights import MasterAdamW
from mft.prefix import FrozenPrefix, PrefixMemory
from mft.token_loss import backward_token_loss, count_labels


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class StepReport:
    """One optimiser step."""

    step: int  # from 1
    steps: int
    loss: float  # mean a token
    lr: float
    tokens: int  # of this step
    seconds: float  # since the loop began


def finetune(model: nn.Module, dataset, train: TrainConfig, **options) -> list[StepReport]:
    """Train all weights of model in place; options as of train_loop."""
    model.requires_grad_(True)
    return train_loop(model, dataset, train, **options)


def train_masks(model: nn.Module, dataset, train: TrainConfig, **options) -> list[StepReport]:
    """Train the scores of a masked model in place, and nothing else; options as of train_loop."""
    masked = masked_modules(model)
    if not masked:
        raise ValueError("model must hold masked layers, found none: call mask_model(model, config) first")
    model.requires_grad_(False)
    for module in masked.values():
        module.scores.requires_grad_(True)
    return train_loop(model, dataset, train, **options)


def train_weights(model: nn.Module, modules: list[str], dataset, train: TrainConfig, **options) -> list[StepReport]:
    """Train the weights of the named modules in place: what masks must beat. Options as of train_loop."""
    model.requires_grad_(False)
    for name in modules:
        model.get_submodule(name).weight.requires_grad_(True)
    return train_loop(model, dataset, train, **options)


def train_loop(
    model: nn.Module,
    dataset,
    train: TrainConfig,
    *,
    memory: PrefixMemory | None = None,
    remember: bool = True,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[StepReport]:
    """Train what requires grad; the model ends in eval mode.

    Args:
        dataset: rows of input_ids, labels (-100: not scored) and document.
        memory: of the frozen layers' outputs, shared with other runs on the same rows.
        remember: whether to remember them at all; without a memory, done when rows are seen twice.
    Raises: NonFiniteLoss, naming step, rows and documents; the step's gradients are not applied.
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to train on, got 0")
    device = next(model.parameters()).device
    steps = count_steps(train, len(dataset))
    if remember and memory is None and steps * train.batch_size * train.accumulation > len(dataset):
        memory = PrefixMemory()
    run, head = split_at_head(model, take_rows(dataset, [0], device)[0])
    prefix = FrozenPrefix(model, memory=memory if remember else None, run=run)
    stream = _row_numbers(len(dataset), train.seed)
    reports: list[StepReport] = []
    begin = time.perf_counter()
    trained = [p for p in model.parameters() if p.requires_grad]
    with _training_mode(model, train), MasterAdamW(trained, train) as optimizer:
        for step in range(1, steps + 1):
            micro_batches = [[next(stream) for _ in range(train.batch_size)] for _ in range(train.accumulation)]
            batches = [(rows, *take_rows(dataset, rows, device)) for rows in micro_batches]
            count = sum(count_labels(labels) for _, _, labels, _ in batches)
            total = 0.0
            for rows, input_ids, labels, documents in batches:
                loss = backward_token_loss(head, prefix(input_ids, rows), labels, 1 / max(count, 1)).item()
                if not math.isfinite(loss):
                    raise NonFiniteLoss(
                        f"the loss must stay finite, got {loss} at step {step} of {steps} in the batch of rows {rows} "
                        f"(documents {documents}): lower train.lr (now {train.lr:g}) or look at these rows"
                    )
                total += loss
            lr = train.lr * schedule_factor(step, steps, train)
            optimizer.set_lr(lr)
            if train.max_grad_norm is not None:
                optimizer.clip(train.max_grad_norm)
            optimizer.step()
            tokens = sum(ids.numel() for _, ids, _, _ in batches)
            reports.append(StepReport(step, steps, total / max(count, 1), lr, tokens, time.perf_counter() - begin))
            if on_step is not None:
                on_step(reports[-1])
    return reports


def count_steps(train: TrainConfig, rows: int) -> int:
    """Optimiser steps of a run on so many rows."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil((train.epochs or 0) * rows / (train.batch_size * train.accumulation)))


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


def _row_numbers(count: int, seed: int) -> Iterator[int]:
    """Every row once an epoch, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextlib.contextmanager
def _training_mode(model: nn.Module, train: TrainConfig) -> Iterator[None]:
    """Training mode, with gradient checkpointing if asked for; eval mode and no checkpointing afterwards."""
    # TODO: drop the old names when transformers >= 6 is the floor
    renamed = hasattr(model, "activation_checkpointing_enable")
    kind = "activation_checkpointing" if renamed else "gradient_checkpointing"
    model.train()
    if train.gradient_checkpointing:
        getattr(model, f"{kind}_enable")(**{f"{kind}_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        if train.gradient_checkpointing:
            getattr(model, f"{kind}_disable")()
        model.eval()
