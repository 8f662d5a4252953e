"""The ordinary step: autograd over the model's own forward, then AdamW; what every other way of running must equal."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mft.batches import MicroBatch
from mft.config import TrainConfig
from mft.layer_engine import OnLoss
from mft.master_weights import MasterAdamW
from mft.prefix import FrozenPrefix, PrefixMemory
from mft.score_states import MOMENTS
from mft.token_loss import backward_labelled_loss
from mft_kernels import MaskAdamW, MaskedLinear


class Plain:
    """Trains what requires grad: weights by AdamW on fp32 masters, scores that are not fp32 by MaskAdamW.

    Args: run, head: see causal_lm.split_at_head. memory: of the frozen layers' outputs, or None.
    """

    way = "plain"

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        run: Callable[[nn.Module, Tensor], Tensor],
        head: nn.Module,
        memory: PrefixMemory | None,
    ) -> None:
        self._head = head
        self._prefix = FrozenPrefix(model, memory=memory, run=run)
        self._device = next(model.parameters()).device
        self._optimizer = _optimizer(model, train)
        self._optimizer.__enter__()
        self.before_update: Callable[[], None] | None = None  # see train_loop

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """One optimiser step; see LayerEngine."""
        for batch in batches:
            hidden = self._prefix(batch.input_ids.to(self._device), batch.rows)
            on_loss(batch, backward_labelled_loss(self._head, hidden, batch.labelled.to(self._device), scale))
        if self.before_update is not None:
            self.before_update()
        self._optimizer.set_lr(lr)
        if max_norm is not None:
            self._optimizer.clip(max_norm)
        self._optimizer.step()

    def check(self) -> None:
        """Nothing: a masked layer finds non-finite scores in its next forward."""

    def close(self) -> None:
        self._optimizer.__exit__()


class _ScoreAdamW:
    """MaskAdamW over scores, in MasterAdamW's place."""

    def __init__(self, masked: Sequence[MaskedLinear], train: TrainConfig) -> None:
        self._scores = [module.scores for module in masked]
        self._optimizer = MaskAdamW(
            [{"params": [module.scores], "mode": module.mode} for module in masked],
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            moments=MOMENTS[train.moments],
            seed=train.seed,
        )

    def __enter__(self) -> "_ScoreAdamW":
        return self

    def __exit__(self, *_) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def clip(self, max_norm: float) -> None:
        nn.utils.clip_grad_norm_(self._scores, max_norm)

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _optimizer(model: nn.Module, train: TrainConfig) -> MasterAdamW | _ScoreAdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    masked = [m for m in model.modules() if isinstance(m, MaskedLinear) and m.scores.requires_grad]
    if len(masked) != len(trained) or not masked:
        if train.moments != "float32":
            raise ValueError(f"train.moments must be float32 where weights are trained, got {train.moments}")
        return MasterAdamW(trained, train)
    if train.moments == "float32" and all(module.scores.dtype == torch.float32 for module in masked):
        return MasterAdamW(trained, train)
    return _ScoreAdamW(masked, train)
