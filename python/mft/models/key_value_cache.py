"""The state that a model keeps of the tokens it has read: keys and values only, or something else too."""

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mft.models.causal_lm import decoder_of
from mft.models.packed_rows import positions_of


def other_cache_layers(model: Any) -> list[str]:
    """Return the model's kinds of cache layers that cannot be padded, joined and indexed by row. Most models: none."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})


def can_extend_cache(model: Any) -> bool:
    """Return whether extend_cache supports this model: with transformers' own attention and no other state."""
    takes = "cache" in inspect.signature(decoder_of(model).forward).parameters
    own = getattr(model, "_supports_attention_backend", False)
    return takes and own and not other_cache_layers(model)


def extend_cache(
    model: Any, ids: Tensor, seen: Tensor, cache: DynamicCache | None = None
) -> tuple[Tensor, DynamicCache]:
    """Return (hidden states (B, T, D) of ids, the cache with ids added). seen: (B, cached + T), 0 on padding."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    decoder: Any = decoder_of(model)
    positions = positions_of(decoder, seen)
    given = {} if positions is None else {"position_ids": positions[:, -ids.shape[1] :]}
    return decoder(input_ids=ids, attention_mask=seen, cache=cache, use_cache=True, **given)[0], cache
