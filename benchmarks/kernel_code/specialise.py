"""The identity of a kernel's binary: what Triton specialises on, as a text that is the same in all its versions."""

from collections.abc import Sequence
from typing import Any

import torch


def specialisation(argument: Any, specialised: bool) -> str:
    """Return an argument's part of the identity: its type, with "/16" if it is a multiple of 16.

    "1" and "none" are compiled into the kernel. ``specialised``: whether the kernel distinguishes integers that are 1
    or a multiple of 16; see do_not_specialize.
    """
    if argument is None:
        return "none"
    if isinstance(argument, torch.Tensor):
        return f"*{_name(argument.dtype)}{_divisibility(argument.data_ptr())}"
    if isinstance(argument, tuple):
        return f"({', '.join(specialisation(each, specialised) for each in argument)})"
    if isinstance(argument, int):
        wide = "i32" if -(2**31) <= argument < 2**31 else "i64"
        if not specialised:
            return wide
        return "1" if argument == 1 else f"{wide}{_divisibility(argument)}"
    if isinstance(argument, float):
        return "fp32"
    return f"{_name(argument.base.dtype)}{list(argument.block_shape)}"  # a descriptor


def identity(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> str:
    """Return a launch's identity: kernel, arguments, constexprs, warps and registers. Equal ones run one binary."""
    parts = [specialisation(a, not p.do_not_specialize) for a, p in zip(args, kernel.params)]
    parts += [f"{name}={options[name]}" for name in sorted(options)]
    return f"{kernel.__name__}({', '.join(parts)})"


def _divisibility(number: int) -> str:
    return "" if number % 16 else "/16"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
