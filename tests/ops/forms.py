"""The kernels of a backend as a test of an op sees them, and the forms that products have on this machine."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from by_name import ByName
from guarded import guarded_allocation
from products import INTERPRETING, Operands, assert_equals_reference, by_card

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

INSTRUCTION_SETS = ("cpu-amx", "cpu-amx_emulated", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-portable")
#: Of other packages; docs/how-to/adding-a-kernel.md.
OTHERS = tuple(os.environ.get("MFT_TEST_BACKENDS", "").split())

FORMS = (*INSTRUCTION_SETS, "triton-a_card", "cuda", *OTHERS)
#: Triton's kernels on one of the cards, another from case to case: the interpreter takes seconds.
every_form = pytest.mark.parametrize("kernels", FORMS, indirect=True)
#: On each of the cards.
every_form_and_card = pytest.mark.parametrize(
    "kernels", [*INSTRUCTION_SETS, *by_card("triton-"), "cuda", *OTHERS], indirect=True
)
#: Also by Hopper's own kernel, which takes rows of a few lengths alone: kernels.columns.
every_form_and_hopper = pytest.mark.parametrize("kernels", [*FORMS, "cuda-sm_90"], indirect=True)


@dataclass(frozen=True)
class Kernels:
    """The ops of one backend by name, unchecked, in the arguments of the reference: kernels.masked_linear(x, ...)."""

    name: str  # "cpu", "triton", "cuda", or a backend of MFT_TEST_BACKENDS
    ops: Any
    device: torch.device = CPU
    dtypes: tuple[torch.dtype, ...] = DTYPES  # which it takes for activations and weight
    any_strides: bool = True  # False: unit strides of columns, bias and words, as its bindings make them
    columns: int = 40  # in_features that it takes in this form
    how: Mapping[str, Any] = field(default_factory=dict)  # named arguments of each product
    has_gradients: bool = True  # False: it makes d_scores and d_weight as another of its ways does

    def __getattr__(self, op: str) -> Callable:
        if not hasattr(self.ops, op) and hasattr(ByName, op):
            pytest.skip(f"{self.name} has no {op}")
        function = getattr(self.ops, op)
        return partial(function, **self.how) if self.how and op in _PRODUCTS else function

    def need(self, *dtypes: torch.dtype) -> None:
        """Skip the test if the backend refuses activations and weights of one of them."""
        if refused := set(dtypes).difference(self.dtypes):
            pytest.skip(f"{self.name} takes no {', '.join(map(str, refused))}")

    @property
    def interpreted(self) -> bool:
        """Whether a launch takes up to a tenth of a second."""
        return self.name == "triton" and INTERPRETING

    def fewer(self, cases: Sequence, every: int) -> Sequence:
        """The cases; in the interpreter the first and every so many after it."""
        return cases[::every] if self.interpreted else cases

    def ways(self) -> Iterator["Kernels"]:
        """Itself in each way that it has to a product, one after the other."""
        yield self

    def disturb(self, seed: int) -> None:
        """From here on what may differ from call to call does, where the backend allows it."""

    def guarded_outputs(self, *, at_end: bool) -> AbstractContextManager:
        """Within the context, results end (or begin) at a page that may not be touched, where the backend allows it."""
        return nullcontext()


def assert_every_way_equals_the_reference(kernels: Kernels, o: Operands, *, gradients: bool = True) -> None:
    """Every product on ``o``, on the device of the kernels and in each of their ways."""
    for way in kernels.ways():
        assert_equals_reference(way, o, gradients=gradients and way.has_gradients)


_PRODUCTS = ("masked_linear", "masked_linear_backward", "masked_linear_packed", "masked_linear_packed_backward")


@dataclass(frozen=True)
class OnInstructionSet(Kernels):
    """The cpu backend, whose paths are its ways."""

    take_path: Callable[[str], None] = lambda path: None

    def ways(self) -> Iterator[Kernels]:
        for path in ("fused", "few", "slabs"):
            self.take_path(path)
            yield self


@dataclass(frozen=True)
class OnCard(Kernels):
    """Triton's kernels; their other way is a pass into scratch memory."""

    def ways(self) -> Iterator[Kernels]:
        from mft_kernels.backends.triton import ops

        yield self
        yield replace(self, how={"choose": ops.always_scratch}, has_gradients=False)

    def guarded_outputs(self, *, at_end: bool) -> AbstractContextManager:
        return guarded_allocation(at_end) if INTERPRETING else nullcontext()


@dataclass(frozen=True)
class Emulated(Kernels):
    """CUDA's kernels on the host: the general one, and what else a card takes in its place."""

    emulated: ModuleType = None
    arches: tuple[str, ...] = ("general", "sm_80")  # sm_80 gives few tokens to decode_sm80

    def ways(self) -> Iterator[Kernels]:
        for arch in self.arches:
            yield replace(self, how={"arch": arch}, has_gradients=arch == "general")

    def disturb(self, seed: int) -> None:
        settings = self.emulated.ASYNCHRONIES[seed % 3], self.emulated.SCHEDULES[seed % 2]
        self.emulated.set_settings(1 + seed, *settings)

    def of_hopper(self) -> "Emulated":
        """Its own product wherever it takes the operands: rows of whole chunks of 16 bytes, of words too."""
        return replace(self, columns=128, arches=("hopper",))

    def guarded_outputs(self, *, at_end: bool) -> AbstractContextManager:
        return self.emulated.outputs_at_guard_pages(at_end=at_end)
