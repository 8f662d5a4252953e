"""The best step of a run so far, on disk until the run has its result: masks as bits, or weights, whole or absent.

    best/step-00000040    a checkpoint (checkpoint.py) of what runner.result() gave at that step

A run that is killed goes on from its newest checkpoint, which says which step was the best then: that one stays until a
newer checkpoint says otherwise, whatever better ones have been written since.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mft.budget.budget import budget_of
from mft.masks.convert import masked_modules, set_scores
from mft.training.checkpoint import BadCheckpoint, checkpoint_at, write_checkpoint
from mft_kernels import MaskedLayer, unpack_mask

_KEPT, _DROPPED = 0.03, 0.01  # scores, where a share is kept: any two that differ in every dtype of scores
_CUT = 0.02  # between them
_MARGIN = 0.01  # of scores from a fixed threshold, where it is near 0
_REMEDY = "export the last step instead, with train.keep_best=false --force"


class Best:
    """The best under root.

    resumed: the step that the newest checkpoint calls the best; None if it knows none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.resumed: int | None = None

    def write(self, result: Mapping[str, Tensor], step: int, loss: float) -> None:
        """Keep a runner's result(); earlier ones go. Raises: as write_checkpoint."""
        write_checkpoint(self.root, step, result, {"validation loss": loss}, keep=self.resumed)

    def put(self, model: nn.Module, step: int) -> None:
        """Make a model what it was at that step.

        Raises: BadCheckpoint, if that is lost or damaged; ValueError, if it is another model's.
        """
        try:
            tensors = checkpoint_at(self.root, step).tensors()
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{error}; or {_REMEDY}") from None
        put_result(model, tensors)


@torch.no_grad()
def put_result(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put runner.result() of the same model back: weights, and scores that select the masks by the layers' own rule.

    Raises: ValueError, naming a tensor that the model has no place for.
    """
    masked, parameters = masked_modules(model), dict(model.named_parameters())
    if budget_of(model) is not None:  # that of another step may be too near 0 for scores on both sides
        for module in masked.values():
            module.threshold = _CUT
    for name, tensor in tensors.items():
        layer = name.removesuffix(".mask")
        if layer in masked:
            _put_mask(masked[layer], tensor)
        elif name in parameters:
            parameters[name].copy_(tensor)
        else:
            raise ValueError(f"the best step must be of this model, which has no {name}: {_REMEDY}")


def _put_mask(module: MaskedLayer, packed: Tensor) -> None:
    """Where a share is kept, a mask keeps that share or more: the threshold is one of its own scores."""
    kept, dropped = _KEPT, _DROPPED
    if (threshold := module.threshold) is not None:
        if module.mode == "magnitude":
            kept, dropped = 2 * threshold or _MARGIN, threshold / 2
        else:
            margin = max(_MARGIN, abs(threshold) / 2)
            kept, dropped = threshold + margin, threshold - margin
    place = module.scores.device
    scores = torch.where(unpack_mask(packed.to(place), module.scores.shape), kept, dropped)
    set_scores(module, scores)
    assert torch.equal(module.packed_mask().cpu(), packed.cpu()), "scores select the mask that they were made of"
