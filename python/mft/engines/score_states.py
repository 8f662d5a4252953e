"""Scores and moments at rest in host memory, and the optimiser step that takes them to the device a matrix at a time.

             host                        device
scores, moments of matrix 2  ------>  score_step(gradient, weight) -> next mask of 2
scores, moments of matrix 3  -- on its way --
scores, moments of matrix 1  <------  done
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mft.budget.budget import Budget, naming_layer
from mft.config import TrainConfig
from mft.engines.distributed import ALONE, Processes
from mft.engines.offload import Mover
from mft.models.codes.weight import QuantizedWeight
from mft.number_formats import MOMENT_FORMATS, unless_auto
from mft.surrogate.surrogate import Surrogate
from mft_kernels import MaskAdamW, MaskedLayer, pack_mask
from mft_kernels.mask.masking import outdate
from mft_kernels.reference.fixed_point import code_at_least, selectable
from mft_kernels.shards import is_spread, rows_here

_CLIP_ROWS = 256  # of a gradient squared at once
_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(eq=False)
class HeldMask:
    """A masked layer with the mask that it computes with between two steps, and its gradient buffer."""

    name: str
    module: MaskedLayer
    packed: Tensor
    threshold: Tensor
    grad: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """What learns: the module's."""
        return self.module.scores

    @property
    def quantized(self) -> QuantizedWeight | None:
        """What the weight is made of, if it is."""
        return getattr(self.module, "quantized", None)

    def weight(self) -> Tensor:
        """(N, K), made anew if it is quantised; of experts (E, N, K), or all in one matrix."""
        return self.module.weight.detach() if self.quantized is None else self.quantized.dense()

    def weight_dtype(self) -> torch.dtype:
        return self.module.weight.dtype if self.quantized is None else self.quantized.dtype

    def hold(self, grad: Tensor | None) -> None:
        """From now on the backward pass adds into grad."""
        self.grad = grad
        self.module.hold(self.packed, grad, weight=self.quantized)

    def take(self, packed: Tensor) -> None:
        """From now on this is the mask."""
        self.packed.copy_(packed)


def current_masks(masked: dict[str, MaskedLayer]) -> list[HeldMask]:
    """The masks that the layers' scores select now, of which they may be changed in place.

    Raises: NonFiniteScores, naming the layer.
    """
    found = []
    for name, module in masked.items():
        mask = module.current_mask()
        outdate(module.scores)  # the memo would keep another copy, and the signs, which a held mask does not need
        found.append(HeldMask(name, module, mask.packed, mask.threshold))
    return found


def score_groups(masked: Iterable[MaskedLayer]) -> list[dict[str, Any]]:
    """The groups of MaskAdamW over their scores."""
    return [{"params": [module.scores], "mode": module.mode} for module in masked]


def score_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> MaskAdamW:
    """Of these scores, see score_groups, as train says."""
    return MaskAdamW(
        groups,
        lr=train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        moments=MOMENT_FORMATS[unless_auto(train.moments)].name,
        seed=train.seed,
    )


class ScoreStates:
    """MaskAdamW over the scores of masked layers, whose masks the layers hold meanwhile.

    The scores are moved to (pinned) host memory, and learn through this alone.

    Args:
        optimizer: of the layers' scores, in the order of masks; see score_optimizer.
        processes: those whose gradients make up a step; each then takes the same one, rounding included.
        surrogate: what scores learn by, if not by the straight-through gradient. It is written over a layer's buffer,
            so that no matrix more is needed; moments in 8 bits then know the weight.
        budget: of these masks, which are then selected together, by select().
    """

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
            if not is_spread(mask.scores):  # whose rows lie on the device already
                mask.scores.data = mover.rest(mask.scores.data)
        self._found_bad: list[tuple[HeldMask, Tensor]] = []

    def close(self) -> None:
        """The scores may learn by autograd again, those that it can reach."""
        for mask in self._masks:
            mask.module.scores.requires_grad_(mask.module.scores.is_floating_point())

    def learned(self) -> dict[str, Tensor]:
        """The scores, as they rest, by the parameter's name; copies of them have arrived."""
        self._mover.finish()
        return {f"{mask.name}.scores": mask.scores for mask in self._masks}

    def result(self) -> dict[str, Tensor]:
        """The masks, as a finished run saves them: see step.Runner."""
        return {f"{mask.name}.mask": packed for mask, packed in zip(self._masks, self.packed_masks())}

    def packed_masks(self) -> list[Tensor]:
        """See step.Runner."""
        self._mover.finish()
        return [mask.packed for mask in self._masks]

    def relearned(self) -> None:
        """After a change of the scores: the masks follow."""
        if self.budget is not None:
            self.select()
            return
        for mask, selected in zip(self._masks, current_masks({mask.name: mask.module for mask in self._masks})):
            mask.take(selected.packed)
            mask.threshold = selected.threshold.to(self._mover.device)

    def buffer_dtype(self, mask: HeldMask, dtype: torch.dtype | None) -> torch.dtype:
        """Of one layer's gradient: dtype, or the weight's.

        Raises: ValueError in fp16 with a surrogate: products with weights would be rounded to 0.
        """
        dtype = dtype or mask.weight_dtype()
        if self._surrogate is not None and dtype == torch.float16:
            raise ValueError(
                "train.grad_dtype must be float32 or bfloat16 with mask.sharpness, whose gradients float16 rounds to "
                f"0, got float16 for {mask.name}"
            )
        return dtype

    def new_buffer(self, mask: HeldMask, dtype: torch.dtype | None) -> Tensor:
        """Zeros for one layer's gradient, in buffer_dtype(mask, dtype)."""
        dtype = self.buffer_dtype(mask, dtype)
        return torch.zeros(rows_here(mask.scores).shape, dtype=dtype, device=self._mover.device)

    def clip_factor(self, max_norm: float) -> Tensor:
        """min(1, max_norm / (norm + 1e-6)) of all scores' gradients together, fp32, 0-d on the device.

        |weight * sign(score)| = |weight|, so the scores are not needed; a surrogate's are in the buffers already.
        Squares are added up in fp64, so that their order hardly matters.
        """
        total = self._squares()
        return (max_norm / (total.sqrt() + _EPSILON)).clamp_(max=1.0).float()

    def _squares(self) -> Tensor:
        """The sum of the squared gradients of all scores, fp64, 0-d on the device."""
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
        """One optimiser step of these layers from their buffers, summed over processes; their next masks are held then.

        lr: None for the one that each group of the optimizer has.

        Under a budget they hold their masks until all layers have taken the step, and select() is called.

        A matrix takes its step while the next one is summed, unless max_norm, which is of all layers' gradients, needs
        every sum first.
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
            factor = self.clip_factor(max_norm)
        for mask, _ in zip(masks, summed, strict=True):
            packed = self._step(mask, factor)
            if packed is not None:
                mask.take(packed)
            self._mover.let_go()

    def selects_later(self, mask: HeldMask) -> bool:
        """Whether select() finds this mask, after the step of all layers."""
        return self.budget is not None

    def select(self) -> None:
        """Under a budget: the masks of all layers, by the threshold that their scores share now.

        Raises: NonFiniteScores, naming the layer.
        """
        if self.budget is None:
            return
        self._mover.finish()
        with naming_layer([mask.module for mask in self._masks]):
            threshold = self.budget.threshold(self._brought)
        for mask, scores in zip(self._masks, self._brought()):
            mask.module.threshold = threshold
            fixed_point = scores.dtype == torch.int16
            mask.threshold = scores.new_full((), code_at_least(threshold) if fixed_point else threshold)
            mask.take(pack_mask(scores, mask.threshold, mode=mask.module.mode))

    def check(self) -> None:
        """Raise NonFiniteScores if a score has become NaN or infinite; the one synchronisation of a step."""
        found, self._found_bad = self._found_bad, []
        if not found:  # select() has looked
            return
        for (mask, _), is_bad in zip(found, torch.stack([bad for _, bad in found]).tolist()):
            if is_bad:
                self._mover.finish()
                mask.module.current_mask()  # which raises, naming the layer
                raise AssertionError(f"{mask.name} has a threshold that is not finite, but its scores are")

    def _replace(self, mask: HeldMask, scores: Tensor) -> None:
        """The surrogate's gradient over the straight-through one; scores: on the device."""
        module, surrogate, grad = mask.module, self._surrogate, mask.grad
        assert surrogate is not None, "asked for where there is one"
        assert grad is not None, "a step needs the gradient"
        assert module.threshold is not None, "train_masks has checked it"
        surrogate.replace(grad, scores.detach(), threshold=module.threshold, mode=module.mode, weight=mask.weight())

    def _brought(self) -> Iterator[Tensor]:
        """The scores of each layer, on the device while they are read."""
        for mask in self._masks:
            yield from self._mover.bring([rows_here(mask.scores)]).wait()

    def _step(self, mask: HeldMask, grad_scale: Tensor | None) -> Tensor | None:
        """The next mask; None if select() finds it later."""
        module, resting = mask.module, self.optimizer.tensors(mask.scores)
        tensors = dict(zip(resting, self._mover.bring(list(resting.values())).wait()))
        later = self.selects_later(mask)
        given = module.threshold is not None or later
        assert mask.grad is not None, "a step needs the gradient"
        if self._surrogate is not None and grad_scale is None:  # else it was there before the norm
            self._replace(mask, tensors["scores"])
        selected = self.optimizer.step_one(
            mask.scores,
            mask.grad,
            mask.weight() if self._surrogate is None else None,
            tensors=tensors,
            grad_scale=grad_scale,
            keep_ratio=None if given else module.keep_ratio,
            threshold=None if given else mask.threshold,
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
