"""From scores to the mask that holds now: one selection per change of the scores, however many forwards.

The mask changes once an optimiser step, so threshold, packed mask and packed signs (1 bit a weight each) are remembered
with the scores, until scores.py sees a write into them. Of scores that are no parameter of a masked layer nothing is
remembered, and no graph remembers what is selected in it. On an accelerator a step's masks are found together, so that
the host waits for the device once; see companions.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.linear import GRADIENTS_OF_PACKED, MASKED_LINEAR_PACKED
from ..ops.route import Gradient, Op, is_called_by_graph, is_seen_by_others
from ..ops.select import kept_threshold, kept_thresholds, pack_mask, pack_signs
from ..ops.straight_through import straight_through
from ..reference.fixed_point import code_at_least, selectable
from . import companions
from .scores import Scores, State, forget_states, state, still


@dataclass(frozen=True)
class CurrentMask:
    """What the scores select.

    ``signs`` is None where no bit can tell them (in value mode, or if a score is 0), and where autograd asks for none:
    of int16 scores.
    """

    threshold: Tensor  # (); of experts' scores (E, N, K) that keep a ratio (E,), one each
    packed: Tensor  # int32 (N, ceil(K / 32)), (E, N, ceil(K / 32))
    signs: Tensor | None  # as packed


Rule = tuple[float, float | None, str]  # keep_ratio, threshold, mode
_NOT_FINITE = -1  # in the place of a count


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
    *,
    anew: bool = False,
    remember: bool = True,
) -> CurrentMask:
    """Threshold, packed mask and packed signs of ``scores`` as they are now.

    Args:
        scores: (N, K), or of experts (E, N, K).
        threshold: a fixed one, or None to find the one that keeps ``keep_ratio``, of each expert.
        anew: select, whatever is remembered; for what is saved, shown or reported.
        remember: what is selected. A graph must not: torch.compile raises the version of the scores before it runs a
            graph that will write into them, so the new version would be remembered with the mask of the old scores.
    Raises: NonFiniteScores (a ValueError); not while a CUDA graph is captured. ValueError if scores are spread over
        processes.
    """
    if type(scores) is not Scores:
        checks.check_whole("scores", scores)
        return _find_mask(scores, keep_ratio, threshold, mode)
    rule = keep_ratio, threshold, mode
    if _capturing(scores):
        scores.in_graph = True  # a CUDA graph replays what it captured, so the selection has to be in it
    elif not anew and (remembered := remembered_mask(scores, rule)) is not None:
        return remembered
    if not remember:
        return _find_mask(scores, *rule)
    now, stream = state(scores), companions.stream_of(scores)  # before the selection, so that a write in it is seen
    if now is None:
        scores.memo = scores.ahead = None
        return _find_mask(scores, *rule)
    if stream is None or anew:
        memo, scores.ahead = _Memo(now, rule, _find_mask(scores, *rule), stream), None
    else:
        memo = _find_together(scores, now, rule, stream)
    scores.memo = memo
    return memo.mask


def outdate(scores: Tensor | None = None) -> None:
    """Forget the mask that is remembered of ``scores``, or of all, after a write that nothing shows.

    docs/concepts.md lists the writes that are seen. After any other one the old mask may stay in use until this call.
    """
    if scores is None:
        forget_states()
    elif type(scores) is Scores:
        scores.memo = scores.ahead = None


def remembered_mask(scores: Tensor, rule: Rule) -> CurrentMask | None:
    """The mask that is remembered of ``scores``, if it still holds."""
    if type(scores) is not Scores:
        return None
    memo = scores.memo  # once: another thread may forget it
    return memo.mask if memo is not None and memo.rule == rule and still(scores, memo.state) else None


def _capturing(scores: Tensor) -> bool:
    return scores.is_cuda and torch.cuda.is_current_stream_capturing()


def _find_together(scores: Scores, now: State, rule: Rule, stream: Any) -> _Memo:
    """The memo of ``scores``, found ahead or now; if now, those of its companions are found ahead, by the same wait."""
    ahead, scores.ahead = scores.ahead, None
    if ahead is not None and ahead.rule == rule and ahead.stream == stream and still(scores, ahead.state):
        return ahead
    before = None if scores.memo is None else scores.memo.rule
    wanted = [(scores, now, rule)]
    for other, its_rule in companions.companions(scores, now.steps, stream):
        its_state = state(other)
        if its_state is not None:  # a ratio that follows a schedule has changed for all
            wanted.append((other, its_state, rule if its_rule == before else its_rule))
    for each, _, _ in wanted:  # new masks take the old ones' memory
        each.memo = each.ahead = None
    masks = _find_masks([(each, rule) for each, _, rule in wanted])
    memos = [None if mask is None else _Memo(at, rule, mask, stream) for (_, at, rule), mask in zip(wanted, masks)]
    for (other, _, _), found in zip(wanted[1:], memos[1:]):
        other.ahead = found  # none of what is not finite: its own layer will say so
    if memos[0] is None:
        raise checks.NonFiniteScores(selectable(scores.detach()))
    return memos[0]


def _find_mask(scores: Tensor, keep_ratio: float, fixed: float | None, mode: str) -> CurrentMask:
    (mask,) = _find_masks([(scores, (keep_ratio, fixed, mode))])
    if mask is None:
        raise checks.NonFiniteScores(selectable(scores.detach()))
    return mask


def _find_masks(wanted: list[tuple[Tensor, Rule]]) -> list[CurrentMask | None]:
    """What scores of one device select; None of those that are not finite. One synchronisation, none in a capture."""
    launched = [_launch(scores, *rule) for scores, rule in wanted]
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


@torch.no_grad()
def _launch(scores: Tensor, keep_ratio: float, fixed: float | None, mode: str):
    """(mask, whether scores are not finite, how many are 0): the mask has signs as if none were.

    Within a CUDA graph the host can ask nothing: scores that are not finite give the threshold NaN, which keeps no
    weight, and the sign comes from the scores.
    """
    scores = scores.detach()
    fixed_point = scores.dtype == torch.int16
    if fixed is None:
        of_all = kept_threshold if scores.dim() == 2 else kept_thresholds
        threshold = of_all(scores, keep_ratio, mode=mode)
    else:
        # Filled on the device: a copy from the host cannot be captured.
        threshold = scores.new_full((), code_at_least(fixed) if fixed_point else fixed)
    packed = pack_mask(scores, threshold, mode=mode)
    if _capturing(scores):
        return CurrentMask(threshold, packed, None), None, 0
    bad = selectable(threshold).isnan().any() if fixed is None else ~selectable(scores).isfinite().all()
    signs: Tensor | None = None
    zeros: Tensor | int = 0
    if mode != "value" and not fixed_point:
        signs, zeros = pack_signs(scores.flatten(0, -2))
    return CurrentMask(threshold, packed, None if signs is None else signs.view(packed.shape)), bad, zeros


# ---------------------------------------------------------------------------------------------- the op


def masked_linear_by_ratio(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    *,
    keep_ratio: float,
    threshold: float | None = None,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """masked_linear with the threshold that keeps ``keep_ratio`` of the scores, or a fixed one; same gradients.

    Of a MaskedLinear's scores, threshold and bits are found when they have changed; other forwards and backwards read
    2 bits a weight instead. Of any other tensor's they are found in each. int16 scores (see fixed_point.py) get no
    gradient.
    """
    return _BY_RATIO(x, weight, scores, bias, keep_ratio, threshold, mode, backend)


def _check(x, weight, scores, bias, keep_ratio, threshold, mode, backend):
    checks.check_mode(mode)
    checks.check_linear(x, weight, bias)
    checks.check_scores(selectable(scores), weight)
    checks.check_keep_ratio(keep_ratio)
    checks.check_fixed_threshold(threshold)
    return x, weight, scores, bias, keep_ratio, threshold, mode, backend


def _by_memo(x, weight, scores, bias, keep_ratio, threshold, mode):
    """The short way of the packed mask, where one is remembered."""
    mask = remembered_mask(scores, (keep_ratio, threshold, mode))
    return None if mask is None else MASKED_LINEAR_PACKED.by_short_way((x, weight, mask.packed, bias, "auto"))


def _product(x, weight, scores, bias, keep_ratio, threshold, mode, backend):
    mask = current_mask(scores, keep_ratio, threshold, mode, remember=not is_called_by_graph())
    return MASKED_LINEAR_PACKED.compute(x, weight, mask.packed, bias, backend)


def _gradients(grad_output, x, weight, scores, keep_ratio, threshold, mode, *rest):
    mask = current_mask(scores, keep_ratio, threshold, mode, remember=False)
    return _gradients_of(mask, grad_output, x, weight, scores, keep_ratio, threshold, mode, *rest)


def _gradients_of(mask, grad_output, x, weight, scores, keep_ratio, threshold, mode, output_mask, backend):
    sign = sign_scores(scores)
    given = grad_output, x, weight, mask.packed, sign, mask.signs, mode, output_mask, backend
    return GRADIENTS_OF_PACKED.compute(*given)


def sign_scores(scores: Tensor) -> Tensor | None:
    """The scores that a sign may be taken from: int16 scores have no gradient."""
    return scores.detach() if scores.is_floating_point() else None


def by_the_forwards_mask(run: Op, with_mask: Callable, *, bias: int) -> Gradient:
    """straight_through by the mask that the forward pass has just selected, else by ``run``, which selects."""

    def gradients(grad_output, x, weight, scores, *rest):
        *between, mask, output_mask, backend = rest
        rest = (*between, output_mask, backend)
        # A trace would keep this mask, whatever the scores become; a second derivative is refused by the op.
        if mask is None or torch.is_grad_enabled() or is_seen_by_others(grad_output):
            return run(grad_output, x, weight, scores, *rest)
        return with_mask(mask, grad_output, x, weight, scores, *rest)

    plain = straight_through(gradients, scores=2, bias=bias)

    def setup_context(ctx, inputs, output):
        plain.setup_context(ctx, inputs, output)
        keep_ratio, threshold, *_, mode, backend = ctx.settings
        ctx.settings = (*ctx.settings[:-1], remembered_mask(inputs[2], (keep_ratio, threshold, mode)), backend)

    return Gradient(plain.backward, setup_context)


_BY_RATIO_BACKWARD = Op("masked_linear_by_ratio_backward", _gradients, is_gradient=True)
_BY_RATIO = Op(
    "masked_linear_by_ratio",
    _product,
    check=_check,
    gradient=by_the_forwards_mask(_BY_RATIO_BACKWARD, _gradients_of, bias=3),
    casts=(0, 1, 3),
    short=(3, 1),
    by=_by_memo,
)
