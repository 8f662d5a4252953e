"""The memory mode sharded: each process holds some rows of every weight, score, moment and mask.

forward, backward   FSDP2's, on ordinary layers whose weights hold their masks; one layer at a time is whole
gradients           summed over processes into each one's rows, once per step or once per micro-batch
the step            MaskAdamW on the local rows; thresholds from histograms that are summed over all processes
the flips           in the local rows

Processes send weights and gradients, as plain FSDP2 does, and the histograms. They send neither scores nor masks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mft.budget.budget import budget_of
from mft.checks import check_rule
from mft.config import TrainConfig
from mft.data.batches import MicroBatch
from mft.engines.distributed import Processes
from mft.engines.in_place import InPlaceMask, WeightStates
from mft.engines.offload import Mover
from mft.engines.own_forward import OwnForward
from mft.engines.score_states import HeldMask, score_optimizer
from mft.engines.spread_model import SpreadModel, spread
from mft.engines.step import OnLoss
from mft.engines.trains_scores import TrainsScores
from mft.masks.convert import masked_modules
from mft.models.longrope import inputs_of
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective
from mft.surrogate.surrogate import Surrogate
from mft_kernels import MaskedLayer, kept_thresholds, pack_mask
from mft_kernels.mask.in_place import MaskedInPlace
from mft_kernels.mask.shared_threshold import part_thresholds
from mft_kernels.ops.checks import NonFiniteScores
from mft_kernels.reference.fixed_point import code_at_least, selectable
from mft_kernels.shards import first_row, rows_here, spread_like

_NOT_FINITE = 0x7E00  # for int16 scores: the code that the selection of masks reads as NaN


class ShardedMask(InPlaceMask):
    """A mask of which this process holds some rows, in its rows of the weight; module: the layer of the whole model."""

    def __init__(self, name: str, module: MaskedLayer, parameter: nn.Parameter) -> None:
        held = MaskedInPlace(rows_here(parameter))
        first, count = first_row(parameter), len(held.weight)
        own = module.scores.detach()[first : first + count].to(held.weight.device, copy=True)
        self._scores = spread_like(own, parameter, parameter.shape)
        threshold = own.new_zeros(())
        super().__init__(name, module, own.new_empty(0), threshold, held=held, parameter=parameter)

    @property
    def scores(self) -> Tensor:
        return self._scores


class ShardedStates(WeightStates):
    """The local rows of a spread model's scores, moments and masks.

    The selected masks do not depend on the number of processes.

    Args:
        model: The whole model. Training starts from its scores; finish() writes the trained ones back.
        own: The spread copy that runs.
        Others: see WeightStates.
    """

    def __init__(
        self,
        model: nn.Module,
        own: SpreadModel,
        train: TrainConfig,
        device: torch.device,
        processes: Processes,
        surrogate: Surrogate | None,
        grad_dtype: torch.dtype | None,
    ) -> None:
        masked = masked_modules(model)
        masks = [ShardedMask(name, module, own.weights[name]) for name, module in masked.items()]
        groups = [{"params": [mask.scores], "mode": mask.module.mode} for mask in masks]
        mover = Mover(device, separate=False)
        optimizer = score_optimizer(groups, train)
        self.group, self._rows, self._bad = processes, masks, [False] * len(masks)
        super().__init__(masks, optimizer, mover, surrogate=surrogate, budget=budget_of(model), grad_dtype=grad_dtype)
        for mask in masks:
            mask.scores.requires_grad_(False)
            self._forget(mask.module)
        for mask in masks:
            if mask.module.threshold is not None and self.budget is None:
                mask.threshold = self._as_scores(mask, mask.module.threshold)
                mask.take(pack_mask(rows_here(mask.scores), mask.threshold, mode=mask.module.mode))
        self.select()
        self.check()

    def selects_later(self, mask: Any) -> bool:
        """Return True unless the threshold is fixed, as no process can compute a threshold by itself."""
        return self.budget is not None or mask.module.threshold is None

    @torch.no_grad()
    def select(self) -> None:
        """Select the masks of all layers by thresholds over the scores of all processes: two or three all-reduces."""
        later = [mask for mask in self._rows if self.selects_later(mask)]
        if self.budget is not None:
            with self.group.together():
                shared = self.budget.threshold(self._brought, self._add_up)
            for mask in later:
                mask.module.threshold = shared
            found = [shared] * len(later)
            self._take(later, [self._as_scores(mask, value) for mask, value in zip(later, found)])
            return
        matrices = [mask for mask in later if mask.module.scores.dim() == 2]
        for mode in sorted({mask.module.mode for mask in matrices}):
            these = [mask for mask in matrices if mask.module.mode == mode]
            dropped = [int((1 - mask.module.keep_ratio) * mask.scores.numel()) for mask in these]
            parts = [rows_here(mask.scores) for mask in these]
            values = part_thresholds(parts, dropped, mode=mode, add_up=self._add_up)
            self._take(these, [self._as_scores(mask, value) for mask, value in zip(these, values)])
        experts = [mask for mask in later if mask.module.scores.dim() == 3]  # each whole, on one process
        self._take(experts, [_of_experts(mask) for mask in experts])

    def check(self) -> None:
        """See step.Runner."""
        bad: list[HeldMask] = [mask for mask in self._rows if bool(selectable(mask.threshold).isnan().any())]
        bad += [mask for mask, flag in self._found_bad if bool(flag)]
        self._found_bad = []
        if not self.group.largest(len(bad)):
            return
        with self.group.together():
            for mask in bad:
                scores = selectable(rows_here(mask.scores))
                if not scores.isfinite().all():
                    raise NonFiniteScores(scores, mask.name)

    def packed_masks(self) -> list[Tensor]:
        """Return the whole masks, gathered from all processes. All processes must call this."""
        return [self.group.all_rows(mask.packed, len(mask.parameter)) for mask in self._rows]

    def relearned(self) -> None:
        self.select()

    def finish(self) -> None:
        """Gather the trained scores and write them into the whole model. All processes must call this."""
        for mask in self._rows:
            whole = self.group.all_rows(rows_here(mask.scores), len(mask.parameter))
            mask.module.scores.data = whole.to(mask.module.weight.device)

    def close(self) -> None:
        for mask in self._rows:
            mask.module.scores.requires_grad_(mask.module.scores.is_floating_point())

    def _take(self, masks: Sequence[Any], thresholds: Sequence[Tensor]) -> None:
        for mask, threshold in zip(masks, thresholds):
            mask.threshold = threshold
            mask.take(pack_mask(rows_here(mask.scores), threshold, mode=mask.module.mode))

    def _as_scores(self, mask: Any, threshold: float) -> Tensor:
        """Return the threshold as a 0-d tensor in the dtype of the scores; for int16 as their code."""
        own = rows_here(mask.scores)
        if own.dtype != torch.int16:
            return own.new_full((), threshold)
        return own.new_full((), _nan_of(own.dtype) if math.isnan(threshold) else code_at_least(threshold))

    def _squares(self) -> Tensor:
        total = super()._squares()
        if self.group.count > 1:
            dist.all_reduce(total)
        return total

    def _add_up(self, counts: Tensor) -> None:
        if self.group.count > 1:
            there = counts.to(self.group.device)
            dist.all_reduce(there)
            counts.copy_(there)

    @staticmethod
    def _forget(module: MaskedLayer) -> None:
        """Free the module's whole scores. Until finish() they read as NaN, which every reader rejects."""
        scores = module.scores.detach()
        module.scores.data = scores.new_full((), _nan_of(scores.dtype)).expand(scores.shape)


class Sharded(TrainsScores, OwnForward):
    """Trains only scores, in any format, on a model of which each process holds some rows.

    Args:
        states: The states of the scores.
        own: The spread copy that runs.
        every_batch: Sum gradients over processes in each micro-batch, not once per step.
    """

    way = "sharded"
    in_lockstep = True

    def __init__(
        self,
        states: ShardedStates,
        own: SpreadModel,
        objective: Objective = CROSS_ENTROPY,
        *,
        every_batch: bool = False,
    ) -> None:
        super().__init__(own.model, own.run, own.head, None, states.group, objective)
        self._states, self._own, self._every_batch = states, own, every_batch
        self._device = states.optimizer.param_groups[0]["params"][0].device

    @property
    def states(self) -> ShardedStates:
        return self._states

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """See step.Runner. A loss that is not finite ends the step only after all micro-batches have run, because
        every micro-batch waits for all processes."""
        assert lr is not None, "sharded has no rehearsal"
        found: list[Exception] = []
        self._objective.prepare(batches)
        for place, batch in enumerate(batches, 1):
            self._own.sum_gradients(self._every_batch or place == len(batches))
            total = self._backward(batch, scale)
            try:
                on_loss(batch, total)
            except RuntimeError as error:  # NonFiniteLoss
                found.append(error)
        with self._processes.together():
            if found:
                raise found[0]
        with self._at("the optimiser step"):
            self._update(lr, max_norm)

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """See step.Runner. All processes must ask for the same number of batches."""
        with self._own.whole_head():
            yield from super().hidden_states(batches)

    def finish(self) -> None:
        self.states.finish()

    def close(self) -> None:
        self.states.close()
        self._own.close()

    def _backward(self, batch: MicroBatch, scale: float) -> Tensor:
        with self._at(f"rows {batch.rows} of {batch.input_ids.shape[1]} tokens"):
            ids, positions = inputs_of(batch, self._model, self._device)
            hidden, reached = self._prefix(ids, batch.rows, positions), []
            hidden.register_hook(lambda grad: reached.append(True))
            with self._own.whole_head():
                total = self._objective.backward(self.head, hidden, batch, scale, None)
            if not reached:  # the batch has no token with a loss, but the other processes wait for this backward pass
                hidden.backward(torch.zeros_like(hidden))
            return total

    def _update(self, lr: float, max_norm: float | None) -> None:
        self.states.step(lr, max_norm)
        self.states.zero_grad()


def start_sharded(
    model: nn.Module,
    few: Tensor,
    device: torch.device,
    train: TrainConfig,
    processes: Processes,
    objective: Objective,
    surrogate: Surrogate | None,
) -> Sharded:
    """Spread model over processes and return the engine that trains it.

    Its finish() gives the scores back to model; its close() releases the rest.

    Raises: ValueError if the model or the settings do not allow it.
    """
    check_rule(
        train.accumulation % processes.count == 0,
        "train.accumulation",
        f"be a multiple of {processes.count}, the number of processes, with memory: sharded, because each "
        "micro-batch runs on all of them",
        train.accumulation,
    )
    check_rule(
        not objective.of_base,
        "objective.name",
        "be one that does not run the base, with memory: sharded, because its weights hold the mask",
        objective.name,
    )
    processes.agree_on({f"{name}.scores": module.scores for name, module in masked_modules(model).items()})
    own = spread(model, few, device, processes)
    dtype = None if train.grad_dtype is None else getattr(torch, train.grad_dtype)
    states = ShardedStates(model, own, train, device, processes, surrogate, dtype)
    return Sharded(states, own, objective, every_batch=train.reduce_every == "micro_batch")


def _of_experts(mask: Any) -> Tensor:
    """Return the thresholds of this process's experts."""
    module, own = mask.module, rows_here(mask.scores)
    if own.is_cpu and not selectable(own).isfinite().all():  # kept_thresholds would raise, in this process only
        return own.new_full((len(own),), _nan_of(own.dtype))
    return kept_thresholds(own, module.keep_ratio, mode=module.mode)


def _nan_of(dtype: torch.dtype) -> float:
    return _NOT_FINITE if dtype == torch.int16 else math.nan
