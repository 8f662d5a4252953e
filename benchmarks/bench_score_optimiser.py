"""Measure how 16-bit scores and 8-bit moments change a mask, and how long an optimiser step takes.

Masks: 1,000 steps of the paper's schedule (linear, 3 % warm-up, scores N(0, 0.02), keep 0.9). Every scheme gets the
gradients that fp32 AdamW gets, and its mask is compared with the mask of fp32 AdamW. Gradients are synthetic (a
persistent signal under heavy-tailed noise), or those of a small network during its run of fp32 AdamW.
Time: one step on 4096 x 4096, compared with torch.optim.AdamW.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mft_kernels import fixed_from_float, float_from_fixed, kept_threshold, pack_mask, score_step, unpack_mask
from mft_kernels.reference.step import MEAN_BIAS, MEAN_CODES, SQUARE_BIAS, SQUARE_CODES, decode, encode
from mft_kernels.timing import time_interleaved

from .harness import Finding, Spread, ratio, report, times

STEPS, WARM_UP, KEEP = 1000, 0.03, 0.9
SHAPE = (256, 1024)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int16: "int16"}
EXACT = "fp32 scores, fp32 moments"


def rate(step: int, lr: float) -> float:
    """Return the learning rate of step 1, 2, ...: linear up over the first 3 % and down to 0, as in the paper."""
    warm = int(WARM_UP * STEPS)
    return lr * (step / warm if step < warm else (STEPS - step) / (STEPS - warm))


# ---------------------------------------------------------------------------------------------- gradients


class MadeUp:
    """Synthetic grad_output.T @ x: row size * column size * (0.1 * signal of the weight + noise).

    Rows and columns differ by factors, as a model's channels do (log-normal, sigma 1 and 0.7). The signal N(0, 1) stays
    for the whole run. The noise is N(0, 1) times a log-normal (sigma 0.7) of each element and step: one in a hundred is
    ten times the median.
    """

    name = "made-up gradients"

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)
        rows, columns = self._normal(SHAPE[0], 1), self._normal(1, SHAPE[1])
        self._size = 1e-3 * rows.exp() * (0.7 * columns).exp()
        self.weight = 0.02 * self._normal(*SHAPE) * (0.3 * self._normal(SHAPE[0], 1)).exp()
        self._signal = 0.1 * self._normal(*SHAPE)

    def grad(self, keep: Tensor) -> Tensor:
        """Return the next gradient, which does not depend on the mask."""
        noise = self._normal(*SHAPE) * (0.7 * self._normal(*SHAPE)).exp()
        return self._size * (self._signal + noise)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


class SmallNetwork:
    """Gradients of the middle layer of a GELU network that has learned a teacher's labels and now learns its mask."""

    name = "a small network"

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(2)
        n, k = SHAPE
        teacher = [self._normal(128, 64) / 8, self._normal(16, 128) / 11]
        self._teach = lambda x: (torch.tanh(x @ teacher[0].T) @ teacher[1].T).argmax(1)
        self._layers = [self._normal(k, 64) / 8, self._normal(n, k) / 32, self._normal(16, n) / 16]
        for layer in self._layers:
            layer.requires_grad_()
        optimizer = torch.optim.AdamW(self._layers, lr=1e-3)
        for _ in range(200):
            optimizer.zero_grad()
            self._loss(self._layers[1]).backward()
            optimizer.step()
        self.weight = self._layers[1].detach()

    def grad(self, keep: Tensor) -> Tensor:
        """Return grad_output.T @ x of the middle layer on the next batch, under the mask."""
        masked = torch.where(keep, self.weight, 0).requires_grad_()
        return torch.autograd.grad(self._loss(masked), masked)[0]

    def _loss(self, middle: Tensor) -> Tensor:
        x = self._normal(128, 64)
        hidden = torch.nn.functional.gelu(x @ self._layers[0].T)
        hidden = torch.nn.functional.gelu(hidden @ middle.T)
        return torch.nn.functional.cross_entropy(hidden @ self._layers[2].T, self._teach(x))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


# ---------------------------------------------------------------------------------------------- schemes


class Scheme:
    """Scores and moments in their formats, updated by score_step."""

    def __init__(
        self,
        scores: Tensor,
        dtype: torch.dtype = torch.float32,
        moments: str = "fp32",
        *,
        free_of_weight: bool = True,
        round_grad: bool = False,
    ) -> None:
        self._scores = fixed_from_float(scores) if dtype == torch.int16 else scores.to(dtype, copy=True)
        self._free_of_weight, self._round_grad = free_of_weight, round_grad
        kind = torch.float32 if moments == "fp32" else torch.uint8
        self._moments = [torch.zeros(SHAPE, dtype=kind), torch.zeros(SHAPE, dtype=kind)]
        if moments == "8bit":
            self._moments.append(torch.zeros(2, -(-scores.numel() // 256)))

    def step(self, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        """Do one step from grad_output.T @ x."""
        if self._round_grad:
            grad = grad.bfloat16()
        if self._free_of_weight:
            score_step(self._scores, grad, weight, *self._moments, step=step, lr=lr)
        else:
            score_grad = grad * weight * self._scores.sign()
            score_step(self._scores, score_grad, None, *self._moments, step=step, lr=lr)

    def scores(self) -> Tensor:
        """The scores in fp32."""
        return float_from_fixed(self._scores) if self._scores.dtype == torch.int16 else self._scores.float()


class TorchAdamW:
    """torch.optim.AdamW on the gradient times weight and sign."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores.clone()
        self._optimizer = torch.optim.AdamW([self._scores], weight_decay=0.0, foreach=False, fused=False)

    def step(self, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        """Do one step from grad_output.T @ x."""
        self._scores.grad = grad * weight * self._scores.sign()
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def scores(self) -> Tensor:
        """The scores in fp32."""
        return self._scores


class ToNearest(TorchAdamW):
    """AdamW that rounds to nearest: scores stored in bf16, or moments (free of the weight) stored in our 8 bits."""

    def __init__(self, scores: Tensor, coded: bool) -> None:
        super().__init__(scores)
        self._coded = coded
        blocks = -(-scores.numel() // 256)
        self._codes = [torch.zeros(SHAPE, dtype=torch.uint8) for _ in range(2)]
        self._scales = torch.zeros(2, blocks)
        self._half = torch.full((scores.numel(),), 127)

    def step(self, grad: Tensor, weight: Tensor, step: int, lr: float) -> None:
        """Do one step from grad_output.T @ x."""
        if not self._coded:
            super().step(grad, weight, step, lr)
            self._scores.copy_(self._scores.bfloat16())
            return
        h = grad * self._scores.sign()
        formats = ((MEAN_BIAS, MEAN_CODES), (SQUARE_BIAS, SQUARE_CODES))
        m, v = (decode(c, s, *f) for c, s, f in zip(self._codes, self._scales, formats))
        m, v = m.lerp(h, 0.1), v.lerp(h * h, 0.001)
        root = (v / (1 - 0.999**step)).sqrt() * weight.abs() + 1e-8
        self._scores -= lr / (1 - 0.9**step) * m * weight / root
        for codes, scale, moment, form in zip(self._codes, self._scales, (m, v), formats):
            codes.copy_(encode(moment, scale, self._half, *form))


def schemes(scores: Tensor) -> dict[str, Scheme | TorchAdamW]:
    """Return the compared schemes by name."""
    named: dict[str, Scheme | TorchAdamW] = {
        f"{NAMES[dtype]} scores, {moments} moments": Scheme(scores, dtype, moments)
        for dtype in (torch.float32, torch.int16, torch.bfloat16)
        for moments in ("fp32", "8bit")
    }
    named["fp32 scores, 8bit moments with the weight in them"] = Scheme(scores, moments="8bit", free_of_weight=False)
    named["fp32 scores, 8bit moments rounded to nearest"] = ToNearest(scores, coded=True)
    named["bf16 scores rounded to nearest, fp32 moments"] = ToNearest(scores, coded=False)
    named["fp32 scores and moments, gradients rounded to bf16"] = Scheme(scores, round_grad=True)
    return named


# ---------------------------------------------------------------------------------------------- questions


def compare_masks(source: MadeUp | SmallNetwork, lr: float) -> list[Finding]:
    """Return mask differences from fp32 AdamW after 1,000 steps, in % of all weights and of those that it flipped."""
    scores = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    exact, others = TorchAdamW(scores), schemes(scores)
    start = _keep(scores)
    for step in range(1, STEPS + 1):
        grad = source.grad(_keep(exact.scores()))
        for scheme in (exact, *others.values()):
            scheme.step(grad, source.weight, step, rate(step, lr))
    end = _keep(exact.scores())
    flips = (end != start).sum().item()
    before = f"{source.name}, lr {lr:g}: "
    found = [Finding(f"{before}flips of fp32 AdamW", Spread.of([100 * flips / end.numel()]), "% of weights")]
    for name, scheme in others.items():
        wrong = (_keep(scheme.scores()) != end).sum().item()
        target = ("at most", 0.0) if name == EXACT else (None, None)
        found.append(Finding(before + name, Spread.of([100 * wrong / end.numel()]), "% of weights", *target))
        found.append(Finding(before + name, Spread.of([100 * wrong / flips]), "% of flips"))
        if name == EXACT and not torch.equal(scheme.scores(), exact.scores()):
            raise AssertionError("fp32 scores with fp32 moments must be torch's AdamW bit for bit")
    return found


def compare_times() -> list[Finding]:
    """Return milliseconds per step on 4096 x 4096, bf16 gradients and weights. torch's gets finished fp32 d_scores."""
    n = 4096
    torch.manual_seed(0)
    scores, weight = 0.02 * torch.randn(n, n), (0.02 * torch.randn(n, n)).bfloat16()
    grad = torch.randn(n, n).bfloat16()
    competitors: dict[str, Callable[[], object]] = {}
    for dtype, moments in ((torch.float32, "fp32"), (torch.float32, "8bit"), (torch.int16, "8bit")):
        competitors[f"{NAMES[dtype]} scores, {moments} moments, with the mask"] = _stepper(
            scores, dtype, moments, grad, weight, KEEP
        )
    competitors["int16 scores, 8bit moments"] = _stepper(scores, torch.int16, "8bit", grad, weight, None)
    for options in ({"fused": True}, {"foreach": True}):
        p = torch.nn.Parameter(scores.clone())
        p.grad = grad.float()
        optimizer = torch.optim.AdamW([p], lr=3e-4, **options)
        competitors[f"torch AdamW {next(iter(options))}"] = optimizer.step
    competitors["kept_threshold and pack_mask, fp32"] = lambda: pack_mask(scores, kept_threshold(scores, KEEP))
    samples = time_interleaved(competitors, rounds=9)
    with_mask = "int16 scores, 8bit moments, with the mask"
    return [
        *times(samples),
        ratio(samples, "torch AdamW fused", with_mask),
        ratio(samples, "torch AdamW foreach", with_mask),
        ratio(samples, "torch AdamW fused", "fp32 scores, fp32 moments, with the mask"),
    ]


def main() -> None:
    """Print and record both answers."""
    masks = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step takes half a millisecond: a second thread would cost more in waiting
    for source, lr in ((MadeUp, 2e-5), (MadeUp, 3e-4), (SmallNetwork, 3e-4)):
        masks += compare_masks(source(), lr)
    torch.set_num_threads(threads)
    report("score_optimiser", f"masks that differ from fp32 AdamW's after {STEPS} steps", masks)
    report("score_optimiser_time", "a step on 4096 x 4096", compare_times())


def _stepper(scores, dtype, moments, grad, weight, keep_ratio) -> Callable[[], object]:
    own = fixed_from_float(scores) if dtype == torch.int16 else scores.clone()
    kind = torch.float32 if moments == "fp32" else torch.uint8
    state = [torch.zeros(scores.shape, dtype=kind), torch.zeros(scores.shape, dtype=kind)]
    if moments == "8bit":
        state.append(torch.zeros(2, scores.numel() // 256))
    step, threshold = 0, None

    def run() -> None:
        nonlocal step, threshold
        step += 1
        found = score_step(own, grad, weight, *state, step=step, lr=3e-4, keep_ratio=keep_ratio, threshold=threshold)
        threshold = None if found is None else found[0]

    return run


def _keep(scores: Tensor) -> Tensor:
    return unpack_mask(pack_mask(scores, kept_threshold(scores, KEEP)), scores.shape)
