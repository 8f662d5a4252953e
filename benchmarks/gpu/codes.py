"""The products over NF4 and int8 codes: checks in every bit, and forward and d_x timed.

fused, cuda   the kernels, which decode where they mask
decoded       the whole weight decoded by torch, then the fused product: what a layer does without such a kernel
cuBLAS        on a dense bf16 weight, unmasked: four and two times the bytes of the codes

Codes are drawn at random, which changes no time.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from mft_kernels.reference.quantized import NESTED_BLOCK, NF4_BLOCK
from torch import Tensor
from torch.nn import functional as F

from mft_kernels import reference
from mft_kernels.reference import quantized as reference_quantized
from mft_kernels.testing import Inputs

from ..harness import Spread
from .cases import CUDA, DENSE, FUSED, Case
from .competitors import Inputs as Rotated
from .competitors import Operands, difference, tolerance
from .device import Device
from .equality import Check, assert_equal
from .kernels import kernels
from .timing import FAILURES, add_floors, reason, time_calls

NESTED = "nested nf4"
DECODED = "decoded, then fused"
#: -1, 0 and 1 among the levels of NF4.
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
        """As the ops take them."""
        return self.codes, self.absmax

    @property
    def tail(self) -> tuple[list[int], str]:
        """Shape and levels, as the ops take them."""
        return list(self.shape), "int8" if self.kind == "int8" else "nf4"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + sum(scale.nbytes for scale in self.absmax)

    def clone(self) -> "Codes":
        """Apart in memory."""
        return Codes(self.kind, self.shape, self.codes.clone(), [scale.clone() for scale in self.absmax])


def drawn(kind: str, n: int, k: int, device: torch.device, *, whole: bool = False) -> Codes:
    """At random; ``whole``: of integers from -2 to 2, so that sums are exact."""
    generator, blocks = torch.Generator(device).manual_seed(0), -(-n * k // NF4_BLOCK)

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


# ---------------------------------------------------------------------------------------------- checks


def code_checks(label: str, t: Inputs, threshold: Tensor, by: SimpleNamespace, mode: str) -> Iterator[Check]:
    """Forward and d_x over each kind of codes, with a mask and without; inputs are small integers."""
    packed, (n, k) = reference.pack_mask(t.scores, threshold, mode), t.weight.shape
    for kind in ("nf4", NESTED, "int8"):
        of = drawn(kind, n, k, t.weight.device, whole=True)
        for mask in (packed, None):
            calls = {
                "masked_linear_quantized": (t.x, *of.given, mask, t.bias, *of.tail),
                "masked_linear_quantized_d_x": (t.grad_output, *of.given, mask, *of.tail),
            }
            for op, arguments in calls.items():
                # In fp32 every sum is exact; the one rounding is that of the kernels' own last step.
                wide = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments]
                run = functools.partial(getattr(by, op), *arguments)
                expect = functools.partial(getattr(reference_quantized, op), *wide)
                yield (
                    f"{op}, {kind}{'' if mask is not None else ', all kept'}, {label}",
                    functools.partial(assert_equal, run, expect),
                )


# ---------------------------------------------------------------------------------------------- times


def time_codes(case: Case, inputs: Rotated, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """samples and failures of case.detail: a kind of codes and a product, of cases.CODES."""
    device.tidy()
    kind, product = case.detail.split(", ")
    forward, operands = product == "forward", inputs.get(case.n, case.k, case.m)
    one = drawn(kind, case.n, case.k, device.torch_device)
    copies = [one, *(one.clone() for _ in range(max(len(operands), -(-4 * device.l2_bytes // one.nbytes)) - 1))]
    runs = {name: _run(name, forward) for name in (DENSE, FUSED, CUDA, DECODED) if name not in device.without}
    dense = reference_quantized.dequantize(*one.given, *one.tail, torch.bfloat16)
    kept = torch.where(reference.unpack_mask(operands[0].packed, one.shape), dense, 0)
    expected = F.linear(operands[0].x, kept) if forward else operands[0].grad @ kept
    calls: dict[str, Callable[[int], object]] = {}
    failures: dict[str, str] = {}
    for name, run in runs.items():
        most = tolerance(name)
        try:
            apart = 0.0 if most is None else difference(run(operands[0], one), expected)
        except FAILURES as error:
            failures[name] = reason(error, device)
            continue
        if most is not None and apart > most:
            failures[name] = f"wrong: {apart:.3g} from the eager form, at most {most:g}"
            continue
        calls[name] = functools.partial(_on_copy, run, operands, copies)
    samples, failed = time_calls(calls, len(copies), device, not_captured=frozenset({DECODED}))
    tokens = 2.0 * case.m * (case.n + case.k)
    for name, sample in samples.items():
        weight = 2.0 * case.n * case.k if name == DENSE else one.nbytes + case.n * case.k / 8
        add_floors(sample, [(weight + tokens, 2.0 * case.m * case.n * case.k)], ceilings)
        if DENSE in samples:
            shares = [100 * d / t for d, t in zip(samples[DENSE]["rounds_ms"], sample["rounds_ms"])]
            sample["percent_of_cublas"] = asdict(Spread.of(shares))
    left_out = {name: why for name, why in device.without.items() if name == CUDA}
    return {"copies": len(copies), "samples": samples, "failures": {**failures, **failed}, "left_out": left_out}


def _run(name: str, forward: bool) -> Callable[[Operands, Codes], Tensor]:
    if name == DENSE:
        return lambda o, _: F.linear(o.x, o.weight) if forward else o.grad @ o.weight
    by = kernels(CUDA if name == CUDA else FUSED)
    if name == DECODED:
        return lambda o, of: _decoded(o, reference_quantized.dequantize(*of.given, *of.tail, o.x.dtype), forward)
    if forward:
        return lambda o, of: by.masked_linear_quantized(o.x, *of.given, o.packed, None, *of.tail)
    return lambda o, of: by.masked_linear_quantized_d_x(o.grad, *of.given, o.packed, *of.tail)


def _decoded(o: Operands, weight: Tensor, forward: bool) -> Tensor:
    by = kernels(FUSED)
    if forward:
        return by.masked_linear_packed(o.x, weight, o.packed, None)
    wanted = [True, False, False, False]
    return by.masked_linear_packed_backward(o.grad, o.x, weight, o.packed, None, None, "value", wanted)[0]


def _on_copy(run: Callable[[Operands, Codes], Tensor], operands: list[Operands], copies: list[Codes], i: int) -> Tensor:
    return run(operands[i % len(operands)], copies[i])
