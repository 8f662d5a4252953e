"""Triton if it is installed; otherwise only what names its kernels, so that cubins can be launched without it."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

INSTALLED = importlib.util.find_spec("triton") is not None

if INSTALLED:
    import triton as triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
else:

    class Constexpr:
        """The annotation of a constexpr parameter."""

    @dataclass(frozen=True)
    class Parameter:
        """A kernel's parameter.

        Unless ``do_not_specialize``, integers that are 1 or a multiple of 16 have binaries of their own.
        """

        name: str
        do_not_specialize: bool

    class Kernel:
        """The name and parameters of a function in Triton's language, whose body is never read."""

        def __init__(self, function: Callable, do_not_specialize: Sequence[str] = ()) -> None:
            self.__name__ = function.__name__
            names = list(inspect.signature(function).parameters)
            self.params = [Parameter(name, name in do_not_specialize) for name in names]

    class triton:  # type: ignore[no-redef]
        """The part of the module that launchers and decorators use."""

        @staticmethod
        def jit(function: Callable | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
            if function is not None:
                return Kernel(function)
            return lambda function: Kernel(function, do_not_specialize)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    class tl:  # type: ignore[no-redef]
        """The part of the language that the kernels' signatures use."""

        constexpr = Constexpr

    @dataclass(frozen=True)
    class TensorDescriptor:  # type: ignore[no-redef]
        """A matrix that is read in tiles of ``block_shape``."""

        base: Any
        shape: Sequence[int]
        strides: Sequence[int]
        block_shape: Sequence[int]

        @staticmethod
        def from_tensor(tensor: Any, block_shape: Sequence[int]) -> "TensorDescriptor":
            return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block_shape)
