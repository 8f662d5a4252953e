"""The products over experts: bit-for-bit checks, and timings of forward, d_x and d_scores.

fused    Triton's kernels by scores, and by packed masks
cuBLAS   torch's grouped_mm on the unmasked weight, whatever it runs; for d_scores without the factor

Rows are distributed unevenly, and some experts have few or none.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_kernels import reference

from ..rivals import KEEP_RATIO
from .cases import DENSE, EXPERTS, FUSED, PACKED, Case
from .device import Device
from .equality import EVERYTHING, REFERENCE, Call, Check, equal, name_of, named, results, thresholds_check
from .operands import MODE
from .timing import Bench, Competitor

_D_SCORES = [False, False, True, False]
#: Rows per expert in the checks: none at the ends and between, one, a tile's edge, more than one tile; then rows that
#: belong to no expert.
ROWS, NOBODYS = (0, 1, 7, 0, 130, 64, 0), 3
#: The same with more rows on average.
MANY_ROWS = (0, 1, 259, 0, 640, 128, 300)
_DRY_EXPERTS = 5


@dataclass(frozen=True)
class Experts:
    """x (T, K), grad (T, N), weight and scores (E, N, K), thresholds and offsets (E,); packed and signs as bits."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    scores: Tensor
    threshold: Tensor
    offsets: Tensor

    @functools.cached_property
    def packed(self) -> Tensor:
        return torch.stack([reference.pack_mask(s, t, MODE) for s, t in zip(self.scores, self.threshold.unbind())])

    @functools.cached_property
    def signs(self) -> Tensor:
        return torch.stack([reference.pack_signs(each)[0] for each in self.scores])

    def product(self, *, packed: bool, transposed: bool) -> Call:
        """Return the op and its arguments for x's product, or grad's product with the transposed weight."""
        given, tail = self.grad if transposed else self.x, (self.offsets, None, transposed)
        if packed:
            return "masked_linear_grouped_packed", "bits", (given, self.weight, self.packed, *tail)
        return "masked_linear_grouped", "scores", (given, self.weight, self.scores, self.threshold, *tail, MODE)

    def gradients(self, wanted: list[bool]) -> Call:
        """Return the op and its arguments for the gradients of the product by scores."""
        by = (self.grad, self.x, self.weight, self.scores, self.threshold, self.offsets, False, MODE, wanted)
        return "masked_linear_grouped_backward", "scores", by


def expert_checks(label: str, n: int, k: int, dtype: torch.dtype, backend: str, on: torch.device) -> Iterator[Check]:
    """Yield checks on small integers: both directions by scores and bits, gradients, sums by source, thresholds."""
    for scores_dtype, rows in itertools.product((dtype, torch.float32), (ROWS, MANY_ROWS)):
        t = _integers(n, k, dtype, scores_dtype, rows, on)
        name = named(label, name_of(dtype), f"scores {name_of(scores_dtype)}", "many rows" if rows is MANY_ROWS else "")
        calls = [t.product(packed=packed, transposed=way) for way in (False, True) for packed in (False, True)]
        by_bits = (t.grad, t.x, t.weight, t.packed, t.scores, t.signs, t.offsets, False, MODE, EVERYTHING)
        calls += [t.gradients(EVERYTHING), ("masked_linear_grouped_packed_backward", "bits", by_bits)]
        out = torch.ones_like(t.weight, dtype=scores_dtype)
        for how, factors in {
            "bits": (t.weight, None, t.signs),
            "scores": (t.weight, t.scores, None),
            "no weight": (None, None, None),
        }.items():
            added = (out, t.grad, t.x, t.offsets, *factors, False, MODE)
            calls.append(("accumulate_score_grad_grouped", how, added))
        yield from equal(backend, name, calls, poison=True)
        yield thresholds_check(name, t.scores, backend)


def _integers(
    n: int, k: int, dtype: torch.dtype, scores_dtype: torch.dtype, rows: tuple[int, ...], on: torch.device
) -> Experts:
    generator, total, count = torch.Generator(on).manual_seed(0), sum(rows) + NOBODYS, len(rows)

    def values(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator, device=on).float()

    weight, scores = values(2, count, n, k).to(dtype), values(3, count, n, k)
    scores[scores == 0] = 1  # a zero has no sign bit
    offsets = torch.tensor(rows, device=on).cumsum(0).int()
    return Experts(
        values(1, total, k).to(dtype),
        values(1, total, n).to(dtype),
        weight,
        scores.to(scores_dtype),
        (torch.arange(count, device=on) % 4).to(scores_dtype),
        offsets,
    )


def time_experts(case: Case, bench: Bench) -> dict[str, Any]:
    """Time one case; case.detail is one of cases.OVER_EXPERTS, case.m the number of rows."""
    t = drawn(case, bench.device)
    expected = _ours(case.detail, t, REFERENCE, packed=False)(0)
    found = {DENSE: Competitor(_dense(case.detail, t), phases=[_work(case, t, DENSE)])}
    for name in (FUSED,) if case.detail == "d_scores" else (FUSED, PACKED):
        run = _ours(case.detail, t, bench.device.backends[FUSED], packed=name == PACKED)
        found[name] = Competitor(run, expected, phases=[_work(case, t, name)])
    return bench.compare(found, 1, with_cuda=False)  # one copy is already larger than L2


def drawn(case: Case, device: Device) -> Experts:
    """Return random bf16 values and an uneven distribution of rows; every row belongs to an expert."""
    count, on = _DRY_EXPERTS if device.dry else EXPERTS, device.torch_device
    generator = torch.Generator(on).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=on).to(torch.bfloat16)

    likely = torch.rand(count, generator=generator, device=on).square() + 0.02
    drawn_by = torch.multinomial(likely, case.m, replacement=True, generator=generator)
    weight, scores = 0.02 * normal(count, case.n, case.k), 0.02 * normal(count, case.n, case.k)
    keys = scores[0].abs().flatten().sort().values
    threshold = keys[int((1 - KEEP_RATIO) * keys.numel())].expand(count).contiguous()
    offsets = torch.bincount(drawn_by, minlength=count).cumsum(0).int()
    return Experts(normal(case.m, case.k), normal(case.m, case.n), weight, scores, threshold, offsets)


def _dense(product: str, t: Experts) -> Callable[[int], Tensor]:
    return {
        "forward": lambda copy: F.grouped_mm(t.x, t.weight.mT, offs=t.offsets),
        "d_x": lambda copy: F.grouped_mm(t.grad, t.weight, offs=t.offsets),
        "d_scores": lambda copy: F.grouped_mm(t.grad.T, t.x, offs=t.offsets),
    }[product]


def _ours(product: str, t: Experts, backend: str, *, packed: bool) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function that makes only the result asked for, in a tuple. Its argument is not used."""
    if product == "d_scores":
        name, _, arguments = t.gradients(_D_SCORES)
        return lambda copy: results(name, backend, arguments)[2:3]
    name, _, arguments = t.product(packed=packed, transposed=product == "d_x")
    return lambda copy: results(name, backend, arguments)


def _work(case: Case, t: Experts, name: str) -> tuple[float, float]:
    """Return (bytes, floating-point operations). Experts without rows count only their zeros."""
    rows = t.offsets.diff(prepend=t.offsets.new_zeros(1))
    elements, every = float((rows > 0).sum().item() * case.n * case.k), float(t.weight.numel())
    tokens, keep = 2.0 * case.m * (case.n + case.k), {DENSE: 0.0, PACKED: 1 / 8}.get(name, 2.0)
    moved = elements * (2 + keep)
    if case.detail == "d_scores":
        moved = 2 * every + (0.0 if name == DENSE else 4 * elements)
    return moved + tokens, 2.0 * case.m * case.n * case.k
