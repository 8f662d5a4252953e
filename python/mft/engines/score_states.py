"""Scores and moments in host memory, and the optimiser step that brings them to the device one matrix at a time.

             host                        device
scores, moments of matrix 2  ------>  score_step(gradient, weight) -> next mask of 2
scores, moments of matrix 3  -- on its way --
scores, moments of matrix 1  <------  done

The next matrix is copied while this one is stepped, unless it is large; see STATES_AHEAD.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mft.config import TrainConfig
from mft.engines.distributed import ALONE, Processes
from mft.engines.offload import Mover
from mft.engines.step import States
from mft.masks.budget import Budget, name_layer
from mft.masks.surrogate import Surrogate
from mft.memory.sizes import STATES_AHEAD
from mft.models.codes.weight import QuantizedWeight
from mft.number_formats import MOMENT_FORMATS, unless_auto
from mft_kernels import MaskAdamW, MaskedLayer, outdate, pack_mask
from mft_kernels.internal import code_at_least, is_spread, rows_here, selectable

_CLIP_ROWS = 256  # rows of a gradient that are squared at once
_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(eq=False)
class HeldMask:
    """A masked layer, the mask that it uses between two optimiser steps, and its gradient buffer."""

    name: str
    module: MaskedLayer
    packed: Tensor
    threshold: Tensor
    grad: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """The module's scores, which are trained."""
        return self.module.scores

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The quantised weight, or None if the weight is not quantised."""
        return getattr(self.module, "quantized", None)

    def weight(self) -> Tensor:
        """Return the weight (N, K), dequantised if it is quantised; for experts (E, N, K), or all in one matrix."""
        return self.module.weight.detach() if self.quantized is None else self.quantized.dense()

    def weight_dtype(self) -> torch.dtype:
        return self.module.weight.dtype if self.quantized is None else self.quantized.dtype

    def hold(self, grad: Tensor | None) -> None:
        """Let the layer use the mask, and let its backward pass add into grad from now on."""
        self.grad = grad
        self.module.hold(self.packed, grad, weight=self.quantized)

    def take(self, packed: Tensor) -> None:
        """Replace the mask."""
        self.packed.copy_(packed)


def current_masks(masked: dict[str, MaskedLayer]) -> list[HeldMask]:
    """Return the masks that the scores select now, to be changed in place. Raises: NonFiniteScores."""
    found = []
    for name, module in masked.items():
        mask = module.current_mask()
        outdate(module.scores)  # the cache would keep another copy, and the signs, which a held mask does not need
        found.append(HeldMask(name, module, mask.packed, mask.threshold))
    return found


def score_groups(masked: Iterable[MaskedLayer]) -> list[dict[str, Any]]:
    """Return MaskAdamW's parameter groups for the layers' scores."""
    return [{"params": [module.scores], "mode": module.mode} for module in masked]


def score_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> MaskAdamW:
    """Make the MaskAdamW of these groups (see score_groups) with the settings of train."""
    return MaskAdamW(
        groups,
        lr=train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        moments=MOMENT_FORMATS[unless_auto(train.moments)].name,
        seed=train.seed,
    )


def grad_dtype(train: TrainConfig) -> torch.dtype | None:
    """Return the dtype of gradient buffers; None for that of the weights."""
    return None if train.grad_dtype is None else getattr(torch, train.grad_dtype)


class ScoreStates(States):
    """MaskAdamW over the scores of masked layers, which hold their masks between steps.

    The scores are moved to (pinned) host memory. Only this class updates them.
    Args: optimizer: over the scores, in the order of masks; see score_optimizer. processes: those whose gradients are
        summed. surrogate: overwrites a layer's gradient buffer; None: the straight-through gradient. budget: select()
        then selects these masks together.
    """

    optimizer: MaskAdamW

    def __init__(
        self,
        masks: Sequence[HeldMask],
        optimizer: MaskAdamW,
        mover: Mover,
        processes: Processes = ALONE,
        surrogate: Surrogate | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._mover, self._masks, self.processes, self._surrogate = mover, masks, processes, surrogate
        self.optimizer, self.budget = optimizer, budget
        for mask in masks:
            mask.scores.requires_grad_(False)
            if not is_spread(mask.scores):  # the rows of spread scores are on the device already
                mask.scores.data = mover.rest(mask.scores.data)
        self._found_bad: list[tuple[HeldMask, Tensor]] = []

    def close(self) -> None:
        """Let scores of a float dtype be trained by autograd again."""
        for mask in self._masks:
            mask.module.scores.requires_grad_(mask.module.scores.is_floating_point())

    def learned(self) -> dict[str, Tensor]:
        """Return the scores by parameter name, where they are stored, after all pending copies are done."""
        self._mover.finish()
        return {f"{mask.name}.scores": mask.scores for mask in self._masks}

    def result(self) -> dict[str, Tensor]:
        """Return the masks as a finished run saves them: see step.States."""
        return {f"{mask.name}.mask": packed for mask, packed in zip(self._masks, self.packed_masks())}

    def packed_masks(self) -> list[Tensor]:
        """See step.States."""
        self._mover.finish()
        return [mask.packed for mask in self._masks]

    def refresh(self) -> None:
        """Select the masks again after a change of the scores."""
        if self.budget is not None:
            self.select()
            return
        for mask, selected in zip(self._masks, current_masks({mask.name: mask.module for mask in self._masks})):
            mask.take(selected.packed)
            mask.threshold = selected.threshold.to(self._mover.device)

    def buffer_dtype(self, mask: HeldMask, dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of a layer's gradient buffer. Raises: ValueError for fp16 with a surrogate."""
        dtype = dtype or mask.weight_dtype()
        if self._surrogate is not None and dtype == torch.float16:
            raise ValueError(
                "train.grad_dtype must be float32 or bfloat16 with mask.sharpness, because float16 rounds its "
                f"gradients to 0, got float16 for {mask.name}"
            )
        return dtype

    def new_buffer(self, mask: HeldMask, dtype: torch.dtype | None) -> Tensor:
        """Return zeros for one layer's gradient, in buffer_dtype(mask, dtype)."""
        dtype = self.buffer_dtype(mask, dtype)
        return torch.zeros(rows_here(mask.scores).shape, dtype=dtype, device=self._mover.device)

    def _squares(self) -> Tensor:
        """Return the sum of the squared gradients of all scores: fp64, 0-d on the device.

        |weight * sign(score)| = |weight|, so the scores are not needed.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._mover.device)
        for mask in self._masks:
            assert mask.grad is not None, "clipping needs every gradient"
            if self._surrogate is not None:
                for grad in mask.grad.flatten(0, -2).split(_CLIP_ROWS):
                    total += grad.float().square().sum(dtype=torch.float64)
                continue
            rows = (mask.grad.flatten(0, -2), mask.weight().flatten(0, -2))
            for grad, weight in zip(*(tensor.split(_CLIP_ROWS) for tensor in rows)):
                total += (grad.float() * weight.float()).square_().sum(dtype=torch.float64)
        return total

    def update(self, masks: Sequence[HeldMask], lr: float | None = None, max_norm: float | None = None) -> None:
        """Take one optimiser step of these layers from their buffers, summed over processes, and set their next masks.

        lr: None uses the rate in each of the optimizer's groups. With a budget the layers keep their masks until
        select(). While one matrix takes its step, the next one is being copied to the device and its gradient is being
        summed. With max_norm, which limits the norm of all layers' gradients together, all sums are finished first.
        """
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        buffers = [mask.grad for mask in masks if mask.grad is not None]
        summed, factor = self.processes.summed(buffers), None
        if max_norm is not None:
            summed = iter(list(summed))
            if self._surrogate is not None:
                for mask in masks:
                    self._replace(mask, *self._mover.bring([rows_here(mask.scores)]).wait())
            factor = (max_norm / (self._squares().sqrt() + _EPSILON)).clamp_(max=1.0).float()
        states = [self.optimizer.tensors(mask.scores) for mask in masks]
        arriving = self._mover.bring_each((list(resting.values()) for resting in states), STATES_AHEAD)
        for mask, resting, _ in zip(masks, states, summed, strict=True):
            packed = self._step(mask, resting, next(arriving), factor)
            if packed is not None:
                mask.take(packed)
            self._mover.let_go()

    def selects_later(self, mask: HeldMask) -> bool:
        """Whether select() computes this mask after the step of all layers."""
        return self.budget is not None

    def select(self) -> None:
        """With a budget, select all masks by the threshold that their scores share. Raises: NonFiniteScores."""
        if self.budget is None:
            return
        self._mover.finish()
        with name_layer([mask.module for mask in self._masks]):
            threshold = self.budget.threshold(self._scores_on_device)
        for mask, scores in zip(self._masks, self._scores_on_device()):
            mask.module.threshold = threshold
            fixed_point = scores.dtype == torch.int16
            mask.threshold = scores.new_full((), code_at_least(threshold) if fixed_point else threshold)
            mask.take(pack_mask(scores, mask.threshold, mode=mask.module.mode))

    def check(self) -> None:
        """Raise NonFiniteScores if a score has become NaN or infinite. This is the only synchronisation of a step."""
        found, self._found_bad = self._found_bad, []
        if not found:  # select() has checked the scores
            return
        for (mask, _), is_bad in zip(found, torch.stack([bad for _, bad in found]).tolist()):
            if is_bad:
                self._mover.finish()
                mask.module.current_mask()  # raises NonFiniteScores, which names the layer
                raise AssertionError(f"{mask.name} has a threshold that is not finite, but its scores are")

    def _replace(self, mask: HeldMask, scores: Tensor) -> None:
        """Overwrite the straight-through gradient by the surrogate's; scores: on the device."""
        module, surrogate, grad = mask.module, self._surrogate, mask.grad
        assert surrogate is not None, "asked for where there is one"
        assert grad is not None, "a step needs the gradient"
        assert module.threshold is not None, "train_masks has checked it"
        surrogate.replace(grad, scores.detach(), threshold=module.threshold, mode=module.mode, weight=mask.weight())

    def _scores_on_device(self) -> Iterator[Tensor]:
        """Yield the scores of each layer, on the device while they are read."""
        for mask in self._masks:
            yield from self._mover.bring([rows_here(mask.scores)]).wait()

    def _step(
        self, mask: HeldMask, resting: dict[str, Tensor], arrived: list[Tensor], grad_scale: Tensor | None
    ) -> Tensor | None:
        """Take one matrix's optimiser step; return its next mask, or None if select() computes it later.

        resting, arrived: its scores and moments at rest, and on the device.
        """
        module, tensors, later = mask.module, dict(zip(resting, arrived)), self.selects_later(mask)
        given = module.threshold is not None or later
        assert mask.grad is not None, "a step needs the gradient"
        if self._surrogate is not None and grad_scale is None:  # else update() has done it, before the norm
            self._replace(mask, tensors["scores"])
        selected = self.optimizer.step_one(
            mask.scores,
            mask.grad,
            mask.weight() if self._surrogate is None else None,
            tensors=tensors,
            grad_scale=grad_scale,
            keep_ratio=None if given else module.keep_ratio,
            threshold=None if given else mask.threshold,
            pattern=module.pattern,
        )
        packed = None
        if not later and selected is None:
            packed = pack_mask(tensors["scores"], mask.threshold, mode=module.mode)
            self._found_bad.append((mask, ~selectable(tensors["scores"]).isfinite().all()))
        elif selected is not None:
            mask.threshold, packed = selected
            self._found_bad.append((mask, selectable(mask.threshold).isnan().any()))
        for name, tensor in tensors.items():
            self._mover.store(tensor, out=resting[name])
        return packed
