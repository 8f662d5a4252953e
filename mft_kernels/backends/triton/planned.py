"""Plans: calls that launch cubins, remembered by the layout of their arguments.

The next call with the same layout is one op of csrc/cuda. A plan holds what the first call launched: binaries, grids
and values. Each call replaces some of the values: the addresses of its arguments, results and scratch, and the numbers
that differ from call to call, such as an optimiser's.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .. import built
from ..autotune import measuring
from .arguments import is_exact
from .cubins import Launched, bits_of, is_noting, noting
from .launch import recording
from .target import is_assumed

FORWARD, GRADIENTS, SUMS = "forward", "gradients", "sums"
#: The tensors that a product is given, in the order of the op's arguments; kGiven of plan_bindings.cpp is their number.
Given = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

#: Names of parameters. A launch writes scratch before another reads it, or scratch begins as zeros. A result may begin
#: as zeros too.
_SCRATCH, _ZEROS = {"parts", "words", "missed", "histograms", "counts"}, {"histograms", "counts", "zeros"}

_numbers = itertools.count()
#: 0 belongs to the short path of masked_linear_packed for 16-bit weights, whose products depend on no setting.
_kinds: dict[tuple[object, ...], int] = {(FORWARD, True, None, "packed"): next(_numbers)}
_any = False  # whether a call is remembered


def kind(what: str, dtypes_of: Tensor | None, *decide: object, automatic: bool = False) -> int | None:
    """Return a number for what decides besides the layout; None if a plan may neither remember nor serve this call.

    ``dtypes_of``: a matrix of the product, if PyTorch's setting of fp32 precision may affect it; otherwise None.
    """
    if recording() or is_assumed() or (automatic and measuring()):
        return None
    exact = None if dtypes_of is None or dtypes_of.element_size() == 2 else is_exact(dtypes_of)
    return _kinds.setdefault((what, automatic, exact, *decide), next(_numbers))


def forward(given: Given, number: int | None) -> Tensor | None:
    """Return y (..., N) by the plan of an earlier call; None if there is no such plan."""
    if not _any or number is None:
        return None
    return built.cuda_ops.planned_forward(*given[:-1], number)


def gradients(given: Given, number: int | None) -> list[Tensor] | None:
    """Return the gradients by a plan, or None; as forward does for y."""
    if not _any or number is None:
        return None
    return built.cuda_ops.planned_gradients(*given, number) or None


def sums(given: Given, number: int | None) -> bool:
    """Add sums to the first tensor by the plan of an earlier call; return whether there is such a plan."""
    return _any and number is not None and built.cuda_ops.planned_sums(*given[:-1], number)


def by_plan(
    given: Sequence[Tensor | None],
    number: int | None,
    run: Callable[[], list[Tensor]],
    numbers: Mapping[str, float] | None = None,
) -> list[Tensor]:
    """Return what run() returns (at least one tensor), by the plan of an earlier call if there is such a plan.

    Within another remembered call, run() is called, because that call's plan holds all launches. ``numbers``: see
    remember.
    """
    if number is None or is_noting():
        return run()
    if _any:
        bits = [bits_of(each) for each in numbers.values()] if numbers else []
        found = built.cuda_ops.planned_call(given, bits, number)
        if found:
            return found
    with noting() as launched:
        results = run()
    remember(given, number, results, launched, numbers)
    return results


def remember(
    given: Sequence[Tensor | None],
    number: int | None,
    results: Sequence[Tensor],
    launched: Sequence[Launched],
    numbers: Mapping[str, float] | None = None,
) -> None:
    """Remember what a call launched, if it launched only cubins and all addresses belong to its own tensors.

    ``numbers``: those that may differ in the next call with the same layout, by the kernel parameters that take them.
    """
    global _any
    if number is None or not launched:
        return
    known = [(slot, t) for slot, t in enumerate((*given, *results)) if t is not None and t.numel() > 0]
    slots = {t.data_ptr(): slot for slot, t in known}
    if len(slots) < len(known):  # two tensors begin at one address: it is not known which one is meant
        return
    made, order = list(results), {name: -1 - i for i, name in enumerate(numbers or {})}
    steps: list[int] = []
    zeros: set[int] = set()
    taken: set[str] = set()
    for one in launched:
        if one.cubin is None:
            return
        places = [(at, order[name]) for name, at in one.numbers.items() if name in order]
        for at, name, tensor in one.addresses:
            if tensor.numel() == 0:
                continue
            slot = slots.get(tensor.data_ptr())
            if slot is None:
                if name not in _SCRATCH:  # a copy of an argument
                    return
                slot = slots[tensor.data_ptr()] = len(given) + len(made)
                made.append(tensor)
            if name in _ZEROS:
                zeros.add(slot - len(given))
            places.append((at, slot))
        taken |= one.numbers.keys()
        steps += [one.cubin, *one.grid, len(one.values), *one.values, len(places), *itertools.chain(*places)]
    assert order.keys() <= taken, (
        f"no kernel takes {order.keys() - taken} as a number that its binary does not depend on"
    )
    built.cuda_ops.remember_plan(given, number, made, len(results), sorted(zeros), len(order), steps)
    _any = True


def forget() -> None:
    """Forget all plans, because what decides the tiles is about to change."""
    global _any
    if _any:
        built.cuda_ops.forget_plans()
    _any = False
