"""Whole training loops that memory is compared with: the paper's formulation, and eager PyTorch at its most careful.

paper    fp32 scores, a sort in every forward, masked copies of the weights kept by autograd, fp32 AdamW
eager    bf16 scores, a threshold a step, the mask made anew in the backward, every layer checkpointed, logits a chunk
         at a time, 8-bit moments (ours: no stronger ones are known to us); gradients by autograd
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft.batches import take_rows
from mft.causal_lm import decoder_layers, head_of, run_decoder
from mft.config import TrainConfig
from mft.token_loss import backward_labelled_loss
from mft_kernels import MaskAdamW, kept_threshold

from .rivals import KEEP_RATIO, eager_lean, paper_linear


@dataclass(frozen=True)
class Rival:
    """A formulation of masked training in plain PyTorch."""

    name: str
    scores_dtype: torch.dtype
    careful: bool


RIVALS = {rival.name: rival for rival in (Rival("paper", torch.float32, False), Rival("eager", torch.bfloat16, True))}


class _RivalLinear(nn.Module):
    """Weight and scores (N, K) in a formulation of benchmarks.rivals."""

    def __init__(self, linear: nn.Linear, rival: Rival) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.scores = nn.Parameter(torch.empty_like(self.weight, dtype=rival.scores_dtype).normal_(0, 0.02))
        self.careful = rival.careful
        self.threshold: Tensor | None = None  # of this step

    def forward(self, x: Tensor) -> Tensor:
        if not self.careful:
            return paper_linear(x, self.weight, self.scores.to(self.weight.dtype))
        if self.threshold is None:
            self.threshold = kept_threshold(self.scores.detach(), KEEP_RATIO)
        rows = x.reshape(-1, x.shape[-1])
        return eager_lean(rows, self.weight, self.scores, self.threshold).view(*x.shape[:-1], -1)


def train_rival(rival: Rival, model: nn.Module, data, train: TrainConfig) -> list[float]:
    """Optimiser steps over every linear of the decoder's layers; the loss of each."""
    model.requires_grad_(False)
    linears = [_replace(layer, name, rival) for layer in decoder_layers(model) for name in _linear_names(layer)]
    scores = [linear.scores for linear in linears]
    if rival.careful:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer: torch.optim.Optimizer = MaskAdamW(scores, lr=train.lr, moments="8bit")
    else:
        optimizer = torch.optim.AdamW(scores, lr=train.lr)
    device, losses = next(model.parameters()).device, []
    for step in range(train.steps or 0):
        total = 0.0
        for i in range(train.accumulation):
            batch = take_rows(data, [step * train.accumulation + i])
            scale = 1 / (train.accumulation * len(batch.labelled.targets))
            ids, labelled = batch.input_ids.to(device), batch.labelled.to(device)
            if rival.careful:
                loss = backward_labelled_loss(head_of(model), run_decoder(model, ids), labelled, scale) * scale
            else:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / train.accumulation
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for linear in linears:
            linear.threshold = None
        losses.append(total)
    return losses


def _linear_names(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _replace(layer: nn.Module, name: str, rival: Rival) -> _RivalLinear:
    parent, _, child = name.rpartition(".")
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    replaced = _RivalLinear(linear, rival)
    setattr(layer.get_submodule(parent), child, replaced)
    return replaced
