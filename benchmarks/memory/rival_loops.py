"""Whole training loops for comparing memory: the paper's formulation, and eager PyTorch at its most careful.

paper    fp32 scores, a sort in every forward, masked copies of the weights kept by autograd, fp32 AdamW
eager    bf16 scores, one threshold per step, the mask made again in the backward, every layer checkpointed, logits
         one chunk at a time, 8-bit moments (ours: we know no stronger ones); gradients by autograd
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory.simulated_step import checkpoint, fake_batch, fake_model
from benchmarks.memory.tracker import MemoryTracker
from mft.config import TrainConfig
from mft.data.batches import MicroBatch
from mft.memory.workload import Workload
from mft.models.causal_lm import decoder_layers, head_of, run_decoder
from mft.models.token_loss import backward_labelled_loss
from mft_kernels import MaskAdamW

from ..rivals import KEEP_RATIO, eager_lean, paper_linear


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
            self.threshold = torch.ops.mft.kept_threshold(self.scores.detach(), KEEP_RATIO, "magnitude", "auto")
        rows = x.reshape(-1, x.shape[-1])
        return eager_lean(rows, self.weight, self.scores, self.threshold).view(*x.shape[:-1], -1)


class RivalLoop:
    """Trains every linear of the given decoder layers of ``model`` (all layers if None), in place."""

    def __init__(self, rival: Rival, model: Any, train: TrainConfig, layers: Collection[int] | None = None) -> None:
        model.requires_grad_(False)
        self._model, self._careful, self._accumulation = model, rival.careful, train.accumulation
        chosen = [layer for i, layer in enumerate(decoder_layers(model)) if layers is None or i in layers]
        self._linears = [
            _replace(layer, name, rival)
            for layer in chosen
            for name, module in list(layer.named_modules())
            if isinstance(module, nn.Linear)
        ]
        scores = [linear.scores for linear in self._linears]
        if rival.careful:
            model.train()
            checkpoint(model)
            self._optimizer: torch.optim.Optimizer = MaskAdamW(scores, lr=train.lr, moments="8bit")
        else:
            self._optimizer = torch.optim.AdamW(scores, lr=train.lr)

    def step(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Run one optimiser step and return the mean loss per token."""
        device = head_of(self._model).weight.device
        losses = []
        for batch in batches:
            ids, labelled = batch.input_ids.to(device), batch.labelled.to(device)
            if self._careful:
                scale = 1 / (self._accumulation * len(labelled.targets))
                states = run_decoder(self._model, ids)
                losses.append(backward_labelled_loss(head_of(self._model), states, labelled, scale) * scale)
            else:
                loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss / self._accumulation
                loss.backward()
                losses.append(loss.detach())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for linear in self._linears:
            linear.threshold = None
        return torch.stack(losses).sum()


def simulate_rival(rival: Rival, config: Mapping[str, Any], workload: Workload) -> MemoryTracker:
    """Return the tracker after one step on fake tensors; see benchmarks.memory.simulated_step."""
    tracker = MemoryTracker()
    with FakeTensorMode(), tracker:
        model = fake_model(config)
        train = TrainConfig(steps=1, accumulation=workload.accumulation)
        loop = RivalLoop(rival, model, train, workload.layers)
        loop.step([fake_batch(workload)])  # moments exist from the second step on
        loop.step([fake_batch(workload) for _ in range(workload.accumulation)])
    return tracker


def _replace(layer: nn.Module, name: str, rival: Rival) -> _RivalLinear:
    parent, _, child = name.rpartition(".")
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    replaced = _RivalLinear(linear, rival)
    setattr(layer.get_submodule(parent), child, replaced)
    return replaced
