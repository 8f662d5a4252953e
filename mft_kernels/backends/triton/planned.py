"""A call by cubins, remembered by the layout of its arguments: the next call alike is one op of csrc/cuda.

What is remembered is what the first call launched: binaries, grids and values, of which some are put in anew: the
addresses of what a call is given, and of what it makes, its results and its scratch; and the numbers that differ from
call to call, as an optimiser's do.
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
#: What a product is given, in the order of the op's arguments; as many as plan_bindings.cpp says.
Given = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

#: By parameter: scratch, which a launch writes before one reads it, or which begins as zeros, as a result may too.
_SCRATCH, _ZEROS = {"parts", "words", "missed", "histograms", "counts"}, {"histograms", "counts", "zeros"}

_numbers = itertools.count()
#: 0 is that of the short way of masked_linear_packed, for 16-bit weights: their products depend on no setting.
_kinds: dict[tuple[object, ...], int] = {(FORWARD, True, None, "packed"): next(_numbers)}
_any = False  # remembered


def kind(what: str, dtypes_of: Tensor | None, *decide: object, automatic: bool = False) -> int | None:
    """A number for what decides beside the layout; None where this call may neither be remembered nor be served so.

    ``dtypes_of``: a matrix of the product, which PyTorch's setting of fp32 precision may concern; None: there is none.
    """
    if recording() or is_assumed() or (automatic and measuring()):
        return None
    exact = None if dtypes_of is None or dtypes_of.element_size() == 2 else is_exact(dtypes_of)
    return _kinds.setdefault((what, automatic, exact, *decide), next(_numbers))


def forward(given: Given, number: int | None) -> Tensor | None:
    """y (..., N) by what an earlier call has launched; None where there was none alike."""
    if not _any or number is None:
        return None
    return built.cuda_ops.planned_forward(*given[:-1], number)


def gradients(given: Given, number: int | None) -> list[Tensor] | None:
    """The gradients, as forward gives y."""
    if not _any or number is None:
        return None
    return built.cuda_ops.planned_gradients(*given, number) or None


def sums(given: Given, number: int | None) -> bool:
    """Whether sums have been added to the first tensor as by an earlier call."""
    return _any and number is not None and built.cuda_ops.planned_sums(*given[:-1], number)


def by_plan(
    given: Sequence[Tensor | None],
    number: int | None,
    run: Callable[[], list[Tensor]],
    numbers: Mapping[str, float] | None = None,
) -> list[Tensor]:
    """What run() gives, one tensor at least, and by what an earlier call has launched where there was one alike.

    Within another call, whose plan has all that it launches, it runs. ``numbers``: see remember.
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
    """What a call has launched, if that was cubins alone, and all addresses are of its own tensors.

    ``numbers``: those that another call alike may give other values, by the parameters of the kernels that take them.
    """
    global _any
    if number is None or not launched:
        return
    known = [(slot, t) for slot, t in enumerate((*given, *results)) if t is not None and t.numel() > 0]
    slots = {t.data_ptr(): slot for slot, t in known}
    if len(slots) < len(known):  # two begin at one address: which one is meant is not known
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
    assert order.keys() <= taken, f"no kernel takes {order.keys() - taken} as a number that no binary depends on"
    built.cuda_ops.remember_plan(given, number, made, len(results), sorted(zeros), len(order), steps)
    _any = True


def forget() -> None:
    """All of it: what decides the tiles is about to change."""
    global _any
    if _any:
        built.cuda_ops.forget_plans()
    _any = False
