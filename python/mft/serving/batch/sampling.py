"""Choose the next token of one row: the likeliest, or one drawn with the row's own generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY_BELOW = 1e-5  # logits of 100 divided by a smaller temperature have no digits after the point in fp32


@dataclass(frozen=True)
class SamplingOptions:
    """A request's options, with OpenAI's and vLLM's names. top_k: 0 or -1 for all. seed: None for a new one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


class Sampling:
    """Chooses the tokens after a prompt by transformers' own processors. grammar: one more, which comes first.

    is_plain: whether each token is simply the likeliest.
    """

    def __init__(self, prompt: Sequence[int], options: SamplingOptions, grammar: LogitsProcessor | None = None) -> None:
        self._prompt, self._greedy = prompt, options.temperature < GREEDY_BELOW
        self._processors = LogitsProcessorList([] if grammar is None else [grammar])
        add = self._processors.append
        if options.repetition_penalty != 1:
            add(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        if options.presence_penalty or options.frequency_penalty:
            add(_Penalties(len(prompt), options.presence_penalty, options.frequency_penalty))
        self._reads_tokens = bool(self._processors)
        self.is_plain = self._greedy and not self._processors
        if self._greedy:
            return
        if options.temperature != 1:
            add(TemperatureLogitsWarper(options.temperature))
        if options.top_k > 0:
            add(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            add(TopPLogitsWarper(options.top_p))
        if options.min_p > 0:
            add(MinPLogitsWarper(options.min_p))
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def choose(self, logits: Tensor, generated: Sequence[int]) -> int:
        """Choose the token after the generated ones from logits (V,)."""
        tokens: Any = torch.tensor([[*self._prompt, *generated] if self._reads_tokens else []])
        scores = self._processors(tokens, logits.float().cpu()[None])
        if self._greedy:
            return int(scores.argmax())
        # torch.multinomial takes 1.0 ms for 49,152 tokens, this 0.1 ms (Sapphire Rapids).
        shares = scores[0].double().softmax(-1).cumsum(-1)
        above_zero = 1 - torch.rand(1, generator=self._generator, dtype=torch.double)  # at most 1
        return int(torch.searchsorted(shares, above_zero * shares[-1]))


class _Penalties(LogitsProcessor):
    """OpenAI's penalties: ``logits - frequency * count - presence * (count > 0)``, with counts of generated tokens."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        counts = input_ids[0, self._prompt_length :].bincount(minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)
