"""A hook on scores that autograd trains: it replaces their gradient by the surrogate gradient."""

from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mft.masks.surrogate import Surrogate


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
