"""Scores with their weight, moments and gradients, which tests of score_step step."""

import torch

from mft_kernels import fixed_from_float, float_from_fixed, score_step
from mft_kernels.reference.step import MEAN_BIAS, MEAN_CODES, SQUARE_BIAS, SQUARE_CODES

MEAN, SQUARE = (MEAN_BIAS, MEAN_CODES), (SQUARE_BIAS, SQUARE_CODES)


class Matrix:
    """Scores N(0, 0.02), weight, and moments at zero; ``step`` makes the next of a series of gradients."""

    def __init__(self, n, k, scores=torch.float32, moments="fp32", weight=torch.float32, grad=torch.float32, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.grad_dtype = grad
        wide = 0.02 * self.normal(n, k)
        self.scores = fixed_from_float(wide) if scores == torch.int16 else wide.to(scores)
        self.weight = None if weight is None else (0.02 * self.normal(n, k)).to(weight)
        dtype = torch.float32 if moments == "fp32" else torch.uint8
        self.moments = [torch.zeros(n, k, dtype=dtype), torch.zeros(n, k, dtype=dtype)]
        if moments == "8bit":
            self.moments.append(torch.zeros(2, -(-n * k // 256)))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def next_grad(self):
        n, k = self.scores.shape
        return (self.normal(n, k) * self.normal(n, 1).exp()).to(self.grad_dtype)

    def clone(self):
        other = object.__new__(Matrix)
        other.__dict__.update(self.__dict__)
        other.scores, other.moments = self.scores.clone(), [t.clone() for t in self.moments]
        return other

    def step(self, grad, step, **options):
        options = {"lr": 1e-3, "seed": 7 << 40 | 3, **options}
        return score_step(self.scores, grad, self.weight, *self.moments, step=step, **options)

    def floats(self):
        return float_from_fixed(self.scores) if self.scores.dtype == torch.int16 else self.scores.float()
