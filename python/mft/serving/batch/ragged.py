"""One call of a model for tokens of many rows: one for a row that generates, several for a row whose prompt is read.

    tokens        a5  b9  c0 c1 c2 c3          the model sees six rows of one token, each with its position
    attention     a5 in a0..a5, b9 in b0..b9   a call for the rows of a slab that read as many tokens: here one
                  c0 c1 c2 c3 in c0..c3        and here four

The model's own attention computes each part, through transformers' registry of attentions.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mft.models.attention_choice import attention_configs, choose_attention
from mft.serving.batch.slabs import Row, Slab

NAME = "rows_in_slabs"  # in transformers' registry; it has no mask there, so models make none
OWN = ("sdpa", "eager")  # attentions that take any mask

_current: ContextVar["Reading"] = ContextVar("mft.serving.Reading")


@dataclass
class _Part:
    """Rows of a slab that read as many tokens each. first: the first of their tokens in the call.

    ends: the positions (rows, count) of these tokens. masks: by window.
    """

    slab: Slab
    places: Tensor
    first: int
    ends: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.end = self.first + self.ends.numel()
        self.length = int(self.ends.max()) + 1
        low, count = int(self.places[0]), len(self.places)
        self._adjacent = slice(low, low + count) if int(self.places[-1]) == low + count - 1 else None

    def write(self, layer: int, states: Sequence[Tensor]) -> None:
        """Store keys and values (tokens, heads, 1, size)."""
        for stored, new in zip(self.slab.layers[layer], states, strict=True):
            stored[self.places[:, None], :, self.ends] = self._by_row(new)

    def read(self, layer: int) -> list[Tensor]:
        """Return keys and values (rows, heads, length, size)."""
        stored = self.slab.layers[layer]
        return [each[self.places if self._adjacent is None else self._adjacent, :, : self.length] for each in stored]

    def query(self, query: Tensor) -> Tensor:
        return self._by_row(query).transpose(1, 2)

    def mask(self, window: int | None, dtype: torch.dtype, *, causal: bool) -> Tensor | None:
        """Return what to add to scores (rows, 1, count, length). causal: None may stand for a causal mask."""
        if window not in self.masks:
            count = self.ends.shape[1]
            if causal and self.length == count > 1 and (window is None or count <= window):
                self.masks[window] = None
            else:
                places, ends = torch.arange(self.length, device=self.ends.device), self.ends[:, None, :, None]
                seen = places <= ends
                if window is not None:
                    seen &= places > ends - window
                self.masks[window] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return self.masks[window]

    def _by_row(self, states: Tensor) -> Tensor:
        """Return this part of states (tokens, heads, 1, size) as (rows, count, heads, size)."""
        return states[self.first : self.end, :, 0].unflatten(0, self.ends.shape)


class Reading:
    """A call, in place of the model's cache. rows: each with the number of its next tokens to read.

    own: the attention that computes the parts. windows: how many tokens each layer sees, None for all before.
    """

    is_compileable = False

    def __init__(
        self, rows: Iterable[tuple[Row, int]], own: str, windows: Sequence[int | None], device: torch.device
    ) -> None:
        together: dict[tuple[Slab, int], list[Row]] = {}
        for row, count in rows:
            assert row.slab is not None
            together.setdefault((row.slab, count), []).append(row)
        self._own, self._windows, self._parts = own, windows, list[_Part]()
        self._stored: dict[int, tuple[int, Tensor]] = {}  # the layer of keys by their identity, and the keys
        self.rows: list[tuple[Row, int]] = []  # in the order of their tokens
        ids: list[int] = []
        for (slab, count), unordered in together.items():
            each = sorted(unordered, key=lambda row: row.place)
            ends = torch.tensor([[*range(row.read, row.read + count)] for row in each], device=device)
            places = torch.tensor([row.place for row in each], device=device)
            self._parts.append(_Part(slab, places, len(ids), ends))
            for row in each:
                ids += row.tokens[row.read : row.read + count]
                self.rows.append((row, count))
        self.input_ids = torch.tensor(ids, device=device)[:, None]
        self.position_ids = torch.cat([part.ends.flatten() for part in self._parts])[:, None]
        self.tasks = [row.task for row, count in self.rows for _ in range(count)]

    # ------------------------------------------------------------------------------- what a model asks its cache for

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for part in self._parts:
            part.write(layer, (keys, values))
        self._stored[id(keys)] = layer, keys
        return keys, values

    # ------------------------------------------------------------------------------------------------------ attention

    def attend(self, module: nn.Module, query: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
        if id(keys) not in self._stored:
            raise ValueError(f"{type(module).__name__} must attend to the keys that its cache returns, got others")
        layer = self._stored[id(keys)][0]  # of these keys: a layer may take those of another
        attention, is_sdpa, found = _own_attention(module, self._own), self._own == "sdpa", []
        for part in self._parts:
            mask = part.mask(self._windows[layer], query.dtype, causal=is_sdpa)
            given = {**options, "is_causal": mask is None} if is_sdpa else options
            y = attention(module, part.query(query), *part.read(layer), mask, **given)[0]
            found.append(y.flatten(0, 1)[:, None])
        return found[0] if len(found) == 1 else torch.cat(found)


def _own_attention(module: nn.Module, own: str) -> Callable[..., Any]:
    """Return the attention that module computes by the name own."""
    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own]
    name = "eager_attention_forward"  # every model's file has its own
    return next(vars(file)[name] for kind in type(module).__mro__ if name in vars(file := sys.modules[kind.__module__]))


class RaggedAttention:
    """The attention of a model by readings. Raises: ValueError if its own attention takes no mask or other state."""

    def __init__(self, model: Any) -> None:
        self._configs = attention_configs(model, OWN)
        self._own = self._configs[0]._attn_implementation if self._configs else ""
        layers = DynamicCache(config=model.config).layers
        self._windows = [getattr(layer, "sliding_window", None) for layer in layers]

    @contextlib.contextmanager
    def reading(self, rows: Iterable[tuple[Row, int]], device: torch.device) -> Iterator["Reading"]:
        """Make calls in this context read these numbers of the rows' next tokens."""
        reading = Reading(rows, self._own, self._windows, device)
        token = _current.set(reading)
        try:
            with choose_attention(self._configs, NAME):
                yield reading
        finally:
            _current.reset(token)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> tuple[Tensor, None]:
    for name in ("cache", "position_ids", "is_causal", "sliding_window"):  # these belong to the whole call
        options.pop(name, None)
    return _current.get().attend(module, query, key, options), None


AttentionInterface.register(NAME, _attend)
