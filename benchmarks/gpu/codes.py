"""The products over NF4 and int8 codes: calls that are checked bit for bit, and timings of forward and d_x.

fused     Triton's kernels, which decode while they mask
decoded   torch decodes the whole weight, then the fused product: what a layer does without such a kernel
cuBLAS    on a dense bf16 weight, unmasked: four and two times the bytes of the codes

Codes are random, which does not change the times.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_kernels import dequantize, reference
from mft_kernels.codes import NESTED_BLOCK, Nf4
from mft_kernels.testing import Inputs

from .cases import DENSE, FUSED, Case
from .device import GRAPH, QUEUED
from .equality import REFERENCE, Call
from .operands import MODE, Operands
from .timing import Bench, Competitor

NESTED = "nested nf4"
DECODED = "decoded, then fused"
#: Codes of -1, 0 and 1 among the levels of NF4.
_WHOLE = (0, 7, 15)


@dataclass(frozen=True)
class Codes:
    """An (N, K) weight in codes: "nf4", NESTED (whose absmax are codes too) or "int8"."""

    kind: str
    shape: tuple[int, int]
    codes: Tensor
    absmax: list[Tensor]

    @property
    def given(self) -> tuple[Tensor, list[Tensor]]:
        """Codes and absmax as arguments of the ops."""
        return self.codes, self.absmax

    @property
    def tail(self) -> tuple[list[int], str]:
        """Shape and levels as arguments of the ops."""
        return list(self.shape), "int8" if self.kind == "int8" else "nf4"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + sum(scale.nbytes for scale in self.absmax)

    def clone(self) -> "Codes":
        """Return a copy in separate memory."""
        return Codes(self.kind, self.shape, self.codes.clone(), [scale.clone() for scale in self.absmax])

    def dense(self) -> Tensor:
        """Return the weight decoded by the reference, in bf16."""
        shape, kind = self.tail
        return dequantize(*self.given, shape=shape, kind=kind, dtype=torch.bfloat16, backend=REFERENCE)


def drawn(kind: str, n: int, k: int, device: torch.device, *, whole: bool = False) -> Codes:
    """Return random codes; ``whole``: of integers from -2 to 2, so that sums are exact."""
    generator, blocks = torch.Generator(device).manual_seed(0), -(-n * k // Nf4.block)

    def draw(low: int, end: int, *shape: int) -> Tensor:
        return torch.randint(low, end, shape, generator=generator, device=device)

    if kind == "int8":
        codes = draw(-2, 3, n, k) if whole else draw(-127, 128, n, k)
        return Codes(kind, (n, k), codes.to(torch.int8), [torch.full((n,), 127.0 if whole else 0.05, device=device)])
    levels = torch.tensor(_WHOLE if whole else range(16), device=device)
    both = [levels[draw(0, len(levels), -(-n * k // 2))] for _ in range(2)]
    codes, scale = (both[0] * 16 + both[1]).to(torch.uint8), 1.0 if whole else 0.05
    if kind != NESTED:
        return Codes(kind, (n, k), codes, [scale * draw(1, 3, blocks)])
    of_absmax = draw(0, 256, blocks).to(torch.uint8)
    known = scale * (1.0 + torch.arange(256, device=device) % 2)
    nested = torch.ones(-(-blocks // NESTED_BLOCK), device=device)
    return Codes(kind, (n, k), codes, [of_absmax, nested, known, torch.zeros((), device=device)])


def code_calls(t: Inputs, threshold: Tensor) -> Iterator[Call]:
    """Yield forward and d_x over each kind of codes, with and without a mask."""
    packed, (n, k) = reference.pack_mask(t.scores, threshold, MODE), t.weight.shape
    for kind in ("nf4", NESTED, "int8"):
        of = drawn(kind, n, k, t.weight.device, whole=True)
        for mask, kept in ((packed, ""), (None, ", all kept")):
            yield "masked_linear_quantized", kind + kept, (t.x, *of.given, mask, t.bias, *of.tail)
            yield "masked_linear_quantized_d_x", kind + kept, (t.grad_output, *of.given, mask, *of.tail)


def time_codes(case: Case, bench: Bench) -> dict[str, Any]:
    """Time one case; case.detail is a kind of codes and a product, one of cases.CODES."""
    kind, product = case.detail.split(", ")
    operands = bench.inputs.get(case.n, case.k, case.m)
    one = drawn(kind, case.n, case.k, bench.device.torch_device)
    copies = [one, *(one.clone() for _ in range(max(len(operands), bench.inputs.copies(one.nbytes)) - 1))]
    first = operands[0]
    kept = torch.where(reference.unpack_mask(first.packed, one.shape), one.dense(), 0)
    expected = F.linear(first.x, kept) if product == "forward" else first.grad @ kept
    tokens, operations = 2.0 * case.m * (case.n + case.k), 2.0 * case.m * case.n * case.k

    def run(name: str, i: int) -> Tensor:
        return _product(name, product, operands[i % len(operands)], copies[i], bench)

    def competitor(name: str) -> Competitor:
        weight = 2.0 * case.n * case.k if name == DENSE else one.nbytes + case.n * case.k / 8
        return Competitor(
            functools.partial(run, name),
            None if name == DENSE else expected,
            phases=[(weight + tokens, operations)],
            how=QUEUED if name == DECODED else GRAPH,
        )

    return bench.compare({name: competitor(name) for name in (DENSE, FUSED, DECODED)}, len(copies), with_cuda=False)


def _product(name: str, product: str, o: Operands, of: Codes, bench: Bench) -> Tensor:
    forward, backend = product == "forward", bench.device.backends[FUSED]
    if name == DENSE:
        return F.linear(o.x, o.weight) if forward else o.grad @ o.weight
    if name == DECODED:
        weight = of.dense()
        if forward:
            return torch.ops.mft.masked_linear_packed(o.x, weight, o.packed, None, backend)
        rest = (o.packed, None, None, "value", [True, False, False, False], backend)
        return torch.ops.mft.masked_linear_packed_backward(o.grad, o.x, weight, *rest)[0]
    if forward:
        return torch.ops.mft.masked_linear_quantized(o.x, *of.given, o.packed, None, *of.tail, backend)
    return torch.ops.mft.masked_linear_quantized_d_x(o.grad, *of.given, o.packed, *of.tail, backend)
