"""The products over experts: checks in every bit, and forward, d_x and d_scores timed.

fused, cuda   the kernels by scores, and by packed masks; fused where Triton's backend has them
cuBLAS        torch's grouped_mm on the unmasked weight, whatever it runs; of d_scores without the factor

Rows are drawn unevenly, and some experts have few or none. No table takes "auto" to CUDA's kernels (faster_table.py):
which is faster depends on more than the number of rows.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_kernels import reference
from mft_kernels.backends.table import registered
from mft_kernels.reference import grouped as reference_grouped

from ..harness import Spread
from ..rivals import KEEP_RATIO
from .cases import CUDA, DENSE, EXPERTS, FUSED, PACKED, Case
from .competitors import MODE, difference, tolerance
from .device import Device
from .equality import Check, assert_equal, by_sorting, name_of
from .kernels import OVER_EXPERTS, kernels
from .timing import FAILURES, add_floors, reason, time_calls

CUDA_PACKED = f"{CUDA}, packed"
_BY = {FUSED: FUSED, PACKED: FUSED, CUDA: CUDA, CUDA_PACKED: CUDA}
#: Of the checks: none at the ends and between, one, a tile's edge, more than one tile; the last are nobody's.
ROWS, NOBODYS = (0, 1, 7, 0, 130, 64, 0), 3
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

    def keep(self, *, packed: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As the product takes them."""
        return (None, None, self.packed) if packed else (self.scores, self.threshold, None)


# ---------------------------------------------------------------------------------------------- checks


def expert_checks(
    label: str, n: int, k: int, dtype: torch.dtype, by: SimpleNamespace, on: torch.device
) -> Iterator[Check]:
    """Both directions, by scores and by bits, sums of every source, thresholds; inputs are small integers."""
    for scores_dtype in (dtype, torch.float32):
        t = _integers(n, k, dtype, scores_dtype, on)
        name = f"{label}, {name_of(dtype)}, scores {name_of(scores_dtype)}"
        for transposed, given in ((False, t.x), (True, t.grad)):
            for packed in (False, True):
                arguments = (given, t.weight, *t.keep(packed=packed), t.offsets, None, MODE, transposed)
                run = functools.partial(by.grouped_product, *arguments)
                expect = functools.partial(reference_grouped.grouped_product, *map(_wide, arguments))
                how = f"{'bits' if packed else 'scores'}{', transposed' if transposed else ''}"
                yield f"grouped_product, {how}, {name}", functools.partial(assert_equal, run, expect)
        for how, factors in {
            "bits": (t.weight, None, t.signs),
            "scores": (t.weight, t.scores, None),
            "no weight": (None,) * 3,
        }.items():
            for accumulate in (False, True):
                run = functools.partial(_sums, by.grouped_score_grad, t, factors, scores_dtype, accumulate)
                yield f"grouped_score_grad, {how}, {'added, ' * accumulate}{name}", run
        run, expect = (
            functools.partial(by.kept_thresholds, t.scores, 0.9, MODE),
            functools.partial(_thresholds, t.scores),
        )
        yield f"kept_thresholds, {name}", functools.partial(assert_equal, run, expect)


def _integers(n: int, k: int, dtype: torch.dtype, scores_dtype: torch.dtype, on: torch.device) -> Experts:
    generator, total, count = torch.Generator(on).manual_seed(0), sum(ROWS) + NOBODYS, len(ROWS)

    def values(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator, device=on).float()

    weight, scores = values(2, count, n, k).to(dtype), values(3, count, n, k)
    scores[scores == 0] = 1  # a zero has no sign bit
    offsets = torch.tensor(ROWS, device=on).cumsum(0).int()
    return Experts(
        values(1, total, k).to(dtype),
        values(1, total, n).to(dtype),
        weight,
        scores.to(scores_dtype),
        (torch.arange(count, device=on) % 4).to(scores_dtype),
        offsets,
    )


def _thresholds(scores: Tensor) -> Tensor:
    return torch.stack([by_sorting(each, MODE) for each in scores])


def _sums(run: Callable, t: Experts, factors: tuple, dtype: torch.dtype, accumulate: bool) -> None:
    got = torch.full(t.weight.shape, 1.0 if accumulate else torch.nan, dtype=dtype, device=t.x.device)
    expected = got.float()
    run(got, t.grad, t.x, t.offsets, *factors, MODE, accumulate)
    wide = map(_wide, (t.grad, t.x, t.offsets, *factors))
    reference_grouped.grouped_score_grad(expected, *wide, MODE, accumulate)
    assert_equal(lambda: got, lambda: expected)


def _wide(value: Any) -> Any:
    """In fp32 every sum is exact; the one rounding is that of the kernels' own last step."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# ---------------------------------------------------------------------------------------------- times


def time_experts(case: Case, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """samples and failures of case.detail, one of cases.OVER_EXPERTS, of case.m rows."""
    device.tidy()
    t = drawn(case, device)
    left_out = {name: why for name, why in device.without.items() if name == CUDA}
    runs: dict[str, Callable[[], Tensor]] = {DENSE: _dense(case.detail, t)}
    for name, of in _BY.items():
        if case.detail == "d_scores" and name in (PACKED, CUDA_PACKED):
            continue
        if of == FUSED and not set(OVER_EXPERTS[:2]) <= registered("triton").ops.keys():
            left_out[FUSED] = "Triton's backend has no products over experts"
        elif of not in device.without:
            runs[name] = _run(case.detail, t, of, name in (PACKED, CUDA_PACKED))
    expected = _expected(case.detail, t)
    failures: dict[str, str] = {}
    for name, run in list(runs.items()):
        most = tolerance(name)
        try:
            apart = difference(run(), expected) if most is not None else 0.0
        except FAILURES as error:
            failures[name] = reason(error, device)
            continue
        if most is not None and apart > most:
            failures[name] = f"wrong: {apart:.3g} from the eager form, at most {most:g}"
    calls = {name: (lambda copy, run=run: run()) for name, run in runs.items() if name not in failures}
    samples, failed = time_calls(calls, 1, device, not_captured=frozenset())  # larger than L2 by itself
    for name, sample in samples.items():
        add_floors(sample, [_work(case, t, name)], ceilings)
        if DENSE in samples:
            shares = [100 * d / s for d, s in zip(samples[DENSE]["rounds_ms"], sample["rounds_ms"])]
            sample["percent_of_cublas"] = asdict(Spread.of(shares))
    return {"copies": 1, "samples": samples, "failures": {**failures, **failed}, "left_out": left_out}


def drawn(case: Case, device: Device) -> Experts:
    """bf16, rows by a skewed draw; no rows are nobody's."""
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


def _dense(product: str, t: Experts) -> Callable[[], Tensor]:
    return {
        "forward": lambda: F.grouped_mm(t.x, t.weight.mT, offs=t.offsets),
        "d_x": lambda: F.grouped_mm(t.grad, t.weight, offs=t.offsets),
        "d_scores": lambda: F.grouped_mm(t.grad.T, t.x, offs=t.offsets),
    }[product]


def _run(product: str, t: Experts, by: str, packed: bool) -> Callable[[], Tensor]:
    of = kernels(by) if by == CUDA else SimpleNamespace(**registered("triton").ops)
    if product != "d_scores":
        given, transposed = (t.grad, True) if product == "d_x" else (t.x, False)
        return functools.partial(
            of.grouped_product, given, t.weight, *t.keep(packed=packed), t.offsets, None, MODE, transposed
        )
    out = torch.empty_like(t.scores)

    def sums() -> Tensor:
        of.grouped_score_grad(out, t.grad, t.x, t.offsets, t.weight, t.scores, None, MODE, False)
        return out

    return sums


def _expected(product: str, t: Experts) -> Tensor:
    if product != "d_scores":
        return _run_reference(t, product == "d_x")
    out = torch.zeros_like(t.scores)
    for e, (begin, end) in enumerate(pairwise([0, *t.offsets.tolist()])):
        grad = t.grad[begin:end].T.float() @ t.x[begin:end].float()
        out[e] = (grad * t.weight[e] * t.scores[e].sign()).to(out.dtype)
    return out


def _run_reference(t: Experts, transposed: bool) -> Tensor:
    given = t.grad if transposed else t.x
    return reference_grouped.grouped_product(given, t.weight, *t.keep(packed=False), t.offsets, None, MODE, transposed)


def _work(case: Case, t: Experts, name: str) -> tuple[float, float]:
    """Bytes, those of experts without rows left out but for their zeros, and floating-point operations."""
    rows = t.offsets.diff(prepend=t.offsets.new_zeros(1))
    elements, every = float((rows > 0).sum().item() * case.n * case.k), float(t.weight.numel())
    tokens, keep = 2.0 * case.m * (case.n + case.k), {DENSE: 0.0, PACKED: 1 / 8, CUDA_PACKED: 1 / 8}.get(name, 2.0)
    moved = elements * (2 + keep)
    if case.detail == "d_scores":
        moved = 2 * every + (0.0 if name == DENSE else 4 * elements)
    return moved + tokens, 2.0 * case.m * case.n * case.k
