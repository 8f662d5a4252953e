"""Direct preference optimisation (arXiv 2305.18290), with the unmasked base model as the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mft.checks import check_rule
from mft.data.batches import MicroBatch
from mft.objectives.log_prob_objective import LogProbObjective, log_probs_of
from mft.objectives.pairs import check_pairs, pairs_of_row, summed_by_example


class DPO(LogProbObjective):
    """For each pair: -log sigmoid(beta * ((log p - log p_base)(chosen) - (log p - log p_base)(rejected))).

    log p is the log-probability of a whole answer. With label_smoothing e in [0, 0.5) this is conservative DPO: (1 - e)
    times that loss plus e times the loss with chosen and rejected exchanged. Each row goes through the base only once.
    """

    name = "dpo"
    of_base = True
    remembers = True

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        check_rule(beta > 0, "beta", "be positive", beta)
        check_rule(0 <= label_smoothing < 0.5, "label_smoothing", "lie in [0, 0.5)", label_smoothing)
        self.beta, self.label_smoothing = beta, label_smoothing
        self._known: dict[int, list[list[float]]] = {}  # row -> the base's [chosen, rejected] for each pair

    def check_rows(self, dataset) -> None:
        check_pairs(dataset, self.name)

    def forget(self) -> None:
        self._known.clear()

    def count(self, batch: MicroBatch) -> int:
        return sum(pairs_of_row(batch))

    def needs_reference(self, batch: MicroBatch) -> bool:
        return any(row not in self._known for row in batch.rows)

    def remember(self, head: nn.Module, reference: Tensor, batch: MicroBatch) -> None:
        self._keep(torch.stack(summed_by_example(log_probs_of(head, reference, batch), batch), -1), batch)

    def loss(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Tensor:
        return self._losses(self._margins(log_probs, batch, reference)).sum()

    def figures(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> dict[str, Tensor]:
        """Return loss; accuracy: number of pairs whose chosen answer gained more; margin: beta times how much more."""
        margins = self._margins(log_probs, batch, reference)
        return {
            "loss": self._losses(margins).sum(),
            "accuracy": (margins > 0).sum(),
            "margin": self.beta * margins.sum(),
        }

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        if reference is not None:
            self.remember(head, reference, batch)
        return super().backward(head, hidden, batch, scale)

    def _margins(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Tensor:
        """Return (P,): the gain of the chosen answer's log-probability over the base's, minus that of the rejected."""
        chosen, rejected = summed_by_example(log_probs, batch)
        if reference is not None:
            base_chosen, base_rejected = summed_by_example(reference, batch)
        else:
            known = [pair for row in batch.rows for pair in self._known[row]]
            base_chosen, base_rejected = torch.tensor(known, device=log_probs.device).reshape(-1, 2).unbind(-1)
        return (chosen - base_chosen) - (rejected - base_rejected)

    def _losses(self, margins: Tensor) -> Tensor:
        right, wrong = F.logsigmoid(self.beta * margins), F.logsigmoid(-self.beta * margins)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong

    def _keep(self, sums: Tensor, batch: MicroBatch) -> None:
        """Store sums (P, 2), the base's log-probabilities, by row."""
        for row, pairs in zip(batch.rows, sums.split(pairs_of_row(batch))):
            self._known[row] = pairs.tolist()
