"""Keep the best step of a run on disk until the run has its result: masks as bits, or weights.

    best/step-00000040    a checkpoint (checkpoint.py) of runner.result() at that step; complete or absent

A killed run resumes from its newest checkpoint, which records the best step of that time. That best step stays on disk
until a newer checkpoint records another one, even if better steps have been written since.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mft.budget.budget import budget_of
from mft.masks.convert import masked_modules, set_scores
from mft.training.checkpoint import BadCheckpoint, checkpoint_at, write_checkpoint
from mft_kernels import MaskedLayer, unpack_mask

_KEPT, _DROPPED = 0.03, 0.01  # scores for masks with a keep_ratio: any two values that differ in every scores dtype
_CUT = 0.02  # a threshold between them
_MARGIN = 0.01  # least distance of scores from a fixed threshold near 0
_REMEDY = "export the last step instead, with train.keep_best=false --force"


class Best:
    """The best step, stored under root.

    resumed: the best step that the newest checkpoint records, or None.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.resumed: int | None = None

    def write(self, result: Mapping[str, Tensor], step: int, loss: float) -> None:
        """Store a runner's result() and delete earlier ones, except for resumed. Raises: as write_checkpoint."""
        write_checkpoint(self.root, step, result, {"validation loss": loss}, keep=self.resumed)

    def put(self, model: nn.Module, step: int) -> None:
        """Restore a model to its state at that step.

        Raises: BadCheckpoint if the stored step is lost or damaged; ValueError if it belongs to another model.
        """
        try:
            tensors = checkpoint_at(self.root, step).tensors()
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{error}; or {_REMEDY}") from None
        put_result(model, tensors)


@torch.no_grad()
def put_result(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore runner.result() of the same model: weights, and scores that select these masks by the layers' own rule.

    Raises: ValueError, which names a tensor that the model does not have.
    """
    masked, parameters = masked_modules(model), dict(model.named_parameters())
    if budget_of(model) is not None:  # the present threshold may be too close to 0 to place scores on both sides
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
    """Give the layer scores that select the mask.

    With a keep_ratio this works because the threshold is one of the scores, and the mask keeps that share or more.
    """
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
