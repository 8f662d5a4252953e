"""The masked products of one kind of weight, from scores and from a packed mask, each with an op for its gradients."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..operands import Experts, Keep
from ..reference.linear import Gradients
from . import served
from .checks import check_device, check_mode, check_packed, check_scores, check_threshold
from .route import Op
from .straight_through import StraightThrough

Check = Callable[[Any], None]  # takes a call, raises if it is wrong


def masked_products(
    name: str,
    weight: Callable[[Any], Tensor | Experts],
    *,
    check: Check,
    check_values: Check = lambda call: None,
    short: bool = False,
) -> tuple[Op, Op, Op]:
    """Define and return the ops ``name``, ``name``_packed and ``name``_packed_backward.

    Args:
        weight: makes the weight operand from a call.
        check: run by the public functions; raises unless the operands other than the mask fit each other.
        check_values: run inside the ops, so that compiled code runs it too.
    """

    def define(op: str, keep: Callable[[Any], Keep], check_keep: Callable[[Any], Any]) -> tuple[Op, Op]:
        def product(call: Any) -> Tensor:
            check_values(call)
            return served.product(call, weight(call), keep(call))

        def gradients(call: Any) -> Gradients:
            return served.gradients(call, weight(call), keep(call))

        def checked(call: Any) -> Any:
            check(call)
            return check_keep(call)

        backward = Op(f"{op}_backward", gradients, is_gradient=True, short=short)
        return Op(op, product, check=checked, gradient=StraightThrough(op, backward), short=short), backward

    from_scores, _ = define(name, _scores, _checked_scores)
    return from_scores, *define(f"{name}_packed", _words, _checked_words)


def _scores(call: Any) -> Keep:
    threshold = call.threshold
    if call.scores.dim() == 3:
        threshold = threshold.expand(call.scores.shape[0]).contiguous()
    return Keep(call.scores, threshold, call.mode)


def _words(call: Any) -> Keep:
    return Keep(call.packed)


def _checked_scores(call: Any) -> Any:
    check_mode(call.mode)
    check_scores(call.scores, call.weight)
    check_threshold(call.threshold, call.scores)
    if call.threshold.dtype == call.scores.dtype:
        return call
    return call._replace(threshold=call.threshold.to(call.scores.dtype))


def _checked_words(call: Any) -> Any:
    check_packed("packed", call.packed, call.weight.shape)
    check_device("packed", call.packed, "weight", call.weight)
    return call
