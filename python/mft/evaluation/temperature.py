"""Fit one temperature for all logits on held-out text, to measure what calibration alone gains (arXiv 1706.04599).

T = argmin over T of the mean loss of softmax(logits / T). It is convex in 1 / T, so Newton's method needs few passes.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from mft.checks import check_rule
from mft.data.batches import count_labels, take_rows
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.models.causal_lm import FEW, evaluating, split_at_head
from mft.models.frozen_layers import FrozenPrefix, PrefixMemory
from mft.models.longrope import by_own_length, inputs_of
from mft.models.token_loss import temperature_slopes

LARGEST = 64.0  # the smallest is 1 / 64; outside this range the model is worse than chance, or always right
_PASSES = 40
_CLOSE = 1e-3  # relative step of 1 / T: Newton's method squares the error, so T is then accurate to about 1e-6


def fit_temperature(
    model: nn.Module, dataset, *, batch_size: int = 2, first: int = 0, memory: PrefixMemory | None = None
) -> float:
    """Return the temperature in [1 / 64, 64] with the smallest mean token loss of model on dataset.

    This takes 2 to 4 passes over the data, or about 15 if the optimum is at an end of the range. Args: see evaluate.
    Raises: ValueError if no token is scored, or if logits are not finite.
    """
    check_rule(len(dataset) > 0, "dataset", "hold at least one row to fit a temperature on", len(dataset))
    inverse, low, high = 1.0, 1 / LARGEST, LARGEST
    with evaluating(model), by_own_length(model):
        slopes = _Slopes(model, dataset, batch_size, first, memory)
        for _ in range(_PASSES):
            slope, curvature = slopes.compute(inverse)
            check_rule(math.isfinite(slope), "logits", "be finite for a temperature", f"a slope of {slope}")
            low, high = (inverse, high) if slope < 0 else (low, inverse)
            step = -slope / curvature if curvature > 0 else math.copysign(math.inf, -slope)
            if abs(step) < _CLOSE * inverse:
                return 1 / min(max(inverse + step, 1 / LARGEST), LARGEST)
            if high < (1 + _CLOSE) * low:
                return 1 / (high if slope < 0 else low)
            # Far from the minimum, Newton's step may leave the interval that contains it.
            inverse = inverse + step if low < inverse + step < high else math.sqrt(low * high)
    raise RuntimeError(f"1 / temperature must settle within {_PASSES} passes, got [{low:.6g}, {high:.6g}] still open")


def evaluate_tempered(model: nn.Module, dataset, temperature: float, **options: Any) -> tuple[Evaluation, Evaluation]:
    """Evaluate the model, and the model with its logits divided by ``temperature``. options: of evaluate."""
    found = evaluate(model, dataset, temperature=temperature, **options)
    assert found.tempered_sums is not None
    plain = dataclasses.replace(found, tempered_sums=None)
    return plain, dataclasses.replace(plain, loss_sums=found.tempered_sums)


class _Slopes:
    """Computes the first two derivatives of the mean token loss with respect to 1 / T."""

    def __init__(self, model: nn.Module, dataset, batch_size: int, first: int, memory: PrefixMemory | None) -> None:
        self._model, self._dataset, self._batch_size = model, dataset, batch_size
        self._device = next(model.parameters()).device
        run, self._head = split_at_head(model, take_rows(dataset, [0]).input_ids[:1, :FEW].to(self._device))
        self._prefix = FrozenPrefix(model, first, memory, run)

    @torch.no_grad()
    def compute(self, inverse: float) -> tuple[float, float]:
        tokens, first, second = 0, 0.0, 0.0
        for start in range(0, len(self._dataset), self._batch_size):
            batch = take_rows(self._dataset, list(range(start, min(start + self._batch_size, len(self._dataset)))))
            ids, positions = inputs_of(batch, self._model, self._device)
            hidden = self._prefix(ids, batch.rows, positions)
            sums = temperature_slopes(self._head, hidden, batch.labels.to(self._device), inverse)
            tokens += int(count_labels(batch.labels).sum())
            first, second = first + sums[0].item(), second + sums[1].item()
        check_rule(tokens > 0, "dataset", "score at least one token", f"{len(self._dataset)} rows without a label")
        return first / tokens, second / tokens
