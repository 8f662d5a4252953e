"""A backend's kernels as a test of an op sees them, and the forms that products have on this machine."""

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
#: Backends of other packages: docs/how-to/adding-a-kernel.md.
OTHERS = tuple(os.environ.get("MFT_TEST_BACKENDS", "").split())

FORMS = (*INSTRUCTION_SETS, "triton-a_card", "cuda", *OTHERS)
#: Triton's kernels in the form of one card, which changes from case to case: the interpreter takes seconds.
every_form = pytest.mark.parametrize("kernels", FORMS, indirect=True)
#: In the form of each card.
every_form_and_card = pytest.mark.parametrize(
    "kernels", [*INSTRUCTION_SETS, *by_card("triton-"), "cuda", *OTHERS], indirect=True
)
#: Also with Hopper's own kernel, which takes only rows of certain lengths: kernels.columns.
every_form_and_hopper = pytest.mark.parametrize("kernels", [*FORMS, "cuda-sm_90"], indirect=True)
#: For the ops that cuda leaves to Triton.
every_backend_but_cuda = pytest.mark.parametrize("kernels", [*INSTRUCTION_SETS, "triton", *OTHERS], indirect=True)


@dataclass(frozen=True)
class Kernels:
    """The ops of one backend by name, unchecked, with the reference's arguments: kernels.masked_linear(x, ...)."""

    name: str  # "cpu", "triton", "cuda", or a backend of MFT_TEST_BACKENDS
    ops: Any
    device: torch.device = CPU
    dtypes: tuple[torch.dtype, ...] = DTYPES  # for activations and weight
    any_strides: bool = True  # False: columns, bias and words need unit strides; its bindings ensure that
    columns: int = 40  # in_features that this form takes
    how: Mapping[str, Any] = field(default_factory=dict)  # extra arguments of each product
    has_gradients: bool = True  # False: d_scores and d_weight are computed as in another way

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
        """Whether kernels run in the interpreter, where a launch takes up to a tenth of a second."""
        return self.name == "triton" and INTERPRETING

    def fewer(self, cases: Sequence, every: int) -> Sequence:
        """Return the cases; in the interpreter only every ``every``-th, from the first on."""
        return cases[::every] if self.interpreted else cases

    def ways(self) -> Iterator["Kernels"]:
        """Yield the kernels in each of their ways to compute a product, one after another."""
        yield self

    def disturb(self, seed: int) -> None:
        """Make everything vary that may differ from call to call, if the backend allows it."""

    def guarded_outputs(self, *, at_end: bool) -> AbstractContextManager:
        """Within the context, results end (or begin) at a forbidden page, if the backend allows it."""
        return nullcontext()


def assert_every_way_equals_the_reference(kernels: Kernels, o: Operands, *, gradients: bool = True) -> None:
    """Assert every product on ``o``, on the device of the kernels and in each of their ways."""
    for way in kernels.ways():
        assert_equals_reference(way, o, gradients=gradients and way.has_gradients)


_PRODUCTS = ("masked_linear", "masked_linear_backward", "masked_linear_packed", "masked_linear_packed_backward")


@dataclass(frozen=True)
class OnInstructionSet(Kernels):
    """The cpu backend; its ways are its paths."""

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
    """CUDA's kernels on the host: the general one, and the kernels that a card takes instead."""

    emulated: ModuleType = None
    arches: tuple[str, ...] = ("general", "sm_80")  # sm_80 gives few tokens to decode_sm80

    def ways(self) -> Iterator[Kernels]:
        for arch in self.arches:
            yield replace(self, how={"arch": arch}, has_gradients=arch == "general")

    def disturb(self, seed: int) -> None:
        settings = self.emulated.ASYNCHRONIES[seed % 3], self.emulated.SCHEDULES[seed % 2]
        self.emulated.set_settings(1 + seed, *settings)

    def of_hopper(self) -> "Emulated":
        """Return Hopper's own product for the operands that it takes: rows and words in whole 16-byte chunks."""
        return replace(self, columns=128, arches=("hopper",))

    def guarded_outputs(self, *, at_end: bool) -> AbstractContextManager:
        return self.emulated.outputs_at_guard_pages(at_end=at_end)
