"""Make an nn.Linear on given parameters, and a copy of a module without its parameters: a shell.

A shell is kept while other modules compute with the parameters, which are put back into a copy in the end.
"""

from typing import Any

from torch import nn


def linear_on(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return an nn.Linear on these parameters, (N, K) and (N,), without a copy."""
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def copy_without(module: nn.Module, *names: str) -> nn.Module:
    """Return a copy of module, with its class and settings, but with None for the parameters or modules ``names``.

    Everything else is shared, and module does not change.
    """
    shell = _copied(module)
    for name in names:
        (shell._modules if name in shell._modules else shell._parameters)[name] = None
    return shell


def filled(shell: nn.Module, **parts: nn.Parameter | nn.Module | None) -> nn.Module:
    """Return a copy of shell with these parameters and modules."""
    module = _copied(shell)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _copied(module: nn.Module) -> nn.Module:
    """Return a shallow copy. copy.copy would use the way that a class defines for pickling."""
    copied: Any = object.__new__(type(module))
    vars(copied).update(vars(module))
    for registry in ("_parameters", "_buffers", "_modules"):
        vars(copied)[registry] = dict(getattr(module, registry))
    return copied
