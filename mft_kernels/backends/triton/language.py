"""Triton where it is installed; else as much as naming its kernels takes, whose cubins are launched without it."""

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
        """What a constexpr is annotated with."""

    @dataclass(frozen=True)
    class Parameter:
        """Of a kernel. Unless ``do_not_specialize``, an integer's 1 and multiples of 16 have binaries of their own."""

        name: str
        do_not_specialize: bool

    class Kernel:
        """Of a function of Triton's language, which nothing here reads, its name and parameters."""

        def __init__(self, function: Callable, do_not_specialize: Sequence[str] = ()) -> None:
            self.__name__ = function.__name__
            names = list(inspect.signature(function).parameters)
            self.params = [Parameter(name, name in do_not_specialize) for name in names]

    class triton:  # type: ignore[no-redef]
        """What launchers and decorators ask of the module."""

        @staticmethod
        def jit(function: Callable | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
            if function is not None:
                return Kernel(function)
            return lambda function: Kernel(function, do_not_specialize)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    class tl:  # type: ignore[no-redef]
        """What the kernels' signatures ask of the language."""

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
