"""Modules by their parameters: an nn.Linear on given ones, and a module without its own.

The latter is kept while other modules compute with its parameters, to give them back in the end.
"""

from typing import Any

from torch import nn


def linear_on(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """An nn.Linear on these very parameters, (N, K) and (N,)."""
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def without(module: nn.Module, *names: str) -> nn.Module:
    """A copy of module, of its class and settings, with None for the parameters or modules of these names.

    All else is shared, and module stays as it is.
    """
    shell = _copied(module)
    for name in names:
        (shell._modules if name in shell._modules else shell._parameters)[name] = None
    return shell


def filled(shell: nn.Module, **parts: nn.Parameter | nn.Module | None) -> nn.Module:
    """A copy of shell with these parameters and modules."""
    module = _copied(shell)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _copied(module: nn.Module) -> nn.Module:
    """Not by copy.copy, which asks classes how they want to be pickled."""
    copied: Any = object.__new__(type(module))
    vars(copied).update(vars(module))
    for registry in ("_parameters", "_buffers", "_modules"):
        vars(copied)[registry] = dict(getattr(module, registry))
    return copied
