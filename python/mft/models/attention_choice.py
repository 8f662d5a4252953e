"""Make a model compute its attention by another function of transformers' registry for a while."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn


def attention_configs(model: nn.Module, own: Collection[str]) -> list[Any]:
    """Return the configurations of model's modules whose attention is one of these."""
    found: Any = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return [config for config in found if getattr(config, "_attn_implementation", None) in own]


@contextlib.contextmanager
def choose_attention(configs: list[Any], name: str) -> Iterator[None]:
    """Make modules of these configurations use the attention of this name in this context."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before):
            config._attn_implementation = own
