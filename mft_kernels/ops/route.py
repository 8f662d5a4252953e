"""Op: an op of namespace ``mft``, and the one place that decides which way a call of it takes to its kernel.

    short       one function of a backend, in C++, which checks its arguments and computes; it declines an unusual call
    direct      the checks, then the backend's function, under autograd where a gradient is asked for
    dispatcher  the checks, then PyTorch's dispatcher, for calls that someone else has to see: autocast, a compiler or
                tracer, modes and subclasses, torch.func, forward mode, and the profiler

The dispatcher takes 20 to 50 us for an op in Python (Xeon). One token on a small layer is less work than that, so
generation would lose to the dense model by it alone.
"""

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import _profiler_enabled, forward_ad
from torch.overrides import has_torch_function

from .._ops import add_op_namespace_prefix, ops
from ..backends.table import short_ways
from .checks import check_transforms
from .schema import calls, library

increment_version = torch.autograd.graph.increment_version

_DEVICE_TYPES = ("cpu", "cuda")
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch

#: Whom the dispatcher asks on an ordinary tensor's account, as bits: others for fakes, wrappers and lazy negation.
_plain_keys: set[int] = set()
_seen_device_types: set[str] = set()
#: By exact type, as a subclass may have to see a call.
plain_types: set[type] = {Tensor, nn.Parameter}
_usual_types: set[type] = {*plain_types, type(None), str, float, int, bool, list, tuple}
_WRITTEN = object()


def treat_as_plain(kind: type[Tensor]) -> None:
    """Let calls on tensors of exactly this class go as those on any tensor do."""
    plain_types.add(kind)
    _usual_types.add(kind)


class _Caller(threading.local):
    is_python = False  # of the op that this thread hands to the dispatcher
    is_graph = False  # of the op that this thread computes


_caller = _Caller()


def is_called_by_graph() -> bool:
    """Whether the op that is being computed was called by a graph, compiled or traced earlier, and not from Python."""
    return _caller.is_graph


class Gradient:
    """How an op is differentiated: a subclass says what is saved of a call, and what becomes of it."""

    def save(self, ctx: Any, call: Any) -> None:
        """Leave in ctx, an autograd.Function's, what backward reads."""
        raise NotImplementedError

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The gradients, one per argument of the op."""
        raise NotImplementedError


class Op:
    """An op of namespace mft. Called with the arguments of its schema, the last of which is the backend.

    Args:
        name: as in schema.py, which has the class of its calls.
        run: makes the result from a call.
        check: of the public function: raises, or returns the call as it goes on. None: it is trusted.
        gradient: None: the op is not differentiable. Else autocast casts x, weight and bias; scores it never casts.
        is_gradient: it is a gradient itself, and another is an error.
        short: whether a backend may have a short way for it.
        by: a short way other than that of "auto"'s backend, from all arguments but the last; None where it declines.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Any], Any],
        *,
        check: Callable[[Any], Any] | None = None,
        gradient: Gradient | None = None,
        is_gradient: bool = False,
        short: bool = False,
        by: Callable | None = None,
    ) -> None:
        self.name, self.kind, self.run, self._check, self._short, self._by = name, calls[name], run, check, short, by
        #: Whether the short way is a backend's, which is asked within other ops too.
        self.asks_backend = short and by is None
        #: The call with the arguments in a tuple: as _make of a named tuple, which takes 0.1 us more.
        self.call_of: Callable[[tuple], Any] = functools.partial(tuple.__new__, self.kind)
        arguments = getattr(ops, name).default._schema.arguments
        #: The places of what is written in place; such an op has no gradient.
        self._writes = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        #: Before this place stand all arguments that are tensors, or may be.
        self._past_tensors = 1 + max(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
        names = [a.name for a in itertools.takewhile(lambda a: str(a.type) == "Tensor", arguments)]
        #: How many of the first arguments must be tensors, and which of them chooses the short way by its dtype.
        self._required = len(names)
        self._deciding = max((i for i, name in enumerate(names) if name in ("x", "weight")), default=0)
        library.impl(name, self._dispatched, "CompositeExplicitAutograd")
        self._differentiate = None if gradient is None else _with_autograd(self, gradient)
        if gradient is not None:
            _autocast(self, [i for i, a in enumerate(arguments) if a.name in ("x", "weight", "bias")])
        if is_gradient:
            _refuse_second_derivative(self)

    def __call__(self, *given: Any) -> Any:
        seen = _is_watched()
        asks = not seen and not self._writes and torch.is_grad_enabled() and _any_requires_grad(*given)
        if self._short and not seen and not asks and given[-1] == "auto" and self._is_usual(given):
            result = self._by(*given[:-1]) if self._by is not None else self.by_short_way(given)
            if result is not None:
                return None if result is _WRITTEN else result
        call = self.call_of(given)
        if self._check is not None:
            call = self._check(call)
        if not seen and _are_plain(call[: self._past_tensors]):
            if not asks:
                return self.compute(call)
            if self._differentiate is not None:
                return self._differentiate(*call)
        check_transforms(self.name, *_tensors(call), in_place=bool(self._writes))
        if self._writes:
            with torch.no_grad():
                return self._dispatch(call)
        return self._dispatch(call)

    def compute(self, given: tuple) -> Any:
        """The result alone, from the arguments: below autograd and the dispatcher, and within other ops."""
        if self.asks_backend and given[-1] == "auto":
            result = self.by_short_way(given)
            if result is not None:
                return None if result is _WRITTEN else result
        result = self.run(given if type(given) is self.kind else self.call_of(given))
        if self._writes:
            self._note_writes(given)
        return result

    def _dispatch(self, given: tuple) -> Any:
        if torch.compiler.is_compiling():  # this call becomes a graph's
            return getattr(ops, self.name)(*given)
        _caller.is_python = True
        try:
            return getattr(ops, self.name)(*given)
        finally:
            _caller.is_python = False

    def _dispatched(self, *given: Any) -> Any:
        """compute, for the dispatcher."""
        before, _caller.is_graph = _caller.is_graph, not _caller.is_python
        try:
            return self.compute(given)
        finally:
            _caller.is_graph = before

    def _is_usual(self, given: tuple) -> bool:
        """Whether a short way may be asked; else the checks have to say what is wrong."""
        return plain_types.issuperset(map(type, given[: self._required])) and _usual_types.issuperset(map(type, given))

    def by_short_way(self, given: tuple) -> Any:
        """What the short way of "auto"'s backend makes, or _WRITTEN; None if it declines or there is none."""
        way = short_ways.get((self.name, given[self._deciding].dtype))
        if way is None:
            return None
        result = way(*given[:-1])
        if result is True:
            self._note_writes(given)
            return _WRITTEN
        if type(result) is list:
            return tuple(result) or None
        return None if result is False else result

    def _note_writes(self, given: tuple) -> None:
        """Tell autograd of what a kernel has written through pointers."""
        increment_version([given[at] for at in self._writes if given[at] is not None])


def unchanged(ctx) -> tuple[Any, ...]:
    """What a forward pass saved. Raises: RuntimeError if some of it was changed in place since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        changed = re.search(r"(\[torch\.[\w.]+ .*\]).* is at version (\d+); expected version (\d+)", str(error))
        if changed is None:
            raise
        raise RuntimeError(
            "x, weight, scores, threshold and packed must stay as they are until the backward pass, got one "
            f"{changed[1]} modified by an inplace operation since the forward pass (version {changed[2]}, expected "
            f"{changed[3]}): call backward() before optimizer.step() and the like, or change a clone()"
        ) from error


# ---------------------------------------------------------------------------------------------- who sees a call


def is_seen_by_others(*tensors: Tensor | None) -> bool:
    """Whether someone besides the kernel and autograd has to see a call on these tensors."""
    return _is_watched() or not _are_plain(tensors)


def _is_watched() -> bool:
    """Whether someone besides autograd has to see any call now."""
    return (
        torch.compiler.is_compiling()  # first, as a compiler cannot trace the others
        or _is_torch_function_mode_enabled()
        or _len_torch_dispatch_stack() != 0
        or _dispatch_tls_is_dispatch_key_included(
            _PRE_DISPATCH
        )  # modes of make_fx(pre_dispatch=True), on a stack apart
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _are_plain(given: Sequence[Any]) -> bool:
    """Whether nobody has to see a call for the sake of one of its tensors."""
    if has_torch_function(given):
        return False
    for each in given:
        if isinstance(each, Tensor):
            if _dispatch_keys(each).raw_repr() not in _plain_keys and not _is_plain(each):
                return False
        elif type(each) in (list, tuple) and each and not _are_plain(each):
            return False
    return True


def _tensors(given: tuple) -> Iterator[Tensor]:
    """Those among the arguments, also in lists."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif type(each) is list or type(each) is tuple:
            yield from (one for one in each if isinstance(one, Tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Whether an empty tensor of the same device has the same keys; remembered."""
    device_type = tensor.device.type
    if device_type in _DEVICE_TYPES and device_type not in _seen_device_types:
        for inference in (False, True):
            with torch.inference_mode(inference):
                _plain_keys.add(_dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
        _seen_device_types.add(device_type)
    return _dispatch_keys(tensor).raw_repr() in _plain_keys


# ---------------------------------------------------------------------------------------------- what an op registers


def _with_autograd(op: Op, gradient: Gradient) -> Callable:
    """Register the gradient, and return the op under autograd for a call that nobody else has to see.

    By way of the dispatcher that takes 20 us more, and again in the backward pass (Xeon).
    """

    def setup_context(ctx, inputs, output):
        gradient.save(ctx, op.call_of(inputs))

    name = add_op_namespace_prefix(op.name)
    torch.library.register_autograd(name, gradient.backward, setup_context=setup_context, lib=library)

    compute = op.compute if op.asks_backend else op.run

    def forward(ctx, *inputs):
        call = op.call_of(inputs)
        output = compute(call)
        gradient.save(ctx, call)
        return output

    def flat(ctx, *grads):  # what is a list of tensors to an op is no tensor to a function
        return tuple(None if type(grad) is list else grad for grad in gradient.backward(ctx, *grads))

    has_list = any("List[Tensor]" in str(a.type) for a in getattr(ops, op.name).default._schema.arguments)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(flat if has_list else gradient.backward)}
    function: type[torch.autograd.Function] = type(f"{ops.name}_{op.name}", (torch.autograd.Function,), methods)
    # Past what Function.apply does for torch.func, which does not see such a call: 2 us.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _refuse_second_derivative(op: Op) -> None:
    """Make a derivative of an op that is a gradient itself an error instead of a silent zero."""
    name = add_op_namespace_prefix(op.name)

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{name} has no second derivative, as the mask's gradient is straight-through: "
            "leave out create_graph=True, or detach() its gradients"
        )

    torch.library.register_autograd(name, backward, lib=library)


def _autocast(op: Op, casts: Sequence[int]) -> None:
    """Autocast of the arguments at the positions ``casts``: torch.library.register_autocast would cast scores too."""
    overload = getattr(ops, op.name).default

    def autocast_for(device_type: str, key: torch._C.DispatchKey) -> Callable:
        def kernel(*arguments):
            args = list(arguments)
            dtype = torch.get_autocast_dtype(device_type)
            for i in casts:
                if args[i] is not None and args[i].is_floating_point() and args[i].dtype != torch.float64:
                    args[i] = args[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return overload(*args)

        return kernel

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(op.name, autocast_for(device_type, getattr(torch._C.DispatchKey, key)), key)
