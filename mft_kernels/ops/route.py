"""Op: an op of namespace ``mft``. Only this module decides which of three ways a call takes to its kernel.

    short       one function of a backend, in C++, checks the arguments and computes; it declines an unusual call
    direct      the checks, then the backend's function
    dispatcher  the checks, then PyTorch's dispatcher, for calls that others have to see: autocast, a compiler or
                tracer, modes and subclasses, torch.func, forward mode, and the profiler

If a gradient is needed, the first two run within an autograd function.

The dispatcher takes 20 to 50 us for an op in Python (Xeon). That is more than the work of one token on a small layer,
so it alone would make generation slower than with the dense model.
"""

import functools
import itertools
import operator
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
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

#: Sets of dispatch keys of ordinary tensors, as bits. Fakes, wrappers and lazily negated tensors have others.
_plain_keys: set[int] = set()
_seen_device_types: set[str] = set()
#: Exact types of plain tensors: a subclass may have to see a call.
plain_types: set[type] = {Tensor, nn.Parameter}
_plain_or_none: set[type] = {*plain_types, type(None)}
#: What Python may give to a short way, by the type in the op's schema. C++ would refuse others in words of its own.
_usual_types: dict[str, Collection[type]] = {
    "Tensor": plain_types,
    "Optional[Tensor]": _plain_or_none,
    "List[Tensor]": (list, tuple),
    "str": (str,),
    "float": (float, int),
    "Optional[float]": (float, int, type(None)),
    "bool": (bool,),
    "List[bool]": (list, tuple),
}
_WRITTEN = object()


def treat_as_plain(kind: type[Tensor]) -> None:
    """Treat tensors of exactly this class as plain ones, which need no dispatcher."""
    plain_types.add(kind)
    _plain_or_none.add(kind)


class _Caller(threading.local):
    is_python = False  # whether the op that this thread dispatches was called from Python
    is_graph = False  # whether the op that this thread computes was called by a graph


_caller = _Caller()


def is_called_by_graph() -> bool:
    """Return whether a graph, compiled or traced earlier, called the op that is being computed, and not Python."""
    return _caller.is_graph


class Gradient:
    """How an op is differentiated. A subclass defines what a call saves and how backward uses it."""

    def save(self, ctx: Any, call: Any) -> None:
        """Save what backward reads in ctx, the context of an autograd.Function."""
        raise NotImplementedError

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Return the gradients, one per argument of the op."""
        raise NotImplementedError


class Op:
    """An op of namespace mft. Called with the arguments of its schema, the last of which is the backend.

    Args:
        name: an op of schema.py, which also has the class of its calls.
        run: computes the result of a call.
        check: checks a call: raises, or returns the call, perhaps changed. None: calls are trusted.
        gradient: None: the op is not differentiable. Otherwise autocast casts x, weight and bias, and never scores.
        is_gradient: whether the op is a gradient itself. Differentiating it is then an error.
        short: whether a backend may have a short way for it.
        fast_path: replaces the short way of "auto"'s backend. It takes all arguments but the last, and returns None if
            it declines.
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
        fast_path: Callable | None = None,
    ) -> None:
        self.name, self.kind, self.run, self._check = name, calls[name], run, check
        self._short, self._fast_path = short or fast_path is not None, fast_path
        #: Whether the short way is a backend's. If so, compute() tries it too.
        self._asks_backend = short
        #: Makes a call from a tuple of arguments, like _make of a named tuple, which takes 0.1 us more.
        self.call_of: Callable[[tuple], Any] = functools.partial(tuple.__new__, self.kind)
        arguments = getattr(ops, name).default._schema.arguments
        #: Positions of the arguments that are written in place. Such an op has no gradient.
        self._writes = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        #: All arguments that are or may be tensors come before this position.
        self._past_tensors = 1 + max(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
        names = [a.name for a in itertools.takewhile(lambda a: str(a.type) == "Tensor", arguments)]
        self._usual = [_usual_types.get(str(a.type), ()) for a in arguments]
        #: Which of the first arguments, which must be tensors, selects the short way by its dtype.
        self._deciding = max((i for i, name in enumerate(names) if name in ("x", "weight")), default=0)
        library.impl(name, self._dispatched, "CompositeExplicitAutograd")
        self._differentiate = None if gradient is None else _with_autograd(self, gradient)
        if gradient is not None:
            _autocast(self, [i for i, a in enumerate(arguments) if a.name in ("x", "weight", "bias")])
        if is_gradient:
            _refuse_second_derivative(self)

    def __call__(self, *given: Any) -> Any:
        seen = _needs_dispatcher()
        asks = not seen and not self._writes and torch.is_grad_enabled() and _any_requires_grad(*given)
        if not seen and not asks and (result := self.try_usual(given)) is not None:
            return None if result is _WRITTEN else result
        plain = not seen and _are_plain(given[: self._past_tensors])
        if plain and asks and self._differentiate is not None:
            return self._differentiate(*given)
        call = self.checked(given)
        if plain and not asks:
            return self.compute(call)
        check_transforms(self.name, *_tensors(call), in_place=bool(self._writes))
        if self._writes:
            with torch.no_grad():
                return self._dispatch(call)
        return self._dispatch(call)

    def try_usual(self, given: tuple) -> Any:
        """Return the result of the short way, or _WRITTEN; None if the checks have to say what is unusual, or wrong."""
        if not self._short or given[-1] != "auto" or not all(map(operator.contains, self._usual, map(type, given))):
            return None
        return self.by_short_way(given) if self._fast_path is None else self._fast_path(*given[:-1])

    def checked(self, given: tuple) -> Any:
        """Return the call with these arguments, once the checks have passed."""
        call = self.call_of(given)
        return call if self._check is None else self._check(call)

    def compute(self, given: tuple) -> Any:
        """Compute the result without checks, autograd or dispatcher; for use below these, and within other ops."""
        if self._asks_backend and given[-1] == "auto":
            result = self.by_short_way(given)
            if result is not None:
                return None if result is _WRITTEN else result
        result = self.run(given if type(given) is self.kind else self.call_of(given))
        if self._writes:
            self._note_writes(given)
        return result

    def _dispatch(self, given: tuple) -> Any:
        if torch.compiler.is_compiling():  # this call becomes part of a graph
            return getattr(ops, self.name)(*given)
        _caller.is_python = True
        try:
            return getattr(ops, self.name)(*given)
        finally:
            _caller.is_python = False

    def _dispatched(self, *given: Any) -> Any:
        """Run compute for the dispatcher."""
        before, _caller.is_graph = _caller.is_graph, not _caller.is_python
        try:
            return self.compute(given)
        finally:
            _caller.is_graph = before

    def by_short_way(self, given: tuple) -> Any:
        """Return the result of the short way of "auto"'s backend, or _WRITTEN; None if it declines or there is none."""
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
        """Tell autograd which tensors a kernel has written through pointers."""
        increment_version([given[at] for at in self._writes if given[at] is not None])


def unchanged(ctx) -> tuple[Any, ...]:
    """Return what a forward pass saved. Raises: RuntimeError if some of it was changed in place since then."""
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


# ---------------------------------------------------------------------------------------------- who has to see a call


def is_seen_by_others(*tensors: Tensor | None) -> bool:
    """Return whether anyone except the kernel and autograd has to see a call on these tensors."""
    return _needs_dispatcher() or not _are_plain(tensors)


def _needs_dispatcher() -> bool:
    """Return whether anyone except autograd has to see every call at the moment."""
    return (
        torch.compiler.is_compiling()  # first, because a compiler cannot trace the others
        or _is_torch_function_mode_enabled()
        or _len_torch_dispatch_stack() != 0
        or _dispatch_tls_is_dispatch_key_included(
            _PRE_DISPATCH
        )  # modes of make_fx(pre_dispatch=True), on a separate stack
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _are_plain(given: Sequence[Any]) -> bool:
    """Return whether all tensors among the arguments are plain, so that none needs the dispatcher."""
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
    """Yield the tensors among the arguments, also those in lists and tuples."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif type(each) is list or type(each) is tuple:
            yield from (one for one in each if isinstance(one, Tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Return whether an empty tensor of the same device has the same dispatch keys. The keys are remembered."""
    device_type = tensor.device.type
    if device_type in _DEVICE_TYPES and device_type not in _seen_device_types:
        for inference in (False, True):
            with torch.inference_mode(inference):
                _plain_keys.add(_dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
        _seen_device_types.add(device_type)
    return _dispatch_keys(tensor).raw_repr() in _plain_keys


# ---------------------------------------------------------------------------------------------- what an op registers


def _with_autograd(op: Op, gradient: Gradient) -> Callable:
    """Register the gradient, and return the op with its checks under autograd, for calls that nobody else has to see.

    The dispatcher would take 20 us more, and again in the backward pass (Xeon).
    """

    def setup_context(ctx, inputs, output):
        gradient.save(ctx, op.call_of(inputs))

    name = add_op_namespace_prefix(op.name)
    torch.library.register_autograd(name, gradient.backward, setup_context=setup_context, lib=library)

    def forward(ctx, *inputs):
        output, call = op.try_usual(inputs), inputs
        if output is None:
            call = op.checked(inputs)
            output = op.run(call)
        gradient.save(ctx, op.call_of(call))
        return output

    def flat(ctx, *grads):  # a list of tensors is no tensor to an autograd.Function
        return tuple(None if type(grad) is list else grad for grad in gradient.backward(ctx, *grads))

    has_list = any("List[Tensor]" in str(a.type) for a in getattr(ops, op.name).default._schema.arguments)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(flat if has_list else gradient.backward)}
    function: type[torch.autograd.Function] = type(f"{ops.name}_{op.name}", (torch.autograd.Function,), methods)
    # Skips what Function.apply does for torch.func, which never sees such a call. That saves 2 us.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _refuse_second_derivative(op: Op) -> None:
    """Make it an error to differentiate an op that is a gradient itself. It would be a silent zero otherwise."""
    name = add_op_namespace_prefix(op.name)

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{name} has no second derivative, as the mask's gradient is straight-through: "
            "leave out create_graph=True, or detach() its gradients"
        )

    torch.library.register_autograd(name, backward, lib=library)


def _autocast(op: Op, casts: Sequence[int]) -> None:
    """Register autocast for the arguments at ``casts``. torch.library.register_autocast would cast scores too."""
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
