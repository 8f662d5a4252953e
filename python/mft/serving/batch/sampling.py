"""Choose the next token of one row: the likeliest, or one drawn with the row's own generator."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

GREEDY_BELOW = 1e-5  # logits of 100 divided by a smaller temperature have no digits after the point in fp32


class Sampling:
    """Samples with transformers' own temperature and top_p. seed: None for another answer each time."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self._greedy = temperature < GREEDY_BELOW
        self._warpers = LogitsProcessorList()
        if temperature != 1 and not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """Choose a token from logits (V,). Raises: FloatingPointError if one is NaN."""
        if logits.isnan().any():
            raise FloatingPointError("the model's logits must be numbers, got NaN")
        if self._greedy:
            return int(logits.argmax())
        before: Any = torch.empty(1, 0, dtype=torch.long)  # neither warper reads the previous tokens
        scores = self._warpers(before, logits.float().cpu()[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
