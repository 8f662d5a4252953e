"""How an op is defined: schema, fake, one implementation for every device, autocast."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..reference.linear import Gradients

library = torch.library.Library(ops.name, "DEF")

#: Says of tensors that a kernel has written into them, through pointers; scores.py takes the name in torch's own place.
increment_version = torch.autograd.graph.increment_version


def define(schema: str, fake: Callable, implementation: Callable) -> None:
    """Add an op: one implementation for every device, which asks the table, and its fake for tracing.

    No argument of a schema has a default: the dispatcher drops trailing arguments that equal theirs, and
    needs_input_grad would lose their places.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=library)


def define_autocast(name: str, casts: tuple[int, ...]) -> None:
    """Autocast that casts the arguments at the positions ``casts`` and leaves the others, scores above all, alone.

    torch.library.register_autocast would cast every floating argument.
    """
    op = getattr(ops, name).default

    def autocast_for(device_type: str, key: torch._C.DispatchKey) -> Callable:
        def kernel(*arguments):
            args = list(arguments)
            dtype = torch.get_autocast_dtype(device_type)
            for i in casts:
                if args[i] is not None and args[i].is_floating_point() and args[i].dtype != torch.float64:
                    args[i] = args[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*args)

        return kernel

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(name, autocast_for(device_type, getattr(torch._C.DispatchKey, key)), key)


def define_autograd(name: str, implementation: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """Autograd of an op, as torch.library.register_autograd takes it.

    Returns: the op for a call that nobody but autograd has to see, see is_direct_but_for_autograd, from
    implementation's arguments: 20 us sooner there and again in the backward pass than by way of the dispatcher (Xeon).
    """
    torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=setup_context, lib=library)

    def forward(ctx, *inputs):
        output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def flat_backward(ctx, *grads):  # what is a list of tensors to an op is no tensor to a function
        return tuple(None if type(grad) is list else grad for grad in backward(ctx, *grads))

    has_list = any("List[Tensor]" in str(a.type) for a in getattr(ops, name).default._schema.arguments)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward if has_list else backward)}
    differentiable: type[torch.autograd.Function] = type(f"{ops.name}_{name}", (torch.autograd.Function,), methods)
    # Past what Function.apply does for torch.func, which does not see such a call: 2 us.
    apply = super(torch.autograd.Function, differentiable).apply  # type: ignore[misc]

    def call(*inputs):
        asked = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        return (apply if asked else implementation)(*inputs)

    return call


def define_no_double_backward(name: str) -> None:
    """Make a second derivative an error instead of a silent zero."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{add_op_namespace_prefix(name)} has no second derivative, as the mask's gradient is straight-through: "
            "leave out create_graph=True, or detach() its gradients"
        )

    torch.library.register_autograd(add_op_namespace_prefix(name), backward, lib=library)


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


def gradient_shapes(
    output_mask: list[bool],
    grad_output: Tensor,
    x_shape: Sequence[int],
    weight: Tensor,
    score_dtype: torch.dtype,
    bias_shape: Sequence[int] | None = None,
) -> Gradients:
    """Fakes of (d_x, d_weight, d_scores, d_bias), (0,) where not wanted; bias_shape: (N,) unless given."""
    wanted = (
        (x_shape, grad_output.dtype),
        (weight.shape, weight.dtype),
        (weight.shape, score_dtype),
        (weight.shape[:1] if bias_shape is None else bias_shape, grad_output.dtype),
    )
    empty = [
        grad_output.new_empty(shape, dtype=dtype) if wants else grad_output.new_empty(0)
        for wants, (shape, dtype) in zip(output_mask, wanted)
    ]
    return empty[0], empty[1], empty[2], empty[3]
