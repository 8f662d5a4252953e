"""From scores to the mask that holds now: one selection per change of the scores, however many forwards.

The mask changes once an optimiser step, so threshold, packed mask and packed signs (1 bit a weight each) are memoised.
The memo belongs to the scores' storage and is fresh while their version is: aliases that checkpointing or a compiled
graph make of a parameter hit it, and nothing has to be invalidated by hand.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import checks, library
from .fixed_point import code_at_least, selectable
from .ops import kept_threshold, pack_mask


@dataclass(frozen=True)
class CurrentMask:
    """What the scores select.

    ``signs`` is None where no bit can tell them (in value mode, or if a score is 0), and where autograd asks for none:
    of int16 scores.
    """

    threshold: Tensor  # ()
    packed: Tensor  # int32 (N, ceil(K / 32))
    signs: Tensor | None  # int32 (N, ceil(K / 32))


@dataclass(frozen=True)
class _Entry:
    storage: StorageWeakRef  # while it is held, no other storage can take the same address
    freshness: tuple
    mask: CurrentMask


_memo: dict[tuple, _Entry] = {}
_lock = threading.Lock()
_changes = 0  # that no version shows


def outdate_all(*_) -> None:
    """Forget what is memoised of all scores, after a write to shards, say: FSDP2 gathers them without a new version."""
    global _changes
    _changes += 1


# A tensor's version does not see writes through .data or a raw pointer, as some optimisers make them.
# So a step of any torch.optim.Optimizer outdates every memo.
register_optimizer_step_post_hook(outdate_all)


def current_mask(scores: Tensor, keep_ratio: float, threshold: float | None, mode: str) -> CurrentMask:
    """Threshold, packed mask and packed signs of ``scores`` as they are now.

    Args:
        scores: (N, K). A write that neither bumps the tensor's version nor is an optimiser's step (a hand-written
            ``scores.data`` assignment in place) is not seen: call outdate(scores) after it.
        threshold: a fixed one, or None to find the one that keeps ``keep_ratio``.
    Raises: NonFiniteScores (a ValueError); not while a CUDA graph is captured. ValueError if scores are spread over
        processes.
    """
    checks.check_whole("scores", scores)
    # An inference tensor has no version, so nothing tells whether it changed. A CUDA graph replays what it captured, so
    # the selection has to be in it.
    if scores.is_inference() or _capturing(scores):
        return _find_mask(scores, keep_ratio, threshold, mode)
    storage = StorageWeakRef(scores.untyped_storage())
    key = (storage.cdata, scores.storage_offset(), scores.shape, scores.stride(), scores.dtype)
    freshness = (scores._version, _changes, keep_ratio, threshold, mode)
    with _lock:
        entry = _memo.get(key)
    if entry is not None and entry.freshness == freshness:
        return entry.mask
    mask = _find_mask(scores, keep_ratio, threshold, mode)
    with _lock:
        for stale in [k for k, e in _memo.items() if e.storage.expired()]:
            del _memo[stale]
        _memo[key] = _Entry(storage, freshness, mask)
    return mask


def outdate(scores: Tensor) -> None:
    """Forget what is memoised of ``scores``, after a write that its version does not show."""
    cdata = StorageWeakRef(scores.untyped_storage()).cdata
    with _lock:
        for key in [k for k in _memo if k[0] == cdata]:
            del _memo[key]


def _capturing(scores: Tensor) -> bool:
    return scores.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _find_mask(scores: Tensor, keep_ratio: float, fixed: float | None, mode: str) -> CurrentMask:
    scores = scores.detach()
    fixed_point = scores.dtype == torch.int16
    if fixed is None:
        threshold = kept_threshold(scores, keep_ratio, mode=mode)
        bad = selectable(threshold).isnan()
    else:
        # Filled on the device: a copy from the host cannot be captured.
        threshold = scores.new_full((), code_at_least(fixed) if fixed_point else fixed)
        bad = ~selectable(scores).isfinite().all()
    # Within a CUDA graph the host can ask nothing: scores that are not finite give the threshold NaN, which keeps no
    # weight, and the sign comes from the scores.
    capturing = _capturing(scores)
    if not capturing and bad:  # one synchronisation per change of the scores, none in a forward
        raise checks.NonFiniteScores(selectable(scores))
    packed = pack_mask(scores, threshold, mode=mode)
    if mode == "value" or capturing or fixed_point:
        return CurrentMask(threshold, packed, None)
    signs, zeros = torch.ops.mft.pack_signs(scores, "auto")
    return CurrentMask(threshold, packed, signs if zeros == 0 else None)


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

    Threshold and bits are found when the scores have changed; other forwards and backwards read 2 bits a weight
    instead of the scores. int16 scores (see fixed_point.py) get no gradient.
    """
    checks.check_mode(mode)
    checks.check_linear(x, weight, bias)
    checks.check_scores(selectable(scores), weight)
    checks.check_keep_ratio(keep_ratio)
    checks.check_fixed_threshold(threshold)
    checks.check_transforms("masked_linear_by_ratio", x, weight, scores, bias)
    return torch.ops.mft.masked_linear_by_ratio(x, weight, scores, bias, keep_ratio, threshold, mode, backend)


def _forward(x, weight, scores, bias, keep_ratio, threshold, mode, backend):
    mask = current_mask(scores, keep_ratio, threshold, mode)
    return torch.ops.mft.masked_linear_packed(x, weight, mask.packed, bias, backend)


def _backward(grad_output, x, weight, scores, keep_ratio, threshold, mode, output_mask, backend):
    mask = current_mask(scores, keep_ratio, threshold, mode)
    sign = scores if scores.is_floating_point() else None  # int16 scores have no gradient
    return torch.ops.mft.masked_linear_packed_backward(
        grad_output, x, weight, mask.packed, sign, mask.signs, mode, output_mask, backend
    )


library.define(
    "masked_linear_by_ratio(Tensor x, Tensor weight, Tensor scores, Tensor? bias, float keep_ratio, "
    "float? threshold, str mode, str backend) -> Tensor",
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    _forward,
)
library.define(
    "masked_linear_by_ratio_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, float keep_ratio, "
    "float? threshold, str mode, bool[4] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, x, weight, scores, keep_ratio, threshold, mode, output_mask, backend: library.gradient_shapes(
        output_mask, grad_output, (*grad_output.shape[:-1], weight.shape[1]), weight, scores.dtype
    ),
    _backward,
)


def _save(ctx, inputs, output):
    x, weight, scores, _, *ctx.arguments = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if needs_x else None, weight, scores)


def _differentiate(ctx, grad_output):
    x, weight, scores = library.unchanged(ctx)
    keep_ratio, threshold, mode, backend = ctx.arguments
    wants = list(ctx.needs_input_grad[:4])
    grads = torch.ops.mft.masked_linear_by_ratio_backward(
        grad_output, grad_output if x is None else x, weight, scores, keep_ratio, threshold, mode, wants, backend
    )
    return *[g if wanted else None for g, wanted in zip(grads, wants)], None, None, None, None


torch.library.register_autograd("mft::masked_linear_by_ratio", _differentiate, setup_context=_save, lib=library.library)
library.define_no_double_backward("masked_linear_by_ratio_backward")
library.define_autocast("masked_linear_by_ratio", casts=(0, 1, 3))
