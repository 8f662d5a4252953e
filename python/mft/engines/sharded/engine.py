"""The memory mode sharded: each process holds some rows of every weight, score, moment and mask.

forward, backward   FSDP2's, on ordinary layers whose weights hold their masks; one layer at a time is whole
gradients           summed over processes into each one's rows, once per step or once per micro-batch
the step            MaskAdamW on the local rows; thresholds from histograms that are summed over all processes
the flips           in the local rows

Processes send weights and gradients, as plain FSDP2 does, and the histograms. They send neither scores nor masks.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mft.checks import check_rule
from mft.config import TrainConfig
from mft.data.batches import MicroBatch
from mft.engines.in_place_engine import InPlace, InPlaceMask, WeightStates
from mft.engines.offload import Mover
from mft.engines.own_forward import OwnForward
from mft.engines.placed import Placed
from mft.engines.score_states import HeldMask, grad_dtype, score_optimizer
from mft.engines.sharded.model import SpreadModel, spread, whole_outside_layers
from mft.engines.sharded.score_rows import nan_of, score_rows, select_rows, threshold_tensor
from mft.engines.step import OnLoss
from mft.masks.budget import budget_of
from mft.masks.convert import masked_modules
from mft.models.longrope import inputs_of
from mft.models.packed_rows import check_apart
from mft.models.weight_files import weight_files
from mft_kernels import MaskedLayer, pack_mask
from mft_kernels.internal import MaskedInPlace, NonFiniteScores, first_row, rows_here, selectable, spread_like


class ShardedMask(InPlaceMask):
    """This process's rows of a mask, which lie in place in its rows of the weight.

    Args: module: of the whole model; own: this process's rows of the scores, trained in place, or None to copy them.
    """

    def __init__(self, name: str, module: MaskedLayer, parameter: nn.Parameter, own: Tensor | None) -> None:
        held = MaskedInPlace(rows_here(parameter))
        if own is None:
            first, count = first_row(parameter), len(held.weight)
            own = module.scores.detach()[first : first + count].to(held.weight.device, copy=True)
        self._scores = spread_like(own, parameter, parameter.shape)
        threshold = own.new_zeros(())
        super().__init__(name, module, own.new_empty(0), threshold, held=held, parameter=parameter)

    @property
    def scores(self) -> Tensor:
        return self._scores


class ShardedStates(WeightStates):
    """The local rows of a spread model's scores, moments and masks, which do not depend on the number of processes.

    Args: placed: the whole model; training starts from its scores (or score_rows), and finish() writes the trained ones
        back. spread: the copy that runs.
    """

    def __init__(self, placed: Placed, spread: SpreadModel, train: TrainConfig) -> None:
        model, masked = placed.model, masked_modules(placed.model)
        held = score_rows(model)
        rows = {} if held is None else held.rows
        masks = [ShardedMask(name, module, spread.weights[name], rows.get(name)) for name, module in masked.items()]
        groups = [{"params": [mask.scores], "mode": mask.module.mode} for mask in masks]
        mover = Mover(placed.device, separate=False)
        optimizer = score_optimizer(groups, train)
        self.group, self._rows, self._is_whole = placed.processes, masks, held is None
        of_model: dict[str, Any] = {"surrogate": placed.surrogate, "budget": budget_of(model)}
        super().__init__(masks, optimizer, mover, **of_model, grad_dtype=grad_dtype(train))
        for mask in masks if self._is_whole else ():  # free the whole scores; until finish() every reader rejects them
            scores = mask.module.scores.detach()
            mask.module.scores.data = scores.new_full((), nan_of(scores.dtype)).expand(scores.shape)
        for mask in masks:
            if mask.module.threshold is not None and self.budget is None:
                self._take([mask], [threshold_tensor(rows_here(mask.scores), mask.module.threshold)])
        self.select()
        self.check()

    def selects_later(self, mask: Any) -> bool:
        """Return True unless the threshold is fixed, as no process can compute a threshold by itself."""
        return self.budget is not None or mask.module.threshold is None

    @torch.no_grad()
    def select(self) -> None:
        """Select the masks of all layers by thresholds over the scores of all processes: two or three all-reduces."""
        later = [mask for mask in self._rows if self.selects_later(mask)]
        rows = {mask.name: rows_here(mask.scores) for mask in later}
        thresholds = select_rows(rows, {mask.name: mask.module for mask in later}, self.budget, self.group)
        self._take(later, [thresholds[mask.name] for mask in later])

    def check(self) -> None:
        """See step.States."""
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

    def result(self) -> dict[str, Tensor]:
        """See step.States. All processes must call this."""
        found = {}
        for mask in self._rows:
            whole = self.group.rows_on_first(mask.packed, len(mask.parameter))
            if whole is not None:
                found[f"{mask.name}.mask"] = whole.cpu()
        return found

    def refresh(self) -> None:
        self.select()

    def finish(self) -> None:
        """Gather the trained scores and write them into a whole model. All processes must call this."""
        for mask in self._rows if self._is_whole else ():
            whole = self.group.all_rows(rows_here(mask.scores), len(mask.parameter))
            mask.module.scores.data = whole.to(mask.module.weight.device)

    def _take(self, masks: Sequence[Any], thresholds: Sequence[Tensor]) -> None:
        for mask, threshold in zip(masks, thresholds):
            mask.threshold = threshold
            mask.take(pack_mask(rows_here(mask.scores), threshold, mode=mask.module.mode))

    def _squares(self) -> Tensor:
        total = super()._squares()
        if self.group.count > 1:
            dist.all_reduce(total)
        return total


class SpreadForward(OwnForward):
    """Runs a spread copy of a model, which is its model. All processes run the same batches, except in a step."""

    def __init__(self, placed: Placed, spread: SpreadModel) -> None:
        super().__init__(dataclasses.replace(placed, model=spread.model, memory=None), spread.run, spread.head)
        self._spread, self._device, self._is_from_files = spread, placed.device, weight_files(placed.model) is not None

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """See step.Runner. All processes must ask for the same number of batches."""
        with self._spread.whole_head():
            yield from super().hidden_states(batches)

    def check_apart(self, dataset: Any, sample: Tensor, batch_size: int) -> None:
        if self._is_from_files:  # else the whole model has been checked
            check_apart(self.model, dataset, sample.to(self._device), batch_size, self.run)

    def close(self) -> None:
        self._spread.close()


class Sharded(InPlace, SpreadForward):
    """Trains only scores, in any format, on a model of which each process holds some rows.

    every_batch: sum gradients over processes in each micro-batch, not once per step.
    """

    states: ShardedStates
    in_lockstep = True

    def __init__(self, placed: Placed, spread: SpreadModel, states: ShardedStates, *, every_batch: bool) -> None:
        SpreadForward.__init__(self, placed, spread)
        self.states, self._every_batch = states, every_batch

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """See step.Runner. A loss that is not finite ends the step only after all micro-batches."""
        assert lr is not None, "sharded has no rehearsal"
        found: list[Exception] = []
        self._objective.prepare(batches)
        for place, batch in enumerate(batches, 1):
            self._spread.sum_gradients(self._every_batch or place == len(batches))
            total = self._backward(batch, scale)
            try:
                on_loss(batch, total)
            except RuntimeError as error:  # NonFiniteLoss
                found.append(error)
        with self._processes.together():
            if found:
                raise found[0]
        with self._name_place("the optimiser step"):
            self._update(lr, max_norm)

    def finish(self) -> None:
        self.states.finish()

    def close(self) -> None:
        super().close()
        SpreadForward.close(self)

    def _backward(self, batch: MicroBatch, scale: float) -> Tensor:
        with self._name_place(f"rows {batch.rows} of {batch.input_ids.shape[1]} tokens"):
            ids, positions = inputs_of(batch, self.model, self._device)
            hidden, reached = self._prefix(ids, batch.rows, positions), []
            hidden.register_hook(lambda grad: reached.append(True))
            with self._spread.whole_head():
                total = self._objective.backward(self.head, hidden, batch, scale, None)
            if not reached:  # the batch has no token with a loss, but the other processes wait for this backward pass
                hidden.backward(torch.zeros_like(hidden))
            return total


def start_sharded(placed: Placed, sample: Tensor, train: TrainConfig) -> Sharded:
    """Spread the model over its processes and return the engine that trains it.

    Its finish() gives the scores back; its close() releases the rest. Raises: ValueError if the settings do not allow
    it.
    """
    model, processes = placed.model, placed.processes
    check_rule(
        train.accumulation % processes.count == 0,
        "train.accumulation",
        f"be a multiple of {processes.count}, the number of processes, with memory: sharded, because each "
        "micro-batch runs on all of them",
        train.accumulation,
    )
    check_rule(
        not placed.objective.of_base,
        "objective.name",
        "be one that does not run the base, with memory: sharded, because its weights hold the mask",
        placed.objective.name,
    )
    if score_rows(model) is None:
        processes.agree_on({f"{name}.scores": module.scores for name, module in masked_modules(model).items()})
    copy = spread(model, sample, placed.device, processes)
    runner = Sharded(placed, copy, ShardedStates(placed, copy, train), every_batch=train.reduce_every == "micro_batch")
    if weight_files(model) is not None:  # a whole model has been checked
        with contextlib.ExitStack() as undo:
            undo.callback(runner.close)
            with whole_outside_layers(copy.model, copy.units):
                processes.check_model(copy.model, sample.to(placed.device))
            undo.pop_all()
    return runner


def start_forward(placed: Placed, sample: Tensor) -> SpreadForward:
    """Spread a model that has score_rows, with the masks that they select now; return what runs it."""
    held = score_rows(placed.model)
    assert held is not None, "asked for where there are rows"
    copy = spread(placed.model, sample, held.device, held.processes)
    if masked_modules(placed.model):
        for name, packed in held.masks().items():
            MaskedInPlace(rows_here(copy.weights[name])).change(packed)
    return SpreadForward(dataclasses.replace(placed, device=held.device, processes=held.processes), copy)
