"""Held-out loss and next-token accuracy, and the paired difference of two models with its standard error.

Tokens of one document resemble each other, so the standard error counts documents, not tokens.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.data.batches import MicroBatch, count_labels, take_rows, trim_padding
from mft.engines.distributed import ALONE
from mft.engines.mode import place
from mft.engines.placed import Placed
from mft.engines.step import Reader
from mft.masks.base_pass import use_whole_weights
from mft.masks.convert import masked_modules
from mft.masks.in_place.model import masks_in_place
from mft.models.next_tokens import check_next_tokens
from mft.models.token_loss import token_losses
from mft_kernels import outdate

METRICS = ("loss", "accuracy")


@dataclass
class Evaluation:
    """Sums per document, in ascending order of document number; all tensors are (documents,).

    figures: the objective's figures, as means per unit that it counts; "loss" is its own loss. sources: of each
    document of a mix. tempered_sums: loss_sums with logits divided by a temperature, if evaluate was given one.
    """

    documents: Tensor
    tokens: Tensor
    loss_sums: Tensor
    correct: Tensor
    figures: dict[str, float] = field(default_factory=dict)
    sources: Sequence[str] = ()
    tempered_sums: Tensor | None = None

    def by_source(self) -> dict[str, "Evaluation"]:
        """Return the evaluation of each source of a mix; empty without a mix."""
        parts = {}
        for name in dict.fromkeys(self.sources):
            own = torch.tensor([source == name for source in self.sources])
            parts[name] = Evaluation(self.documents[own], self.tokens[own], self.loss_sums[own], self.correct[own])
        return parts

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return (self.loss_sums.sum() / self.tokens.sum()).item()

    @property
    def objective_loss(self) -> float:
        """The objective's own loss, which training minimises; the cross entropy if the objective reports no other."""
        return self.figures.get("loss", self.loss)

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model ranks first."""
        return (self.correct.sum() / self.tokens.sum()).item()


def evaluate(
    model: nn.Module | Placed,
    dataset,
    *,
    batch_size: int = 2,
    on_batch: Callable[[int, int], None] | None = None,
    temperature: float | None = None,
    **options: Any,
) -> Evaluation:
    """Compute loss and accuracy of model on dataset (columns input_ids, labels, document).

    Args:
        on_batch: Called with the numbers of rows and of tokens after each batch. It may raise.
        temperature: Divides the logits for the sums of a second loss.
        options: See engines.mode.place: way and device; objective, whose figures are measured too; processes, which
            share the batches and get all sums; first and memory.
    Raises: ValueError if dataset scores no token, the model has too few positions, or temperature is not positive.
    """
    placed = place(model, **options)
    model, objective, processes = placed.model, placed.objective, placed.processes
    if placed.runner is not None and placed.runner.in_lockstep:
        processes = ALONE
    divisor = 1.0 if temperature is None else temperature
    check_rule(0 < divisor < math.inf, "temperature", "be positive and finite", divisor)
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to evaluate, got 0")
    check_next_tokens(model.config, type(model).__name__, take_rows(dataset, [0]).input_ids.shape[1])
    objective.check_rows(dataset)
    outdate()  # select the masks again, however the scores were written
    was_training = model.training
    model.eval()
    starts = range(0, len(dataset), batch_size)
    groups = list(enumerate(range(start, min(start + batch_size, len(dataset))) for start in starts))
    own = groups[processes.rank :: processes.count]
    taken = (take_rows(dataset, list(rows)) for _, rows in own)
    # The cached output of a row has the length of the whole row.
    batches = taken if placed.first and placed.memory is not None else map(trim_padding, taken)
    found: list[_Found] = []
    try:
        with (
            torch.no_grad(),
            placed.reading(dataset, batch_size) as reader,
            contextlib.closing(_states(placed, reader, batches)) as states,  # so that an engine always ends its pass
        ):
            for (batch, hidden, base), (number, _) in zip(states, own):  # states first, so that it is exhausted
                of_tokens = token_losses(reader.head, hidden, batch.labels.to(hidden.device), divisor)
                values = (count_labels(batch.labels).tolist(), *(each.sum(-1).tolist() for each in of_tokens))
                measured = objective.measure(reader.head, hidden, batch, base)
                found.append((number, batch.documents, batch.sources, values, objective.count(batch), measured))
                if on_batch is not None:
                    on_batch(len(batch.rows), batch.input_ids.numel())
    finally:
        model.train(was_training)
    sums: dict[int, list[float]] = {}
    source_of: dict[int, str] = {}
    figures: dict[str, float] = {}
    counted = 0
    # In the order of a single process, because the last bits depend on it.
    everything = sorted(itertools.chain(*processes.gather(found)), key=lambda one: one[0])
    for _, documents, names, values, count, measured in everything:
        source_of |= zip(documents, names)
        for document, *row in zip(documents, *values):
            entry = sums.setdefault(document, [0.0, 0.0, 0.0, 0.0])
            for i, value in enumerate(row):
                entry[i] += value
        counted += count
        for name, total in measured.items():
            figures[name] = figures.get(name, 0.0) + total
    if not any(tokens for tokens, *_ in sums.values()):
        raise ValueError(f"dataset must score at least one token, got {len(dataset)} rows without a label")
    table = torch.tensor([sums[document] for document in sorted(sums)], dtype=torch.float64)
    means = {name: total / max(counted, 1) for name, total in figures.items()}
    sources = [source_of[document] for document in sorted(sums)] if source_of else []
    tokens, loss_sums, correct, tempered = table.unbind(-1)
    tempered_sums = None if temperature is None else tempered
    return Evaluation(torch.tensor(sorted(sums)), tokens, loss_sums, correct, means, sources, tempered_sums)


def paired_difference(a: Evaluation, b: Evaluation, metric: str = "loss") -> tuple[float, float]:
    """Return the mean of a - b per token, and its standard error over documents (a ratio estimate, by document).

    d = sum of a - sum of b in a document, n its tokens, D documents: mean m = sum d / sum n,
    standard error = sqrt(D / (D - 1) * sum (d - m n)^2) / sum n; NaN for a single document.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if not torch.equal(a.documents, b.documents) or not torch.equal(a.tokens, b.tokens):
        raise ValueError(
            f"a and b must be evaluated on the same documents and tokens to be paired, got {len(a.documents)} and "
            f"{len(b.documents)} documents of {int(a.tokens.sum())} and {int(b.tokens.sum())} tokens"
        )
    d = a.loss_sums - b.loss_sums if metric == "loss" else a.correct - b.correct
    total, count = a.tokens.sum(), len(a.documents)
    mean = (d.sum() / total).item()
    if count < 2:
        return mean, math.nan
    residuals = d - mean * a.tokens
    error = (residuals.square().sum() * count / (count - 1)).sqrt() / total
    return mean, error.item()


# For a batch: its number; documents; their sources in a mix; lists of tokens, losses, correct tokens and tempered
# losses; the objective's count and its figures.
_Found = tuple[int, list[int], Sequence[str], tuple[list[float], ...], int, dict[str, float]]


def _states(
    placed: Placed, reader: Reader, batches: Iterable[MicroBatch]
) -> Generator[tuple[MicroBatch, Tensor, Tensor | None], None, None]:
    """Yield each batch, the head's input, and the base's if the objective needs it."""
    model, objective = placed.model, placed.objective
    is_base = masks_in_place(model) is None and not masked_modules(model)
    for group in _groups(batches, reader.together):
        bases: list[Tensor] = []
        if objective.of_base and not is_base:
            with use_whole_weights(model):
                bases += [base.cpu() for base in reader.hidden_states(group)]
        objective.prepare(group)
        # The states come first in zip, so that the engine's iterator is exhausted.
        for hidden, (number, batch) in zip(reader.hidden_states(group), enumerate(group)):
            base = hidden if objective.of_base and is_base else None
            yield batch, hidden, bases[number].to(hidden.device) if bases else base


def _groups(batches: Iterable[MicroBatch], size: int) -> Iterator[list[MicroBatch]]:
    source = iter(batches)
    while group := list(itertools.islice(source, size)):
        yield group
