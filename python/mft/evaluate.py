"""Held-out loss and next-token accuracy, and the paired difference of two models with its standard error.

Tokens of one document resemble each other, so documents, not tokens, are what the standard error counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft.causal_lm import split_at_head
from mft.prefix import FrozenPrefix, PrefixMemory
from mft.token_loss import token_losses

METRICS = ("loss", "accuracy")


@dataclass
class Evaluation:
    """Sums a document, in ascending order of document number; all (documents,)."""

    documents: Tensor
    tokens: Tensor
    loss_sums: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        """Mean loss a token, in nats."""
        return (self.loss_sums.sum() / self.tokens.sum()).item()

    @property
    def accuracy(self) -> float:
        """Share of tokens that are the model's likeliest."""
        return (self.correct.sum() / self.tokens.sum()).item()


def evaluate(
    model: nn.Module,
    dataset,
    *,
    batch_size: int = 2,
    first: int = 0,
    memory: PrefixMemory | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Loss and accuracy of model on dataset (columns input_ids, labels, document).

    Args:
        first, memory: the first ``first`` layers' outputs are remembered there, or taken from there (see FrozenPrefix).
        on_batch: called with the numbers of rows and of tokens after each batch.
    Raises: ValueError if dataset scores no token.
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to evaluate, got 0")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    run, head = split_at_head(model, take_rows(dataset, [0], device)[0])
    prefix = FrozenPrefix(model, first, memory, run)
    sums: dict[int, list[float]] = {}
    with torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            rows = list(range(start, min(start + batch_size, len(dataset))))
            input_ids, labels, documents = take_rows(dataset, rows, device)
            losses, correct = token_losses(head, prefix(input_ids, rows), labels)
            tokens = (labels[:, 1:] != -100).sum(-1)
            for document, *values in zip(documents, tokens.tolist(), losses.sum(-1).tolist(), correct.sum(-1).tolist()):
                entry = sums.setdefault(document, [0.0, 0.0, 0.0])
                for i, value in enumerate(values):
                    entry[i] += value
            if on_batch is not None:
                on_batch(len(rows), input_ids.numel())
    model.train(was_training)
    if not any(tokens for tokens, _, _ in sums.values()):
        raise ValueError(f"dataset must score at least one token, got {len(dataset)} rows without a label")
    table = torch.tensor([sums[document] for document in sorted(sums)], dtype=torch.float64)
    return Evaluation(torch.tensor(sorted(sums)), *table.unbind(-1))


def paired_difference(a: Evaluation, b: Evaluation, metric: str = "loss") -> tuple[float, float]:
    """Mean of a - b a token, and its standard error over documents (a ratio estimate, clustered by document).

    d = sum of a - sum of b in a document, n its tokens, D documents: mean m = sum d / sum n,
    standard error = sqrt(D / (D - 1) * sum (d - m n)^2) / sum n; NaN for a single document.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if not torch.equal(a.documents, b.documents) or not torch.equal(a.tokens, b.tokens):
        raise ValueError("a and b must be evaluated on the same documents and tokens to be paired")
    d = a.loss_sums - b.loss_sums if metric == "loss" else a.correct - b.correct
    total, count = a.tokens.sum(), len(a.documents)
    mean = (d.sum() / total).item()
    if count < 2:
        return mean, math.nan
    residuals = d - mean * a.tokens
    error = (residuals.square().sum() * count / (count - 1)).sqrt() / total
    return mean, error.item()


def take_rows(dataset, rows: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, list[int]]:
    """input_ids and labels (B, T), and the documents of the rows."""
    batch = dataset.with_format("torch")[rows]
    return batch["input_ids"].to(device), batch["labels"].to(device), batch["document"].tolist()
