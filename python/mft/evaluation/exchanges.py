"""Split rows into prompts, which are not scored, and their completions, which are."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mft.data.batches import take_rows
from mft.data.tokenization import IGNORED


@dataclass(frozen=True)
class Exchange:
    """Tokens of a prompt, tokens of the data's completion with the one that ends it, and the number of the document."""

    prompt: list[int]
    completion: list[int]
    document: int


def split_rows(dataset, eos: int, max_new_tokens: int | None) -> list[Exchange]:
    """Return the one exchange of each row, in their order; a packed row has one per example.

    Raises: ValueError if there is no prompt, or not exactly one completion that ends with eos within max_new_tokens.
    """
    return [
        Exchange(*_split(row, ids, labels, eos, max_new_tokens), document)
        for row, ids, labels, document in _examples(dataset)
    ]


def find_answers(dataset, ends: Collection[int], *, pairs: bool = False) -> list[Exchange]:
    """Return each scored answer with all that comes before it; without a prompt or one of ends, it is left out.

    A chat of several turns has several answers. Of a pair, only the chosen one counts.
    """
    found = []
    for _, ids, labels, document in itertools.islice(_examples(dataset), 0, None, 1 + pairs):
        scored = (labels != IGNORED).tolist()
        runs = (list(run) for _, run in itertools.groupby(range(len(ids)), scored.__getitem__))
        for first, last in ((run[0], run[-1]) for run in runs if scored[run[0]]):
            if first and int(ids[last]) in ends:
                found.append(Exchange(ids[:first].tolist(), ids[first : last + 1].tolist(), document))
    return found


# ---------------------------------------------------------------------------------------------- private


def _examples(dataset) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """Yield (number of the row, ids, labels, document) of each example. Padding may follow the last one of a row."""
    if not len(dataset):
        return
    batch = take_rows(dataset, list(range(len(dataset))))
    is_packed = "starts" in getattr(dataset, "column_names", ())
    starts: Any = dataset.with_format(None)["starts"] if is_packed else itertools.repeat([0])
    for row, ids, labels, document, places in zip(batch.rows, batch.input_ids, batch.labels, batch.documents, starts):
        for first, end in itertools.pairwise([*places, len(ids)]):
            yield row, ids[first:end], labels[first:end], document


def _split(row: int, ids: Tensor, labels: Tensor, eos: int, max_new_tokens: int | None) -> tuple[list[int], list[int]]:
    scored = (labels != IGNORED).nonzero().flatten().tolist()
    rule = None
    if not scored or scored[0] == 0:
        rule = "have a prompt that is not scored and a completion that is"
    elif scored[-1] - scored[0] + 1 != len(scored):
        rule = "have one completion, scored in one piece: load it without packing"
    elif ids[scored[-1]] != eos:
        rule = "end its completion with eos: it was cut off, so raise data.sequence_length"
    elif max_new_tokens is not None and len(scored) > max_new_tokens:
        rule = f"be answerable in max_new_tokens = {max_new_tokens}, eos included"
    if rule is not None:
        raise ValueError(f"row {row} of dataset must {rule}, got {len(scored)} scored tokens of {len(ids)}")
    return ids[: scored[0]].tolist(), ids[scored].tolist()
