"""Time what an optimiser step is made of beside the products: score_step, accumulation, a layer whose mask is held.

score_step          one matrix: scores, moments, next threshold and mask. AdamW of torch does less: no factor weight *
                    sign(scores), no rounding to 16 bits, no mask
accumulate_product  out += grad.T @ x in fp32, what a held layer's backward adds
held                forward and backward of a layer whose mask is held, and of one that selects from its scores
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mft_kernels.backends.cuda
from mft_kernels import kept_threshold
from mft_kernels.backends.triton import ops, score_step
from mft_kernels.mask.held import masked_linear_held
from mft_kernels.reference import step as reference_step
from mft_kernels.reference.fixed_point import fixed_from_float
from mft_kernels.reference.step import BLOCK

from ..rivals import KEEP_RATIO
from .cases import CUDA, DENSE, FUSED, UPDATES, Case
from .competitors import MODE, Inputs, Operands, difference, tolerance
from .device import Device
from .host import dense_layer, masked_layer
from .timing import FAILURES, add_floors, reason, time_calls

TORCH_ADAMW = "torch.optim.AdamW, fused"
HELD, UNHELD = "held", "MaskedLinear"
#: (scores, moments in 8 bits): compact as they rest in most ways of running, and exact.
SCHEMES = {"int16, 8-bit": (torch.int16, True), "fp32, exact": (torch.float32, False)}
_ADAM = {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
#: Rows that are compared with the reference, whose step of a whole matrix would take seconds. Few of their elements may
#: differ: a quotient that another rounding moves across the next random number.
_COMPARED, _MOST_APART = 64, 1e-3


def time_update(case: Case, inputs: Inputs, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """samples and failures of case.detail, one of cases.UPDATES."""
    device.tidy()
    run = dict(zip(UPDATES, (_time_steps, _time_accumulation, _time_held)))[case.detail]
    return run(case, inputs, device, ceilings)


def _of_cuda(op: str, device: Device) -> tuple[Callable | None, str]:
    """(the CUDA kernel, "") or (None, why there is none)."""
    if CUDA in device.without:
        return None, device.without[CUDA]
    found = getattr(mft_kernels.backends.cuda, op, None)
    return found, "" if found else f"it has no {op}"


# ---------------------------------------------------------------------------------------------- score_step


def _time_steps(case: Case, inputs: Inputs, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    of_cuda, why = _of_cuda("score_step", device)
    steps = {"Triton": score_step.score_step} | ({CUDA: of_cuda} if of_cuda else {})
    calls: dict[str, Callable[[int], object]] = {}
    failures: dict[str, str] = {}
    moved: dict[str, float] = {}
    for scheme, (dtype, eight_bit) in SCHEMES.items():
        matrix = _Matrix(case.n, case.k, dtype, eight_bit, device)
        for by, step in steps.items():
            name = f"{scheme}, {by}"
            try:
                apart = matrix.apart(step)
            except FAILURES as error:
                failures[name] = reason(error, device)
                continue
            if apart > _MOST_APART:
                failures[name] = f"wrong: {100 * apart:.3g} % of the new scores differ from the reference's"
                continue
            calls[name] = functools.partial(matrix.step, step)
            moved[name] = matrix.moved_bytes
    adam = _adam(case, device)
    calls[TORCH_ADAMW] = adam
    moved[TORCH_ADAMW] = 4.0 * 7 * case.n * case.k
    samples, failed = time_calls(calls, 1, device, not_captured=frozenset({TORCH_ADAMW}))
    for name, sample in samples.items():
        add_floors(sample, [(moved[name], 0.0)], ceilings)
    left_out = {CUDA: why} if why else {}
    return {"copies": 1, "samples": samples, "failures": {**failures, **failed}, "left_out": left_out}


class _Matrix:
    """Scores with their moments, after some steps: the moments are not zero. All of it is larger than L2."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, eight_bit: bool, device: Device) -> None:
        generator = torch.Generator(device.torch_device).manual_seed(0)

        def normal(scale: float) -> Tensor:
            return torch.randn(n, k, generator=generator, device=device.torch_device).mul_(scale)

        scores = normal(0.02)
        self.grad, self.weight = normal(1e-3), normal(0.02).to(torch.bfloat16)
        if dtype == torch.int16:
            scores = fixed_from_float(scores.clamp_(-0.1, 0.1))
        self.scores, self._hint = scores, None
        if dtype == torch.int16:  # as in training: the threshold that held before the step
            self._hint = kept_threshold(scores, KEEP_RATIO)
        kind = {"dtype": torch.uint8 if eight_bit else torch.float32, "device": device.torch_device}
        self.moments = torch.zeros(n, k, **kind), torch.zeros(n, k, **kind)
        blocks = -(-n * k // BLOCK)
        self.scales = torch.zeros(2, blocks, device=device.torch_device) if eight_bit else None
        # 4 bytes of gradient, 2 of weight read; scores, moments and scales read and written; a bit of mask.
        own = self.scores.nbytes + sum(t.nbytes for t in self.moments)
        own += self.scales.nbytes if self.scales is not None else 0
        self.moved_bytes = self.grad.nbytes + self.weight.nbytes + 2.0 * own + n * k / 8

    def step(self, kernel: Callable, copy: int) -> object:
        return self._step(kernel, self.scores, self.grad, self.weight, self.moments, self.scales, self._hint)

    def apart(self, kernel: Callable) -> float:
        """Share of the scores that a step of copies makes different from the reference's, of the first rows alone."""
        rows = min(_COMPARED, self.scores.shape[0])
        whole = self.scales is None or rows * self.scores.shape[1] % BLOCK == 0
        rows = rows if whole else self.scores.shape[0]
        blocks = -(-rows * self.scores.shape[1] // BLOCK)
        results = []
        for by, place in ((kernel, self.scores.device), (reference_step.score_step, torch.device("cpu"))):
            scores, grad, weight, *moments = (
                t[:rows].clone().to(place) for t in (self.scores, self.grad, self.weight, *self.moments)
            )
            scales = None if self.scales is None else self.scales[:, :blocks].contiguous().to(place)
            for _ in range(2):  # the second reads moments that the first has coded
                hint = None if self._hint is None else self._hint.to(place)
                self._step(by, scores, grad, weight, moments, scales, hint)
            results.append(scores.cpu())
        got, want = (t.float() for t in results)
        near = torch.isclose(got, want, rtol=1e-5, atol=1e-7) if self.scores.dtype == torch.float32 else got == want
        return 1 - near.float().mean().item()

    def _step(self, kernel, scores, grad, weight, moments, scales, hint) -> object:
        options = {"grad_scale": None, "seed": 1, "mode": MODE, "keep_ratio": KEEP_RATIO, "threshold": hint}
        return kernel(scores, grad, weight, *moments, scales, **_ADAM, **options)


def _adam(case: Case, device: Device) -> Callable[[int], object]:
    parameter = nn.Parameter(torch.zeros(case.n, case.k, device=device.torch_device))
    parameter.grad = torch.ones_like(parameter)
    optimiser = torch.optim.AdamW([parameter], fused=True)
    return lambda copy: optimiser.step()


# ---------------------------------------------------------------------------------------------- accumulation


def _time_accumulation(case: Case, inputs: Inputs, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    operands = inputs.get(case.n, case.k, case.m, sums=True)
    of_cuda, why = _of_cuda("accumulate_product", device)
    adds: dict[str, Callable[[Operands], object]] = {DENSE: lambda o: _sums(o).add_(o.grad.T @ o.x)}
    for name, add in ((FUSED, ops.accumulate_product), (CUDA, of_cuda)):
        if add is not None:
            adds[name] = lambda o, add=add: add(_sums(o), o.grad, o.x)
    expected = operands[0].grad.T.float() @ operands[0].x.float()

    def sums_of(add: Callable[[Operands], object]) -> Tensor:
        _sums(operands[0]).zero_()
        add(operands[0])
        return _sums(operands[0]).clone()

    results = {name: functools.partial(sums_of, add) for name, add in adds.items()}
    calls = {name: functools.partial(_on_copy, add, operands) for name, add in adds.items()}
    size = case.n * case.k
    phase = 2.0 * case.m * (case.n + case.k) + 8 * size, 2.0 * case.m * size
    return _checked_and_timed(results, expected, calls, phase, {CUDA: why} if why else {}, operands, device, ceilings)


def _sums(o: Operands) -> Tensor:
    assert o.sums is not None, "accumulation needs operands with sums"
    return o.sums


# ---------------------------------------------------------------------------------------------- held masks


def _time_held(case: Case, inputs: Inputs, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    operands = inputs.get(case.n, case.k, case.m, sums=True)
    layers = [masked_layer(o) for o in operands]
    dense = [dense_layer(o) for o in operands]

    def step(run: Callable[[Tensor], Tensor], o: Operands, *also: Tensor) -> tuple[Tensor, ...]:
        x = o.x.detach().requires_grad_()
        y = run(x)
        return y.detach(), *torch.autograd.grad(y, (x, *also), o.grad)

    def held(o: Operands, copy: int) -> tuple[Tensor, ...]:
        return step(lambda x: masked_linear_held(x, o.weight, o.packed, grad_buffer=_sums(o)), o)

    def unheld(o: Operands, copy: int) -> tuple[Tensor, ...]:
        return step(layers[copy], o, layers[copy].scores)[:2]

    def unmasked(o: Operands, copy: int) -> tuple[Tensor, ...]:
        results = step(dense[copy], o)
        _sums(o).add_(o.grad.T @ o.x)
        return results

    by = {DENSE: unmasked, HELD: held, UNHELD: unheld}
    o = operands[0]
    masked = torch.where(o.scores.abs() >= o.threshold, o.weight, 0)
    expected = nn.functional.linear(o.x, masked), o.grad @ masked
    results = {name: functools.partial(run, o, 0) for name, run in by.items()}
    calls = {name: (lambda copy, run=run: run(operands[copy], copy)) for name, run in by.items()}
    size = case.n * case.k
    phase = 4.0 * case.m * (case.n + case.k) + 12.25 * size, 6.0 * case.m * size
    return _checked_and_timed(results, expected, calls, phase, {}, operands, device, ceilings)


def _on_copy(run: Callable[[Operands], object], operands: list[Operands], copy: int) -> object:
    return run(operands[copy])


def _checked_and_timed(
    results: Mapping[str, Callable[[], Any]],
    expected: Tensor | tuple[Tensor, ...],
    calls: Mapping[str, Callable[[int], object]],
    phase: tuple[float, float],
    left_out: dict[str, str],
    operands: list[Operands],
    device: Device,
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    failures = {}
    for name, run in results.items():
        most = tolerance(name)
        if most is None:
            continue
        try:
            apart = difference(run(), expected)
        except FAILURES as error:
            failures[name] = reason(error, device)
            continue
        if apart > most:
            failures[name] = f"wrong: {apart:.3g} from the eager form, at most {most:g}"
    calls = {name: call for name, call in calls.items() if name not in failures}
    not_captured = frozenset({HELD, UNHELD})  # autograd
    samples, failed = time_calls(calls, len(operands), device, not_captured=not_captured)
    for sample in samples.values():
        add_floors(sample, [phase], ceilings)
    return {"copies": len(operands), "samples": samples, "failures": {**failures, **failed}, "left_out": left_out}
