"""Find the current mask of scores: one selection per change of the scores, for any number of forward passes.

The mask changes once per optimiser step. So threshold, packed mask and packed signs (1 bit per weight each) are
remembered with the scores until scores.py sees a write to them. Nothing is remembered for scores that are no parameter
of a masked layer, or for a selection within a graph. On an accelerator the masks of a step are found together, so that
the host waits for the device once; see companions.py.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import checks
from ..ops.select import select_mask
from ..reference.fixed_point import selectable
from . import companions
from .scores import Scores, State, forget_states, state, still


@dataclass(frozen=True)
class CurrentMask:
    """The mask that scores select.

    ``signs`` is None in value mode, if a score is 0 (a bit cannot tell its sign), and for int16 scores, for which
    autograd needs no sign.
    """

    threshold: Tensor  # (); or (E,) for experts' scores (E, N, K) that keep a ratio; 0 with a pattern
    packed: Tensor  # int32 (N, ceil(K / 32)) or (E, N, ceil(K / 32))
    signs: Tensor | None  # packed's shape and dtype


class Rule(NamedTuple):
    """How a layer selects its mask: the arguments of current_mask after the scores."""

    keep_ratio: float
    threshold: float | None
    mode: str
    pattern: str = "matrix"


_NOT_FINITE = -1  # stands in place of a count of zeros


@dataclass(frozen=True)
class _Memo:
    state: State
    rule: Rule
    mask: CurrentMask
    stream: Any  # on which it was found; see companions.py


def current_mask(
    scores: Tensor,
    keep_ratio: float,
    threshold: float | None,
    mode: str,
    pattern: str = "matrix",
    *,
    anew: bool = False,
    remember: bool = True,
) -> CurrentMask:
    """Return threshold, packed mask and packed signs of ``scores`` as they are now.

    Args:
        scores: (N, K), or (E, N, K) for experts.
        threshold: a fixed one, or None to find the one that keeps ``keep_ratio``, for each expert.
        mode, pattern: see MaskedLinear.
        anew: select again even if a mask is remembered; for what is saved, shown or reported.
        remember: whether to remember what is selected. A graph must not: torch.compile raises the version of the scores
            before it runs a graph that will write to them. The new version would be remembered with the old mask.
    Raises: NonFiniteScores (a ValueError), except while a CUDA graph is captured. ValueError if scores are spread over
        processes.
    """
    rule = Rule(keep_ratio, threshold, mode, pattern)
    if type(scores) is not Scores:
        checks.check_whole("scores", scores)
        return _find_mask(scores, rule)
    if _is_capturing(scores):
        scores.in_graph = True  # a CUDA graph replays what it captured, so the selection has to be in it
    elif not anew and (remembered := remembered_mask(scores, rule)) is not None:
        return remembered
    if not remember:
        return _find_mask(scores, rule)
    now, stream = state(scores), companions.stream_of(scores)  # before the selection, so that a write during it is seen
    if now is None:
        scores.memo = scores.ahead = None
        return _find_mask(scores, rule)
    if stream is None or anew:
        memo, scores.ahead = _Memo(now, rule, _find_mask(scores, rule), stream), None
    else:
        memo = _find_together(scores, now, rule, stream)
    scores.memo = memo
    return memo.mask


def outdate(scores: Tensor | None = None) -> None:
    """Forget the remembered mask of ``scores``, or of all scores, after a write that cannot be seen.

    docs/explanation/concepts.md lists the writes that are seen. After any other write the old mask may stay in
    use until this call.
    """
    if scores is None:
        forget_states()
    elif type(scores) is Scores:
        scores.memo = scores.ahead = None


def remembered_mask(scores: Tensor, rule: Rule) -> CurrentMask | None:
    """Return the remembered mask of ``scores`` if it is still valid, else None."""
    if type(scores) is not Scores:
        return None
    memo = scores.memo  # read once: another thread may forget it
    return memo.mask if memo is not None and memo.rule == rule and still(scores, memo.state) else None


def refreshed_mask(scores: Tensor, rule: tuple) -> CurrentMask | None:
    """Return the current mask of ``scores`` if they have had a mask by this rule, which is then valid, else None."""
    if type(scores) is not Scores:
        return None
    memo = scores.memo
    if memo is None or memo.rule != rule:
        return None
    if still(scores, memo.state):
        return memo.mask
    del memo  # the new mask takes the old one's memory
    return current_mask(scores, *rule)


def _is_capturing(scores: Tensor) -> bool:
    return scores.is_cuda and torch.cuda.is_current_stream_capturing()


def _find_together(scores: Scores, now: State, rule: Rule, stream: Any) -> _Memo:
    """Return the memo of ``scores``: the one that was found ahead, or a new one.

    With a new one, the memos of its companions are found ahead, with the same wait for the device.
    """
    ahead, scores.ahead = scores.ahead, None
    if ahead is not None and ahead.rule == rule and ahead.stream == stream and still(scores, ahead.state):
        return ahead
    before = None if scores.memo is None else scores.memo.rule
    wanted = [(scores, now, rule)]
    for other, its_rule in companions.companions(scores, now.steps, stream):
        its_state = state(other)
        if its_state is not None:  # a scheduled ratio changes for all scores at once
            wanted.append((other, its_state, rule if its_rule == before else its_rule))
    for each, _, _ in wanted:  # frees the old masks' memory for the new ones
        each.memo = each.ahead = None
    masks = _find_masks([(each, rule) for each, _, rule in wanted])
    memos = [None if mask is None else _Memo(at, rule, mask, stream) for (_, at, rule), mask in zip(wanted, masks)]
    for (other, _, _), found in zip(wanted[1:], memos[1:]):
        other.ahead = found  # None if not finite: its own layer will raise
    if memos[0] is None:
        raise checks.NonFiniteScores(selectable(scores.detach()))
    return memos[0]


def _find_mask(scores: Tensor, rule: Rule) -> CurrentMask:
    (mask,) = _find_masks([(scores, rule)])
    if mask is None:
        raise checks.NonFiniteScores(selectable(scores.detach()))
    return mask


def _find_masks(wanted: list[tuple[Tensor, Rule]]) -> list[CurrentMask | None]:
    """Return the masks of several scores on one device; None for those that are not finite.

    The host waits for the device once, and not at all in a capture.
    """
    launched = [_launch(scores, rule) for scores, rule in wanted]
    _, bad, _ = launched[0]
    if bad is None:
        return [mask for mask, _, _ in launched]
    if companions.stream_of(bad) is None:
        flags = [_NOT_FINITE if bad else int(zeros) for _, bad, zeros in launched]
    else:
        flags = torch.stack([torch.where(bad, _NOT_FINITE, zeros) for _, bad, zeros in launched]).tolist()
    return [
        None if flag == _NOT_FINITE else replace(mask, signs=None) if flag else mask
        for (mask, _, _), flag in zip(launched, flags)
    ]


def _launch(scores: Tensor, rule: Rule):
    """Return the mask, whether scores are not finite, and how many are 0. The mask has signs as if none were 0.

    Within a CUDA graph the host cannot read results. Scores that are not finite then give the threshold NaN, which
    keeps no weight, and the sign comes from the scores.
    """
    captured = _is_capturing(scores)
    with_signs = rule.mode != "value" and scores.dtype != torch.int16 and not captured
    threshold, packed, signs, zeros = select_mask(scores, *rule, with_signs=with_signs)
    mask = CurrentMask(threshold, packed, signs if with_signs else None)
    if captured:
        return mask, None, zeros
    if rule.threshold is None:
        return mask, selectable(threshold).isnan().any(), zeros
    return mask, ~selectable(scores.detach()).isfinite().all(), zeros
