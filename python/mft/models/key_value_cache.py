"""What a model remembers of the tokens that it has read: keys and values alone, or something else too."""

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def beside_keys_and_values(model: Any) -> list[str]:
    """The kinds of cache layers that cannot be padded, put together and chosen from by row; none for most models."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
