"""The surrogate gradient for trainers that own the optimiser: a hook on the scores, and a callback for the sharpness.

    Trainer(..., callbacks=[SharpnessCallback()])      # transformers' Trainer, and TRL's

In PEFT an adapter hooks its scores itself. Without the callback its sharpness stays at the start of mask.sharpness. On
a model from mask_model the callback hooks the scores while the trainer trains.
"""

from collections.abc import Iterator
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from mft.surrogate.surrogate import Surrogate, surrogate_of
from mft_kernels import MaskedLayer


class SurrogateHook:
    """A hook on scores that autograd trains. It replaces their gradient by the surrogate gradient.

    The penalty is added in the first backward pass of a step, which is the one that finds no .grad. Therefore gradients
    must be set to None between steps (zero_grad's default), not to zeros, and the loss must not be scaled, as fp16
    training does.
    """

    __torch_unserializable__ = True  # a new hook is made when scores are loaded

    def __init__(self, scores: nn.Parameter, surrogate: Surrogate, threshold: float, mode: str) -> None:
        self._scores = ref(scores)  # weak, because the scores hold the hook
        self._surrogate, self._threshold, self._mode = surrogate, threshold, mode

    def __call__(self, grad: Tensor) -> Tensor:
        scores = self._scores()
        assert scores is not None, "whose gradient it is"
        first = scores.grad is None
        rule: dict[str, Any] = {"threshold": self._threshold, "mode": self._mode}
        return self._surrogate.gradient(grad, scores, **rule, penalised=first).to(grad.dtype)


def hook_scores(
    scores: nn.Parameter, surrogate: Surrogate, *, threshold: float | None, mode: str
) -> RemovableHandle | None:
    """Add a SurrogateHook to scores; return None if they have one. Raises: ValueError without a threshold."""
    if any(isinstance(hook, SurrogateHook) for hook in (scores._backward_hooks or {}).values()):
        return None
    if threshold is None:
        raise ValueError(
            "threshold must be a number with mask.sharpness, which is measured from the threshold, got None"
        )
    return scores.register_hook(SurrogateHook(scores, surrogate, threshold, mode))


class SharpnessCallback(TrainerCallback):
    """Moves the sharpness of a model's masks from its start to its end over a trainer's steps."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle | None] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if (surrogate := surrogate_of(model)) is not None:
            masked = [module for module in model.modules() if isinstance(module, MaskedLayer)]
            self._handles = [
                hook_scores(m.scores, surrogate, threshold=m.threshold, mode=m.mode)
                for m in masked
                if m.scores.requires_grad
            ]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for surrogate in _surrogates(model):
            surrogate.sharpen(state.global_step + 1, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for handle in self._handles:
            if handle is not None:
                handle.remove()
        self._handles = []


def _surrogates(model: Any) -> Iterator[Surrogate]:
    for holder in (model, *getattr(model, "peft_config", {}).values()):
        if (surrogate := surrogate_of(holder)) is not None:
            yield surrogate
