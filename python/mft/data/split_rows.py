"""Turn the records of one source into the rows of three splits, with notes for the reader."""

import math
from typing import Any

from mft.config import DataConfig
from mft.data.packing import Rows, build_rows
from mft.data.sources import SPLITS, Source
from mft.data.tokenization import open_documents

# Below these limits, a comparison means nothing. The standard error over 8 documents is itself uncertain by a quarter.
# The mean loss of 256 tokens is uncertain by 0.06 nats per token, because a token's loss varies by about 1 nat.
FEW_DOCUMENTS, FEW_TOKENS = 8, 256
_WITHOUT = {"validation": ": the run has no validation loss and no best step", "test": ""}


def build_splits(
    config: DataConfig, tokenizer: Any, source: Source, share: float = 1.0, *, pairs: bool = False
) -> tuple[dict[str, Rows], list[str]]:
    """Return (rows by split, notes); share: of the budgets. Raises: ValueError if a split has no token to score."""
    records = source.load()
    built, notes = {}, list(source.notes)
    for split in SPLITS:
        if not len(records[split].rows):  # its share is 0
            built[split] = Rows(config.sequence_length, pad_of(tokenizer))
            notes.append(f"{split}: none, because data.{split}_share is 0{_WITHOUT[split]}")
            continue
        documents = open_documents(records[split], tokenizer, assistant_only=config.assistant_only, pairs=pairs)
        training = split == "train"
        budget, tokens = row_budget(config, share, training=training), None
        if not (training or documents.is_text or source.counts_padding or config.max_eval_tokens is None):
            budget, tokens = None, math.ceil(share * config.max_eval_tokens)
        rows = build_rows(
            documents,
            config.sequence_length,
            pad_of(tokenizer),
            budget=budget,
            packing=training and config.packing,
            seed=config.seed if training else 0,
            tokens=tokens,
        )
        numbers = records[split].numbers
        rows.document = [numbers[i] for i in rows.document]
        covered = len({numbers[i] for members in rows.members for i in members})
        notes += describe_rows(split, rows, documents.empty, covered, len(set(numbers)))
        if not len(rows):
            raise ValueError(
                f"data.source {config.source!r} must leave rows to score in every split, got none "
                f"for {split}: {'; '.join(notes[-2:])}"
            )
        built[split] = rows
        if not training:
            notes += warn_of_few(split, len(set(rows.document)), sum(rows.scored()))
    return built, notes


def row_budget(config: DataConfig, share: float, *, training: bool) -> int | None:
    """Return the number of whole rows, at least one, in a share of the token budget; None: no limit."""
    tokens = config.max_train_tokens if training else config.max_eval_tokens
    return None if tokens is None else max(1, math.ceil(share * (tokens // config.sequence_length)))


def pad_of(tokenizer: Any) -> int:
    """Return the padding token. Any token works: padding is not scored, and scored tokens do not see it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def describe_rows(split: str, rows: Rows, empty: int, covered: int, available: int) -> list[str]:
    """Return lines on what happened to a split's documents; the last line is the summary."""
    notes = []
    if empty:
        notes.append(f"{split}: {empty} examples have nothing to score (empty text, or no answer) and were left out")
    if rows.cut:
        notes.append(
            f"{split}: {rows.cut} examples are longer than sequence_length = {rows.length} and were cut "
            "there; those whose answer begins later were left out"
        )
    if rows.left_out:
        notes.append(
            f"{split}: {rows.left_out} pairs are longer than sequence_length = {rows.length}, both answers with their "
            "prompts together, and were left out"
        )
    notes.append(
        f"{split}: {len(rows)} rows of {rows.length} tokens, {sum(rows.scored())} of them scored, {rows.padding:.1%} "
        f"padding, from {covered} of {available} documents"
    )
    return notes


def warn_of_few(split: str, documents: int, scored: int) -> list[str]:
    """Return a warning if a split's scored tokens or documents are too few to judge a model; otherwise no lines."""
    if documents >= FEW_DOCUMENTS and scored >= FEW_TOKENS:
        return []
    return [
        f"warning: {split} has {scored} scored tokens of {documents} document{'s' * (documents != 1)}, too few to tell "
        f"two models apart (at least {FEW_TOKENS} of {FEW_DOCUMENTS}): give more examples, or raise "
        "data.max_eval_tokens if it is set"
    ]
