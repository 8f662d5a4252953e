"""Cross entropy of the scored tokens: the default objective."""

from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.models.token_loss import backward_labelled_loss
from mft.objectives.objective import Objective


class CrossEntropy(Objective):
    """Sum of -log p(token). Evaluation always computes this loss, so measure() adds nothing."""

    name = "cross_entropy"

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        return backward_labelled_loss(head, hidden, batch.labelled.to(hidden.device), scale)

    def measure(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, reference: Tensor | None = None
    ) -> dict[str, float]:
        return {}


CROSS_ENTROPY = CrossEntropy()
