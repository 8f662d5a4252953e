"""The KL divergence of a model's next-token distributions from those of its start, over given rows."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.data.batches import MicroBatch, count_labels, take_rows
from mft.engines.mode import place
from mft.engines.placed import Placed
from mft.models.causal_lm import FEW, decoder_layers, evaluating, split_at_head
from mft.models.frozen_layers import FrozenPrefix, PrefixMemory
from mft.models.longrope import inputs_of
from mft.models.next_tokens import check_next_tokens
from mft.models.packed_rows import keep_apart
from mft.objectives.chunks import chunks_of, few_rows, scored_states
from mft.objectives.kl import divergence
from mft_kernels import outdate


@torch.no_grad()
def kl_divergence(
    model: nn.Module | Placed,
    start: nn.Module,
    dataset,
    *,
    batch_size: int = 2,
    whole: PrefixMemory | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute KL(start || model) = sum over words of p_start * (log p_start - log p_model) for each scored token.

    This is large if the model finds unlikely what the start found likely. sums.sum() / tokens.sum() is in nats per
    token.
    Args:
        model, start: Two models on one device with one vocabulary. Their modes (train or eval) are restored.
        whole: A cache of the outputs of all layers of model, if there is one.
        options: See engines.mode.place: first and memory. The first ``first`` layers are the same in both models.
    Returns: (sums, tokens), each fp64 (documents,) in ascending order of document number, as in Evaluation.
    Raises: ValueError if dataset scores no token, or if the models' vocabularies differ in size.
    """
    placed = place(model, **options)
    model, first, memory = placed.model, placed.first, placed.memory
    check_rule(len(dataset) > 0, "dataset", "hold at least one row to measure", len(dataset))
    first_row = take_rows(dataset, [0]).input_ids
    for one in (model, start):
        check_next_tokens(one.config, type(one).__name__, first_row.shape[1])
    outdate()  # select the masks again, however the scores were written
    sample = first_row[:, :FEW].to(next(model.parameters()).device)
    sums: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for one in (model, start):
            stack.enter_context(evaluating(one))
            stack.enter_context(keep_apart(one, dataset, sample, batch_size))
        (run, head), (run_start, head_start) = split_at_head(model, sample), split_at_head(start, sample)
        deepest = (first, memory) if whole is None else (len(decoder_layers(model)), whole)
        prefix, prefix_start = FrozenPrefix(model, *deepest, run), FrozenPrefix(start, first, memory, run_start)
        for row in range(0, len(dataset), batch_size):
            batch = take_rows(dataset, list(range(row, min(row + batch_size, len(dataset)))))
            ids, positions = inputs_of(batch, model, sample.device)
            states = scored_states(prefix(ids, batch.rows, positions), batch)
            wanted = scored_states(prefix_start(ids, batch.rows, positions), batch)
            found = torch.stack([_row_sums(head, states, head_start, wanted, batch), count_labels(batch.labels)], -1)
            for document, values in zip(batch.documents, found):
                sums[document] = sums.get(document, 0) + values
    table = torch.stack([sums[document] for document in sorted(sums)])
    check_rule(bool(table[:, 1].any()), "dataset", "score at least one token", f"{len(dataset)} rows without a label")
    return table[:, 0], table[:, 1]


def _row_sums(head: nn.Module, states: Tensor, head_start: nn.Module, wanted: Tensor, batch: MicroBatch) -> Tensor:
    """Return (B,) fp64 on the CPU: the sum of the divergences of each row, from states (M, D) of the scored tokens."""
    values = torch.empty(len(states), dtype=torch.float64)
    for (part, chunk), (_, held_to) in zip(chunks_of(states), chunks_of(wanted)):
        logits, logits_start = head(chunk), head_start(held_to)
        if logits.shape != logits_start.shape:
            raise ValueError(
                f"start must have the vocabulary of model, got {logits_start.shape[-1]} words for {logits.shape[-1]}"
            )
        of_chunk = values[part]
        for rows in few_rows(logits):
            # fp64: log-probabilities of 49,152 words err by 1e-6 in fp32, as much as a few steps' divergence.
            log_p, log_q = (each[rows].log_softmax(-1, dtype=torch.float64) for each in (logits_start, logits))
            of_chunk[rows] = divergence(log_p, log_q).cpu()
    rows_of = batch.labelled.positions // batch.input_ids.shape[1]
    return torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, rows_of, values)
