"""Time the work on a score matrix once per step: its threshold and mask, and score_step.

threshold    kept_threshold, pack_mask and pack_signs, compared with PyTorch's ways to find a k-th largest magnitude
             and a mask
score_step   scores, moments, next threshold and mask. torch's AdamW does less: no factor weight * sign(scores), no
             rounding to 16 bits, no mask
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mft_kernels import fixed_from_float, kept_threshold, score_step
from mft_kernels.reference.step import BLOCK

from ..rivals import KEEP_RATIO
from .cases import CUDA, FUSED, Case
from .device import GRAPH, QUEUED
from .equality import REFERENCE, Check, results
from .operands import MODE
from .timing import Bench, Competitor

TORCH_ADAMW = "torch.optim.AdamW, fused"
TRITON = "Triton"
#: (scores, moments in 8 bits): compact, as most ways of running store them, and exact.
SCHEMES = {"int16, 8-bit": (torch.int16, True), "fp32, exact": (torch.float32, False)}
#: Rows that are compared with the reference, whose step on a whole matrix would take seconds; and the largest share of
#: elements that may differ, because another rounding moves a quotient across the next random number.
_COMPARED, _MOST_APART = 64, 1e-3


def time_threshold(case: Case, bench: Bench) -> dict[str, Any]:
    """Time one case; case.detail is the dtype of the scores. All must agree on the threshold."""
    device = bench.device.torch_device
    generator = torch.Generator(device).manual_seed(0)
    first = torch.randn(case.n, case.k, generator=generator, device=device).mul_(0.02).to(getattr(torch, case.detail))
    copies = [first, *(first.clone() for _ in range(bench.inputs.copies(first.nbytes) - 1))]
    dropped = int((1 - KEEP_RATIO) * first.numel())
    kept = first.numel() - dropped
    threshold = first.abs().flatten().sort().values[dropped].clone()  # a copy is aligned, as a separate threshold is
    found: dict[str, Competitor] = {}

    def add(name: str, run: Callable[[Tensor], Any], *, written: float, selects: bool, how: str = GRAPH) -> None:
        """Add a competitor; ``written``: bytes per score."""
        phases, expected = [(first.nbytes + first.numel() * written, 0.0)], threshold if selects else None
        found[name] = Competitor(lambda copy: run(copies[copy]), expected, most_apart=0.0, phases=phases, how=how)

    ours = {"kept_threshold": (KEEP_RATIO, MODE), "pack_mask": (threshold, MODE), "pack_signs": ()}
    for name, arguments in ours.items():
        for by, label in ((FUSED, name), (CUDA, f"{name}, {CUDA}")):
            if by not in bench.device.without:
                run = functools.partial(_op, name, bench.device.backends[by], arguments)
                selects = name == "kept_threshold"
                add(label, run, written=0 if selects else 1 / 8, selects=selects)
    # PyTorch's selections allocate and launch freely, so a graph would have to hold several times their input.
    theirs: dict[str, Callable[[Tensor], Tensor]] = {
        "sort": lambda s: s.abs().flatten().sort().values[dropped],
        "kthvalue": lambda s: s.abs().flatten().kthvalue(dropped + 1).values,
        "topk": lambda s: s.abs().flatten().topk(kept, sorted=False).values.min(),
    }
    for name, run in theirs.items():
        add(name, run, written=0, selects=True, how=QUEUED)
    add("boolean mask, eager", lambda s: s.abs() >= threshold, written=1, selects=False)
    return bench.compare(found, len(copies))


def time_score_step(case: Case, bench: Bench) -> dict[str, Any]:
    """Time both schemes on one matrix."""
    found: dict[str, Competitor] = {}
    for scheme in SCHEMES:
        matrix = Matrix(case.n, case.k, scheme, bench.device.torch_device)
        backend = bench.device.backends[FUSED]
        found[f"{scheme}, {TRITON}"] = Competitor(
            functools.partial(lambda matrix, backend, copy: matrix.step(backend), matrix, backend),
            apart=functools.partial(matrix.apart, backend),
            most_apart=_MOST_APART,
            phases=[(matrix.moved_bytes, 0.0)],
        )
    parameter = nn.Parameter(torch.zeros(case.n, case.k, device=bench.device.torch_device))
    parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW([parameter], fused=True)
    moved = 4.0 * 7 * case.n * case.k
    found[TORCH_ADAMW] = Competitor(lambda copy: adam.step(), phases=[(moved, 0.0)], how=QUEUED)
    return bench.compare(found, 1, with_cuda=False)


def step_checks(label: str, n: int, k: int, backend: str, device: torch.device) -> Iterator[Check]:
    """Yield checks of score_step in both schemes."""

    def check(scheme: str) -> None:
        apart = Matrix(n, k, scheme, device).apart(backend)
        assert apart <= _MOST_APART, f"{100 * apart:.3g} % of the new scores differ from the reference's"

    for scheme in SCHEMES:
        yield f"score_step, {scheme}, {label}", functools.partial(check, scheme)


class Matrix:
    """Scores with their moments; those of a real layer are larger than L2."""

    def __init__(self, n: int, k: int, scheme: str, device: torch.device) -> None:
        dtype, eight_bit = SCHEMES[scheme]
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> Tensor:
            return torch.randn(n, k, generator=generator, device=device).mul_(scale)

        self.scores, self.grad, self.weight = normal(0.02), normal(1e-3), normal(0.02).to(torch.bfloat16)
        self.hint: Tensor | None = None
        if dtype == torch.int16:  # as in training: the threshold before the step
            self.scores = fixed_from_float(self.scores.clamp_(-0.1, 0.1))
            self.hint = kept_threshold(self.scores, KEEP_RATIO)
        kind = {"dtype": torch.uint8 if eight_bit else torch.float32, "device": device}
        self.exp_avg, self.exp_avg_sq = torch.zeros(n, k, **kind), torch.zeros(n, k, **kind)
        self.scales = torch.zeros(2, -(-n * k // BLOCK), device=device) if eight_bit else None

    @property
    def moved_bytes(self) -> float:
        """4 bytes of gradient and 2 of weight read; scores, moments and scales read and written; a bit of mask."""
        written = (self.scores, self.exp_avg, self.exp_avg_sq, self.scales)
        own = sum(t.nbytes for t in written if t is not None)
        return self.grad.nbytes + self.weight.nbytes + 2.0 * own + self.scores.numel() / 8

    def step(self, backend: str) -> object:
        """Do one step in place."""
        return score_step(
            self.scores,
            self.grad,
            self.weight,
            self.exp_avg,
            self.exp_avg_sq,
            self.scales,
            step=3,
            lr=1e-3,
            seed=1,
            mode=MODE,
            keep_ratio=KEEP_RATIO,
            threshold=self.hint,
            backend=backend,
        )

    def apart(self, backend: str) -> float:
        """Return the share of scores that differ from the reference's after two steps, in the first rows only.

        The second step reads the moments that the first one has coded.
        """
        ours, theirs = (self._first_rows(place) for place in (self.scores.device, torch.device("cpu")))
        for _ in range(2):
            ours.step(backend)
            theirs.step(REFERENCE)
        got, want = ours.scores.cpu().float(), theirs.scores.float()
        near = torch.isclose(got, want, rtol=1e-5, atol=1e-7) if ours.scales is None else got == want
        return 1 - near.float().mean().item()

    def _first_rows(self, place: torch.device) -> "Matrix":
        found, rows = copy.copy(self), min(_COMPARED, len(self.scores))
        if rows * self.scores.shape[1] % BLOCK:
            rows = len(self.scores)  # scales belong to whole blocks
        for name, value in vars(self).items():
            if value is not None:
                cut = value[:rows] if value.shape == self.scores.shape else value
                setattr(found, name, cut.clone().to(place))
        if found.scales is not None:
            found.scales = found.scales[:, : -(-found.scores.numel() // BLOCK)].contiguous()
        return found


def _op(name: str, backend: str, arguments: tuple[Any, ...], scores: Tensor) -> tuple[Tensor, ...]:
    return results(name, backend, (scores, *arguments))
