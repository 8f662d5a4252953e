"""Keep the best step of a run on disk until the run has its result: masks as bits, or weights.

    best/step-00000040    a checkpoint (checkpoint.py) of States.result() at that step; complete or absent

A killed run resumes from its newest checkpoint, which records the best step of that time. That best step stays on disk
until a newer checkpoint records another one, even if better steps have been written since.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mft.engines.sharded.score_rows import ScoreRows, score_rows
from mft.masks.budget import budget_of
from mft.masks.convert import masked_modules, set_scores
from mft.training.checkpoint import BadCheckpoint, checkpoint_at, write_checkpoint
from mft_kernels import MaskedLayer, fixed_from_float, unpack_mask

_KEPT, _DROPPED = 0.03, 0.01  # scores for masks with a keep_ratio: any two values that differ in every scores dtype
_CUT = {"magnitude": 0.02, "value": 0.0}  # by mode: the threshold of masks under a budget
_MARGIN = 0.01  # least distance of scores from a fixed threshold near 0
_REMEDY = "export the last step instead, with train.keep_best=false --force"


class Best:
    """The best step, stored under root. resumed: the best step that the newest checkpoint records, or None."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.resumed: int | None = None

    def write(self, result: Mapping[str, Tensor], step: int, loss: float) -> None:
        """Store a States.result() and delete earlier ones, except for resumed. Raises: as write_checkpoint."""
        write_checkpoint(self.root, step, result, {"validation loss": loss}, keep=self.resumed)

    def put(self, model: nn.Module, step: int) -> None:
        """Restore a model to its state at that step. For a model with score_rows, all processes must call this.

        Raises: BadCheckpoint if the stored step is lost or damaged; ValueError if it belongs to another model.
        """
        rows = score_rows(model)
        if rows is not None:
            with rows.processes.together():
                found = self._tensors(step) if rows.processes.first else {}
                _check_names(found, {f"{name}.mask" for name in rows.rows} if found else ())
            _put_rows(model, rows, found)
            return
        put_result(model, self._tensors(step))

    def _tensors(self, step: int) -> dict[str, Tensor]:
        try:
            return checkpoint_at(self.root, step).tensors()
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{error}; or {_REMEDY}") from None


@torch.no_grad()
def put_result(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore States.result() of the same model. Raises: ValueError, which names a tensor of another model."""
    masked, parameters = masked_modules(model), dict(model.named_parameters())
    _check_names(tensors, {*(f"{name}.mask" for name in masked), *parameters})
    _set_cut(model)
    for name, tensor in tensors.items():
        layer = name.removesuffix(".mask")
        if layer in masked:
            _put_mask(masked[layer], tensor)
        else:
            parameters[name].copy_(tensor)


def _check_names(found: Iterable[str], known: Collection[str]) -> None:
    for name in found:
        if name not in known:
            raise ValueError(f"the best step must be of this model, which has no {name}: {_REMEDY}")


def _put_rows(model: nn.Module, rows: ScoreRows, tensors: Mapping[str, Tensor]) -> None:
    """Do put_result for this process's rows; tensors: the result on the first process."""
    masked = masked_modules(model)
    _set_cut(model)
    for name, packed in rows.scattered({name.removesuffix(".mask"): mask for name, mask in tensors.items()}):
        own = rows.rows[name]
        scores = _scores_for(masked[name], unpack_mask(packed, own.shape))
        own.copy_(fixed_from_float(scores) if own.dtype == torch.int16 else scores)


def _set_cut(model: nn.Module) -> None:
    if budget_of(model) is not None:  # the present threshold may be too close to 0 to place scores on both sides
        for module in masked_modules(model).values():
            module.threshold = _CUT[module.mode]


def _put_mask(module: MaskedLayer, packed: Tensor) -> None:
    """Give the layer scores that select the mask."""
    set_scores(module, _scores_for(module, unpack_mask(packed.to(module.scores.device), module.scores.shape)))
    assert torch.equal(module.packed_mask().cpu(), packed.cpu()), "scores select the mask that they were made of"


def _scores_for(module: MaskedLayer, keep: Tensor) -> Tensor:
    """Return scores that select these weights by the layer's own rule: its threshold is then one of the scores."""
    kept, dropped = _KEPT, _DROPPED
    if (threshold := module.threshold) is not None:
        if module.mode == "magnitude":
            kept, dropped = 2 * threshold or _MARGIN, threshold / 2
        else:
            margin = max(_MARGIN, abs(threshold) / 2)
            kept, dropped = threshold + margin, threshold - margin
    return torch.where(keep, kept, dropped)
