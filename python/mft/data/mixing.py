"""Mix several sources: choose whose row comes next so that each gets its share of the rows, and report the result.

Shares are of rows, and so of tokens with padding, as token budgets count them. The next row comes from the source that
is furthest behind its share, without random draws, so the shares hold at any moment as closely as whole rows allow.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft.config import DataConfig
from mft.data.packing import Rows
from mft.data.sources import SPLITS, Source, name_source
from mft.data.split_rows import build_splits, pad_of

_MOST_REPEATS = 100  # of all rows, on average; more than this means a mistaken weight


@dataclass
class Taken:
    """What training has taken from a source: rows, tokens without padding, and the scored ones among these tokens."""

    rows: int = 0
    tokens: int = 0
    scored: int = 0

    def add(self, tokens: int, scored: int) -> None:
        self.rows += 1
        self.tokens += tokens
        self.scored += scored


def next_source(weights: Sequence[float], taken: Sequence[int]) -> int:
    """Return the source of the next row, given the rows taken: the one furthest behind its share, or the first such."""
    rows, whole = sum(taken) + 1, sum(weights)
    return max(range(len(weights)), key=lambda i: (weights[i] / whole * rows - taken[i], -i))


def mix_order(counts: Sequence[int], weights: Sequence[float], strategy: str, budget: int | None) -> list[int]:
    """Return the source of each row, from first to last; counts: rows of each source.

    first_exhausted stops when a source runs out. all_exhausted restarts such a source until each has given all rows.
    Raises: ValueError if all_exhausted would repeat rows far more often than intended.
    """
    longest = max(count * sum(weights) / weight for count, weight in zip(counts, weights))
    if strategy == "all_exhausted" and budget is None and longest > _MOST_REPEATS * sum(counts):
        raise ValueError(
            f"data.stopping_strategy must not be all_exhausted if that repeats {sum(counts)} rows {_MOST_REPEATS} "
            f"times, got about {longest:.0f} rows: set first_exhausted or data.max_train_tokens, or other weights"
        )
    taken = [0] * len(counts)
    order: list[int] = []
    while budget is None or len(order) < budget:
        source = next_source(weights, taken)
        if strategy == "first_exhausted" and taken[source] == counts[source]:
            break
        taken[source] += 1
        order.append(source)
        if strategy == "all_exhausted" and all(had >= count for had, count in zip(taken, counts)):
            break
    return order


def build_mix(
    config: DataConfig, tokenizer: Any, source: Source, *, pairs: bool = False
) -> tuple[dict[str, Rows], list[str]]:
    """Return (rows by split, notes) for config.sources, by budget shares. Raises: ValueError that names the source."""
    sources = config.sources or {}
    whole = sum(given.weight for given in sources.values())
    parts, notes = {}, []
    for name, part in source.parts.items():
        with name_source(name):
            share = sources[name].weight / whole
            built, said = build_splits(config.source_config(name), tokenizer, part, share, pairs=pairs)
        parts[name] = built
        notes += [f"{name}: {note}" for note in said]
    mix = {split: pool({name: built[split] for name, built in parts.items()}, parts) for split in SPLITS[1:]}
    training = {name: built["train"] for name, built in parts.items()}
    budget = None if config.max_train_tokens is None else config.max_train_tokens // config.sequence_length
    weights = [given.weight for given in sources.values()]
    order = mix_order([len(rows) for rows in training.values()], weights, config.stopping_strategy, budget)
    if not order:
        raise ValueError(f"data.sources must leave rows to train on, got none with {config.stopping_strategy}")
    mix["train"] = _in_order(training, order, first_numbers(parts), config.seed, pad_of(tokenizer))
    taken = {name: Taken() for name in parts}
    for name, size, scored in zip(mix["train"].source, mix["train"].sizes, mix["train"].scored()):
        taken[name].add(size, scored)
    counts = {name: len(rows) for name, rows in training.items()}
    notes += describe_mix(taken, {name: given.weight for name, given in sources.items()}, counts)
    return {split: mix[split] for split in SPLITS}, notes


def pool(rows: Mapping[str, Rows], parts: Mapping[str, Mapping[str, Rows]]) -> Rows:
    """Return the rows of all sources, one source after another."""
    first = first_numbers(parts)
    pooled: Rows | None = None
    for name, part in rows.items():
        pooled = pooled or Rows(part.length, part.pad)
        for row, document in enumerate(part.document):
            pooled.take(part, row, document=first[name] + document, source=name)
    assert pooled is not None
    return pooled


def first_numbers(parts: Mapping[str, Mapping[str, Rows]]) -> dict[str, int]:
    """Return, by source, an offset for its document numbers, so that no two sources share a number."""
    counts = [max(max(rows.document, default=-1) for rows in built.values()) + 1 for built in parts.values()]
    return dict(zip(parts, itertools.accumulate(counts, initial=0)))


def describe_mix(
    taken: Mapping[str, Taken], weights: Mapping[str, float], counts: Mapping[str, int] | None = None
) -> list[str]:
    """Return one line per source with its share of the training data; counts: rows of each source, if known."""
    rows, tokens, scored = (
        max(1, sum(getattr(one, what) for one in taken.values())) for what in ("rows", "tokens", "scored")
    )
    lines = []
    for name, one in taken.items():
        given = f"{one.rows} rows" if counts is None else f"its {counts[name]} rows {one.rows / counts[name]:.2g} times"
        lines.append(
            f"train: {name} (weight {weights[name]:g}) gives {given}: {one.rows / rows:.1%} of all rows, "
            f"{one.tokens / tokens:.1%} of the tokens, {one.scored / scored:.1%} of what is scored"
        )
    return lines


# ---------------------------------------------------------------------------------------------- private


def _in_order(parts: Mapping[str, Rows], order: Sequence[int], first: Mapping[str, int], seed: int, pad: int) -> Rows:
    """Return rows in this order of source indices. Each source's rows are shuffled once by seed, then cycled."""
    names = list(parts)
    drawn = {name: list(range(len(rows))) for name, rows in parts.items()}
    for name, numbers in drawn.items():
        random.Random(f"{seed} {name}").shuffle(numbers)
    endless = {name: itertools.cycle(numbers) for name, numbers in drawn.items()}
    mixed = Rows(next(iter(parts.values())).length, pad)
    for source in order:
        name = names[source]
        row = next(endless[name])
        mixed.take(parts[name], row, document=first[name] + parts[name].document[row], source=name)
    return mixed
