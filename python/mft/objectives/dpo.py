"""Direct preference optimisation (arXiv 2305.18290), with the base that the mask lies on as the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mft.checks import check_rule
from mft.data.batches import MicroBatch
from mft.objectives.log_prob_objective import LogProbObjective, log_probs_of
from mft.objectives.pairs import check_pairs, count_pairs, pairs_of_row, summed_by_example


class DPO(LogProbObjective):
    """-log sigmoid(beta * (log p - log p_base of chosen, less that of rejected)), of each pair; log p of an answer.

    With label_smoothing e it is conservative DPO: (1 - e) of that, and e of the same with the two exchanged. A row's
    log-probabilities in the base never change: each row goes through the base once in training, and then they are
    known, two numbers a pair.

    Args: beta: positive. label_smoothing: how often a preference is wrong, in [0, 0.5).
    """

    name = "dpo"
    of_base = True
    remembers = True

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        check_rule(beta > 0, "beta", "be positive", beta)
        check_rule(0 <= label_smoothing < 0.5, "label_smoothing", "lie in [0, 0.5)", label_smoothing)
        self.beta, self.label_smoothing = beta, label_smoothing
        self._known: dict[int, list[list[float]]] = {}  # row -> [chosen, rejected] in the base of each pair

    def check_rows(self, dataset) -> None:
        check_pairs(dataset, self.name)

    def forget(self) -> None:
        self._known.clear()

    def count(self, batch: MicroBatch) -> int:
        return count_pairs(batch)

    def needs_reference(self, batch: MicroBatch) -> bool:
        return any(row not in self._known for row in batch.rows)

    def remember(self, head: nn.Module, reference: Tensor, batch: MicroBatch) -> None:
        self._keep(torch.stack(summed_by_example(log_probs_of(head, reference, batch), batch), -1), batch)

    def loss(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Tensor:
        return self._losses(self._margins(log_probs, batch, reference)).sum()

    def figures(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> dict[str, Tensor]:
        """accuracy: pairs whose chosen answer has gained more than the rejected one; margin: beta times by how much."""
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
        """(P,): how far the chosen answer's log-probability has risen above the base's, less the rejected one's."""
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
        """sums (P, 2), row by row."""
        for row, pairs in zip(batch.rows, sums.split(pairs_of_row(batch))):
            self._known[row] = pairs.tolist()
