"""mft data show: print rows as a model sees them, token by token. No weights are loaded."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from mft.checks import check_one_of
from mft.config import RunConfig
from mft.data.sources import SPLITS
from mft.data.split_rows import pad_of
from mft.data.streams import StreamedRows
from mft.data.tokenization import IGNORED
from mft.escaping import one_line
from mft.tracking.console import console, say
from mft.training.inputs import read_rows

LEGEND = "⟦ ⟧ enclose what is scored, · separates tokens, ⏎ is a new line, ▶ begins an example that sees no earlier one"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


def run_data_show(config: RunConfig, split: str, count: int) -> None:
    """mft data show"""
    check_one_of("--split", split, SPLITS)
    splits, tokenizer = read_rows(config)
    dataset = splits.rows_of(split)
    pad = pad_of(tokenizer)
    for number, row in enumerate(_first_rows(dataset, count)):
        heading, text = describe_row(row, tokenizer, pad, pairs=config.objective.takes_pairs)
        of = "a stream" if isinstance(dataset, StreamedRows) else len(dataset)
        from_source = f" from {row['source']}" if row.get("source") else ""
        say(f"\n{split} row {number} of {of}{from_source}: {heading}", style="bold")
        console.print(text, soft_wrap=True)
    say(f"\n{LEGEND}", style="dim")


def describe_row(row: Mapping[str, Any], tokenizer: Any, pad: int, *, pairs: bool = False) -> tuple[str, Text]:
    """Return (counts of a row, its tokens as text without the padding). pairs: whether it holds preference pairs."""
    ids, starts = row["input_ids"], row["starts"]
    scored = [False, *(label != IGNORED for label in row["labels"][1:])]  # nothing predicts the first token
    end = len(ids)
    while end and ids[end - 1] == pad and row["labels"][end - 1] == IGNORED:
        end -= 1
    text = Text()
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end])):
        if len(starts) > 1:
            text.append("▶ " if not number else "\n▶ ", style="bold cyan")
            if pairs:
                text.append("rejected: " if number % 2 else "chosen: ", style="bold cyan")
        for is_scored, run in itertools.groupby(range(start, stop), key=scored.__getitem__):
            places = list(run)
            texts = _pieces(ids, places[0], places[-1] + 1, tokenizer)
            pieces = "·".join("⏎\n".join(map(one_line, piece.split("\n"))) for piece in texts)
            text.append(f"⟦{pieces}⟧" if is_scored else pieces, style="bold green" if is_scored else None)
    counts = f"{end} tokens, {sum(scored)} of them scored, and {len(ids) - end} of padding"
    if pairs:
        return f"{len(starts) // 2} {'pair' if len(starts) == 2 else 'pairs'}, {counts}", text
    return f"{len(starts)} examples, {counts}" if len(starts) > 1 else counts, text


# ---------------------------------------------------------------------------------------------- private


def _first_rows(dataset: Any, count: int) -> list[Mapping[str, Any]]:
    if isinstance(dataset, StreamedRows):
        rows = map(vars, dataset.peek(count))
        return [row | {name: row[name].tolist() for name in ("input_ids", "labels")} for row in rows]
    return [dataset[number] for number in range(min(count, len(dataset)))]


def _pieces(ids: Sequence[int], start: int, stop: int, tokenizer: Any) -> Iterator[str]:
    """Yield the text of each token from start to stop, or of several tokens if one alone is not a whole character."""
    while start < stop:
        before = list(ids[max(0, start - 1) : start])  # with some tokenizers, the first token of a text loses its space
        for end in range(start + 1, min(start + _LONGEST_CHARACTER, stop) + 1):
            text = _decode([*before, *ids[start:end]], tokenizer)[len(_decode(before, tokenizer)) :]
            if not text.endswith("\ufffd"):
                break
        yield text
        start = end


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
