"""Whether a call may go straight to its kernel: PyTorch's way through an op in Python takes 20 to 50 us (Xeon).

One token on a small layer is less work than that way, so generation would lose to the dense model for its sake alone.

Three ways lead from a call to its kernel: through the dispatcher, for whoever else has to see the call; straight from
the checks and the table of backends; and, where a backend has one, a short way that does both in C++ and declines a
call that is not the usual one.
"""

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

_DEVICE_TYPES = ("cpu", "cuda")
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch

#: Whom the dispatcher asks on an ordinary tensor's account, as bits: others for fakes, wrappers and lazy negation.
_plain_keys: set[int] = set()
_seen_device_types: set[str] = set()
#: By exact type, as a subclass may have to see a call; scores.py adds its own.
plain_types: set[type] = {Tensor, nn.Parameter}


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether nothing but the kernel has to see a call on these tensors, so that the dispatcher may be left out.

    Others who may have to: autograd, autocast, a compiler or tracer, modes and subclasses, torch.func, forward mode,
    and the profiler, which names the op (and so measures its way too).
    """
    return is_direct_but_for_autograd(*tensors) and not (torch.is_grad_enabled() and _any_requires_grad(*tensors))


def is_direct_but_for_autograd(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd and the kernel has to see a call on these tensors."""
    if _is_watched() or has_torch_function(tensors):
        return False
    for tensor in tensors:
        if tensor is not None and _dispatch_keys(tensor).raw_repr() not in _plain_keys and not _is_plain(tensor):
            return False
    return True


def is_short(*tensors: Tensor, optional: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether the call may go a short way: is_direct, but for what a tensor's keys say, whom the dispatcher asks.

    What must be a tensor and is none is no such call either: the checks say so.
    """
    if _is_watched() or (torch.is_grad_enabled() and _any_requires_grad(*tensors, *optional)):
        return False
    return plain_types.issuperset(map(type, tensors)) and all(t is None or type(t) in plain_types for t in optional)


def _is_watched() -> bool:
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


def _is_plain(tensor: Tensor) -> bool:
    """Whether an empty tensor of the same device has the same keys; remembered."""
    device_type = tensor.device.type
    if device_type in _DEVICE_TYPES and device_type not in _seen_device_types:
        for inference in (False, True):
            with torch.inference_mode(inference):
                _plain_keys.add(_dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
        _seen_device_types.add(device_type)
    return _dispatch_keys(tensor).raw_repr() in _plain_keys
