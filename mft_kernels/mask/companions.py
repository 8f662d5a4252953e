"""Companions: scores outdated by the same optimiser step. All their masks are found with one wait for the device.

The host has to know whether scores are finite and whether any is 0. On an accelerator it waits for each answer. So when
the first scores are asked for after a step, masking.py also selects from their companions, and reads all answers at
once. The companions of scores are the scores that the same optimiser changed in the same step, on the same stream, if

- their last mask was asked for, on that stream: scores that are no longer used cost only one selection more;
- they were not written since that step: a later write may be one that only the layer itself waits for.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .scores import Scores, forget_states


@dataclass(eq=False)
class Step:
    """One step of an optimiser, on the scores of one stream."""

    optimizer: weakref.ref[Optimizer]
    stream: Any
    looked: int = -1  # State.steps when companions were last looked for, which is done once for all of them


def stream_of(scores: torch.Tensor) -> Any:
    """Return the stream on which the host waits for an answer about ``scores``; None on a CPU, which needs no wait."""
    return (scores.device, torch.cuda.current_stream(scores.device).cuda_stream) if scores.is_cuda else None


def companions(scores: Scores, steps: int, stream: Any) -> list[tuple[Scores, Any]]:
    """Return the other scores to select from on ``stream`` now, each with the rule of its outdated memo."""
    if scores.stepped is None:
        return []
    step: Step = scores.stepped[0]
    optimizer = step.optimizer()
    if optimizer is None or step.stream != stream or step.looked == steps:
        return []
    step.looked = steps
    outdated = ((other, other.memo) for other in _scores_of(optimizer) if other is not scores)
    return [
        (other, memo.rule)
        for other, memo in outdated
        if memo is not None  # None: the mask that was found ahead was never asked for
        and memo.state.steps != steps
        and memo.stream == stream
        and other.stepped == (step, other._version, other.accessed)
    ]


def _note_step(optimizer: Optimizer, *_: Any) -> None:
    """Forget all states, because optimisers write in many ways, and note how this one left its scores."""
    forget_states()
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    steps: dict[Any, Step] = {}
    for scores in _scores_of(optimizer):
        if captured:
            scores.in_graph = True
        stream = stream_of(scores)
        if stream is not None:
            step = steps.setdefault(stream, Step(weakref.ref(optimizer), stream))
            scores.stepped = step, scores._version, scores.accessed


register_optimizer_step_post_hook(_note_step)


def _scores_of(optimizer: Optimizer) -> Iterator[Scores]:
    return (p for group in optimizer.param_groups for p in group["params"] if type(p) is Scores)
