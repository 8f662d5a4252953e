"""Masks of many tasks on one weight, each token by its own: a pass over the weight, and no copy of it."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mft.vllm.mask_flips import mask_without
from mft.vllm.task_masks import Tasks
from mft_kernels import backend_report, masked_linear_many

logger = logging.getLogger(__name__)
TasksOfTokens = Callable[[], Tensor]


class TokenMasks:
    """y[i] = x[i] @ where(mask of token i's task, weight, 0).T + bias; the whole weight for a token without a mask.

    masks: packed, by the task's number, of which there are count. tasks_of_tokens: each token's task, or -1.
    """

    def __init__(self, masks: Mapping[int, Tensor], tasks_of_tokens: TasksOfTokens, count: int) -> None:
        self._masks, self._tasks_of_tokens = list(masks.values()), tasks_of_tokens
        self._places = torch.full((count + 1,), -1)  # in masks, by task; the last is for -1
        self._places[list(masks)] = torch.arange(len(masks))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shapes: x (..., K), all tokens of the batch. Raises: RuntimeError for another number of tokens."""
        places, tokens = self._places[self._tasks_of_tokens()], x.reshape(-1, x.shape[-1])
        if len(places) != len(tokens):
            raise RuntimeError(
                f"a masked layer must see each token once to know its task, got {len(tokens)} rows for {len(places)} "
                "tokens: serve this model without --per-request (per_request=True)"
            )
        if not (places >= 0).any():
            return F.linear(x, weight, bias)
        y = masked_linear_many(tokens, weight, self._masks, places, bias)
        return y.view(*x.shape[:-1], -1)


def warn_without_kernels() -> None:
    """Log a warning if plain PyTorch will compute the products, because there is no GPU and no compiled kernel."""
    report = backend_report()
    if report["auto"] == {"cpu": "reference"}:
        reason = report["backends"]["cpu"]["reason"]
        logger.warning("masks per request run in plain PyTorch, because the cpu backend cannot run: %s", reason)


def masks_by_layer(tasks: Tasks, layer_of: Callable[[Tensor], Any]) -> dict[Any, dict[int, Tensor]]:
    """Return the packed mask of each layer's weight by the task's number, also of fused layers."""
    found: dict[Any, dict[int, Tensor]] = {}
    for number, task in enumerate(tasks.names):
        parts: dict[Any, list[NDArray[np.int64]]] = {}
        for name, dropped in tasks.masks(task).items():
            part = tasks.weights[name]
            layer = layer_of(part)
            begin = part.storage_offset() - layer.weight.storage_offset()
            parts.setdefault(layer, []).append(dropped.places.astype(np.int64) + begin)
        for layer, places in parts.items():
            rows, columns = layer.weight.shape
            found.setdefault(layer, {})[number] = mask_without(np.concatenate(places), (rows, columns))
    return found
