"""The running requests as one left-padded batch with one cache. Rows join and leave between two tokens.

length 6:   . . a a a a     a prompt that joins is read alone; then its keys and values are padded on the left to the
            b b b b b b     longest row's length and appended as a row; rows that leave take their padding with them

If frequencies depend on a row's length (longrope.py), a row that passes the switch is read again from its start.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from mft.masks.bank import MaskBank
from mft.models.key_value_cache import other_cache_layers
from mft.models.longrope import by_own_length, switch_length
from mft.models.packed_rows import check_lengths_apart


class RunningBatch:
    """The running batch of a bank's model. Raises: ValueError if its cache has more than keys and values to pad."""

    def __init__(self, bank: MaskBank) -> None:
        model: Any = bank.model
        self.bank, self._model = bank, model
        other = other_cache_layers(model)
        if other:
            raise ValueError(
                f"base must cache only keys and values, got a {type(self._model).__name__} with {other[0]}: mft "
                "merge makes each task an ordinary model, for any other server"
            )
        forward = inspect.signature(self._model.forward).parameters
        self._takes_positions = "position_ids" in forward
        self._switch = switch_length(model)
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        self._tasks: list[str | None] = []
        self._tokens: list[list[int]] = []  # tokens read so far, for each row
        self._padding: list[int] = []  # padding on the left, for each row
        self._length = 0  # length of the longest row
        # Without the configuration, all keys and values are kept for sliding windows too: they are masked, not cut.
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def cache_bytes(self) -> int:
        """The bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in _filled_layers(self._cache))

    def knows(self, task: str | None) -> bool:
        """Return whether rows may take this task's masks."""
        return task is None or task in self.bank.tasks

    def join(self, task: str | None, prompt: Sequence[int]) -> Tensor:
        """Read a prompt and add it as the last row. Returns: its logits (V,) for the next token."""
        return self.add(task, prompt, *self.read(task, prompt))

    def read(self, task: str | None, prompt: Sequence[int]) -> tuple[Tensor, DynamicCache]:
        """Read a prompt alone, without changing the batch. Returns: logits (V,) for the next token, keys and values."""
        cache = DynamicCache()
        return self._forward(torch.tensor([prompt]), cache, [task], [0], len(prompt))[0], cache

    def add(self, task: str | None, prompt: Sequence[int], logits: Tensor, cache: DynamicCache) -> Tensor:
        """Add a prompt that was read as the last row. Returns: its logits."""
        if len(self):
            length = max(self._length, len(prompt))
            _append_row(self._cache, length - self._length, cache, length - len(prompt))
            self._padding = [padding + length - self._length for padding in self._padding] + [length - len(prompt)]
            self._length = length
        else:
            self._cache, self._padding, self._length = cache, [0], len(prompt)
        self._tasks.append(task)
        self._tokens.append([*prompt])
        return logits

    def check_rows_apart(self) -> None:
        """Raise ValueError if a few short calls show that the model mixes its rows: tasks could not differ."""
        try:
            self.join(None, [0])
            self.join(next(iter(self.bank.tasks), None), [0, 0])
            self.step([0, 0])
            if self._switch is not None:
                with by_own_length(self._model):
                    check_lengths_apart(self._model, torch.zeros(1, 4).long().to(self._model.device), self._switch + 1)
        except ValueError as error:
            raise ValueError(
                f"base must keep its rows apart, a {type(self._model).__name__} does not: {error}, or mft merge, which "
                "makes each task an ordinary model, for any other server"
            ) from None
        finally:
            self.keep([])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read each row's latest token. Returns: logits (rows, V) for the next tokens."""
        self._length += 1
        for read, token in zip(self._tokens, tokens, strict=True):
            read.append(token)
        logits = self._forward(torch.tensor(tokens)[:, None], self._cache, self._tasks, self._padding, self._length)
        for row, read in enumerate(self._tokens):
            if self._switch is not None and len(read) == self._switch + 1:
                logits[row] = self._read_again(row)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows in the batch."""
        if not rows:
            self._tasks, self._tokens, self._padding, self._length, self._cache = [], [], [], 0, DynamicCache()
            return
        if len(rows) == len(self):
            return
        self._tasks = [self._tasks[row] for row in rows]
        self._tokens = [self._tokens[row] for row in rows]
        padding = [self._padding[row] for row in rows]
        common = min(padding)
        self._padding = [each - common for each in padding]
        self._length -= common
        kept = torch.tensor(rows, device=self._model.device)
        for layer in _filled_layers(self._cache):
            layer.batch_select_indices(kept)
            layer.keys, layer.values = layer.keys[..., common:, :], layer.values[..., common:, :]

    def _read_again(self, row: int) -> Tensor:
        """Compute a row's keys and values again from its start. Returns: its logits (V,)."""
        cache, read = DynamicCache(), self._tokens[row]
        logits = self._forward(torch.tensor([read]), cache, [self._tasks[row]], [0], len(read))[0]
        for layer, new in zip(_filled_layers(self._cache), _filled_layers(cache), strict=True):
            layer.keys[row, :, self._padding[row] :] = new.keys[0]
            layer.values[row, :, self._padding[row] :] = new.values[0]
        return logits

    @torch.no_grad()
    def _forward(
        self, tokens: Tensor, cache: DynamicCache, tasks: Sequence[str | None], padding: Sequence[int], length: int
    ) -> Tensor:
        device = self._model.device
        before = torch.tensor(padding, device=device)[:, None]
        places = torch.arange(length, device=device)[None]
        given: dict[str, Any] = dict(self._options)
        if self._takes_positions:
            given["position_ids"] = (places - before)[:, -tokens.shape[1] :].clamp(min=0)
        one = len(set(tasks)) == 1
        with self.bank.use(tasks[0] if one else tasks), by_own_length(self._model):
            result = self._model(
                input_ids=tokens.to(device),
                attention_mask=(places >= before).long(),
                cache=cache,
                use_cache=True,
                **given,
            )
        return result.logits[:, -1]


def _filled_layers(cache: DynamicCache) -> list[Any]:
    """Return the layers with keys and values. If layers share them, some layers have none."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.get_seq_length()]


def _append_row(cache: DynamicCache, padding: int, row: DynamicCache, row_padding: int) -> None:
    """Pad both on the left, and append row to cache."""
    for layer, new in zip(_filled_layers(cache), _filled_layers(row), strict=True):
        for name in ("keys", "values"):
            parts = [
                F.pad(getattr(each, name), (0, 0, left, 0)) for each, left in ((layer, padding), (new, row_padding))
            ]
            setattr(layer, name, torch.cat(parts))
