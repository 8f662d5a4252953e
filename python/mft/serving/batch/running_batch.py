"""The running requests as rows of one ragged batch: one call of the model reads what is new of each row.

A row that generates has one new token. A prompt is read in pieces beside the others, so that it does not stop them. If
a row has outgrown its place and there is no memory for a larger one, the newest row leaves, to be read again later.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mft.masks.bank import MaskBank
from mft.models.attention_choice import attention_configs
from mft.models.causal_lm import head_of
from mft.models.key_value_cache import other_cache_layers
from mft.models.longrope import by_own_length, switch_length
from mft.serving.batch.ragged import OWN, RaggedAttention, Reading
from mft.serving.batch.slabs import Layers, Row, Slabs

PIECE = 256  # tokens of a prompt in one call
_PIECES = 4  # of several prompts: the rows that generate wait once for 32 prompts of 32 tokens, not four times
_ROUNDING = 0.05  # of the largest logit: room for sums in another order

Logits = tuple[Row, int, Tensor]  # a row, the position of the first token, and logits (tokens, V) after each


class RunningBatch:
    """The running batch of a bank's model, whose keys and values take at most cache bytes.

    Raises: ValueError for a model whose rows cannot be read in one call, or a cache without room for a token.
    """

    def __init__(self, bank: MaskBank, cache: int) -> None:
        model: Any = bank.model
        self.bank, self._model = bank, model
        check_readable(model)
        self._attention, self._switch = RaggedAttention(model), switch_length(model)
        self.slabs = Slabs(_read_token(bank), cache)
        if not self.slabs.longest:
            raise ValueError(f"--cache must hold a token of {self.slabs.token_bytes} bytes, got {cache}: give more")
        self.rows: list[Row] = []  # the oldest first

    def join(self, row: Row) -> bool:
        """Add a row with its tokens so far, unread. Returns: whether there is memory for it, and a token more."""
        has_room = self.slabs.put(row, len(row.tokens) + 1)
        if has_room:
            self.rows.append(row)
        return has_room

    def leave(self, row: Row) -> None:
        """Remove a row, which may join again."""
        self.rows.remove(row)
        self.slabs.remove(row)
        row.read = 0

    def make_room(self) -> list[Row]:
        """Give rows that have outgrown their places larger ones. Returns: the rows that had to leave for it."""
        gone = []
        for row in [*self.rows]:
            while row.slab is not None and len(row.tokens) > row.slab.capacity:
                if not self.slabs.put(row, len(row.tokens)):
                    gone.append(self.rows[-1])
                    self.leave(gone[-1])
        return gone

    def step(self, rows: Sequence[Row] | None = None) -> list[Logits]:
        """Read each row's latest token, or a piece of its unread ones. rows: some, to find out which one fails.

        Returns: the logits after each row's last token, if it has been read, and those that the row wants beside.
        """
        counts = _pieces(self.rows if rows is None else rows)
        return self._read(counts) if counts else []

    def check_rows_apart(self) -> None:
        """Raise ValueError unless rows of different tasks get what each gets alone, tried with a few tokens."""
        tasks = (None, next(iter(self.bank.tasks), None))
        try:
            rows = [Row(task, [*range(count)]) for task, count in zip(tasks, (7, 4), strict=True)]
            for row in rows:
                self.join(row)
            self._read([(rows[0], 3)])
            self._read([(rows[0], 3), (rows[1], 3)])
            for row, _, logits in self._read([(row, 1) for row in rows]):
                with self.bank.use(row.task):
                    alone = self._model(torch.tensor([row.tokens], device=self._model.device)).logits[0, -1].float()
                if not (logits[0] - alone).abs().max() <= _ROUNDING * alone.abs().max():
                    raise ValueError("a row's logits differ from those that it gets alone: serve another base")
        except ValueError as error:
            raise ValueError(
                f"base must keep its rows apart, a {type(self._model).__name__} does not: {error}, or mft merge, which "
                "makes each task an ordinary model, for any other server"
            ) from None
        finally:
            for row in [*self.rows]:
                self.leave(row)

    @torch.no_grad()
    def _read(self, counts: Sequence[tuple[Row, int]]) -> list[Logits]:
        """Read these numbers of the rows' next tokens."""
        found, kept, token = list[tuple[Row, int, int]](), list[int](), 0
        with self._attention.reading(counts, self._model.device) as reading:
            for row, count in reading.rows:
                first, end = _wanted(row, count), row.read + count
                found.append((row, first, end))
                kept += range(token + first - row.read, token + count)
                token += count
            tasks = reading.tasks
            with self.bank.use(tasks[0] if len({*tasks}) == 1 else tasks), self._frequencies(reading), self._head(kept):
                logits = self._model(
                    input_ids=reading.input_ids, position_ids=reading.position_ids, cache=reading, use_cache=True
                ).logits[:, 0]
        each = logits.split([end - first for _, first, end in found])
        for row, _, end in found:
            is_last = len(row.tokens) == end == self._switch  # a longer row has other frequencies from its start on
            row.read = 0 if is_last else end
        return [(row, first, part) for (row, first, _), part in zip(found, each, strict=True) if len(part)]

    def _frequencies(self, reading: Reading) -> contextlib.AbstractContextManager[None]:
        if self._switch is None:
            return contextlib.nullcontext()
        last = [len(row.tokens) - 1 for row, count in reading.rows for _ in range(count)]
        return by_own_length(self._model, torch.tensor(last, device=self._model.device)[:, None])

    @contextlib.contextmanager
    def _head(self, tokens: Sequence[int]) -> Iterator[None]:
        """Let the head read only these tokens of a call in this context."""
        kept = torch.tensor(tokens, dtype=torch.long, device=self._model.device)

        def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0].index_select(0, kept), *args[1:]

        handle = head_of(self._model).register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


def check_readable(model: Any) -> None:
    """Raise ValueError unless the model computes attention by transformers' registry, for any positions and mask."""
    name = type(model).__name__
    remedy = "mft merge makes each task an ordinary model, for any other server"
    other = other_cache_layers(model)
    if other:
        raise ValueError(f"base must cache only keys and values, got a {name} with {other[0]}: {remedy}")
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())}
    own = attention_configs(model, OWN)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not (own and takes and model._supports_attention_backend) or "chunked_attention" in kinds:
        raise ValueError(
            f"base must take position_ids and compute attention by transformers' sdpa or eager, got a {name}: {remedy}"
        )


def _read_token(bank: MaskBank) -> Layers:
    """Return what the layers store of a token."""
    cache: Any = DynamicCache()
    model: Any = bank.model
    with torch.no_grad(), bank.use(None):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), cache=cache, use_cache=True)
    return {n: (each.keys, each.values) for n, each in enumerate(cache.layers) if each.get_seq_length()}


def _pieces(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Return how many tokens each row reads now: one if it has one, else at most PIECE.

    The oldest of several prompts gets half a piece, so that it is read in the end but does not stop the others. Then
    come the shortest ones, which soon generate.
    """
    unread = {row: len(row.tokens) - row.read for row in rows}
    prompts = [row for row in rows if unread[row] > 1]
    ordered = sorted(prompts, key=lambda row: unread[row])
    found, left = [(row, 1) for row in rows if unread[row] == 1], _PIECES * PIECE
    for row in (*prompts[:1], *(row for row in ordered if row is not prompts[0])):
        count = min(unread[row], left, PIECE // 2 if row is prompts[0] and len(prompts) > 1 else PIECE)
        if count:
            found.append((row, count))
            left -= count
    return found


def _wanted(row: Row, count: int) -> int:
    """Return the first position of those that are read now whose logits are wanted."""
    end = row.read + count
    if row.read < row.wants:
        return row.read
    return end - 1 if end == len(row.tokens) else end
