"""Compressed arms: keep only few bits of a trained arm's difference from its start.

delta = trained - start, one matrix at a time. If one parameter (E, N, K) holds all experts, each expert is a matrix.

    bitdelta      scale * sign(delta), scale = mean |delta| (arXiv 2402.10193)
    ternary       scale * sign(delta) for the share of largest |delta|, scale = their mean |delta|; 0 elsewhere
    sparse_delta  delta for the share of largest |delta|; 0 elsewhere

Scales and kept numbers are rounded to bfloat16 before they are evaluated, the 16 bits that are counted for them (see
size.py). A parameter of one dimension, such as a norm's, keeps all its numbers, rounded likewise. BitDelta has no sign
for 0, but a third of a bfloat16 control's deltas are 0. There + and - alternate, so that sums are not shifted.

BitDelta's second step trains the scales, each through a factor that starts at 1. We minimise the loss on the training
data; the paper distils the trained model's logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mft.files.figure import COLOURS
from mft_study.arms.arm import TRAINING, Arm, Ground
from mft_study.arms.size import NUMBER
from mft_study.arms.weights import Weights, load_weights

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Compressed(Arm):
    takes = frozenset({"of"})
    needs = frozenset({"of"})

    def may_be_of(self, source: type[Arm]) -> bool:
        return source.compressible

    @classmethod
    def compress(cls, delta: Tensor, share: float | None = None, factor: Tensor | None = None) -> Tensor:
        """Return what is kept of delta (N, K), (E, N, K) or (N,), fp32. factor multiplies bitdelta's scales."""
        if delta.dim() < 2:
            return _rounded(delta)
        return cls.compress_matrices(delta.reshape(-1, delta.shape[-2:].numel()), share, factor).reshape(delta.shape)

    @classmethod
    def compress_matrices(cls, matrices: Tensor, share: float | None, factor: Tensor | None) -> Tensor:
        """Return what is kept of each row of matrices, which is one flattened matrix."""
        raise NotImplementedError

    @classmethod
    def bytes_of_matrices(cls, weight: Tensor, start: Tensor, matrices: int) -> int:
        """Return the bytes of the change from start to weight."""
        raise NotImplementedError

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return self.model_with_factors(ground, {})

    def model_with_factors(self, ground: Ground, factors: Mapping[str, Tensor]) -> nn.Module:
        """Return the model with start + what is kept of trained - start, in fp32."""
        weights = Weights()
        for name, (start, end) in _starts_and_ends(ground).items():
            left = self.compress(end.float() - start.float(), ground.setting.share, factors.get(name))
            weights[name] = start.float() + left
        return ground.source.model_with(ground, weights)

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        whole = ground.sources[0].arm.whole_model
        names = [name for name, _ in ground.start.named_parameters()] if whole else ground.weight_names()
        weights = [[each.get_parameter(name).detach() for each in (model, ground.start)] for name in names]
        matrices = [(weight, start) for weight, start in weights if weight.dim() > 1]
        others = sum(weight.numel() for weight, _ in weights if weight.dim() < 2)
        return NUMBER * others + sum(
            self.bytes_of_matrices(weight, start, len(weight) if weight.dim() == 3 else 1) for weight, start in matrices
        )

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return its source's: here no kernel multiplies by what is stored."""
        return ground.source.resident_bytes(ground, model)


class BitDelta(_Compressed):
    """Start + scale * sign(trained - start), with one scale per matrix; with lrs, the scales are trained afterwards."""

    takes = _Compressed.takes | TRAINING
    fades = True
    colour = COLOURS["bitdelta"]

    def may_be_of(self, source: type[Arm]) -> bool:
        return super().may_be_of(source) and not (self.lrs and source.whole_model)

    @classmethod
    def compress_matrices(cls, matrices: Tensor, share: float | None, factor: Tensor | None) -> Tensor:
        import torch

        scale = matrices.abs().mean(-1, keepdim=True)
        scale = _rounded(scale if factor is None else factor.reshape(-1, 1) * scale)
        even = torch.arange(matrices.shape[-1], device=matrices.device) % 2 == 0
        return torch.where((matrices > 0) | ((matrices == 0) & even), scale, -scale)

    @classmethod
    def bytes_of_matrices(cls, weight: Tensor, start: Tensor, matrices: int) -> int:
        return math.ceil(weight.numel() / 8) + NUMBER * matrices

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return self.model_with(ground, load_weights(path)) if self.lrs else super().model(ground, path)

    def model_with(self, ground: Ground, weights: Weights) -> nn.Module:
        from mft_study.arms.fp32_steps import factors_of

        return self.model_with_factors(ground, factors_of(weights))

    def untrained(self, ground: Ground) -> nn.Module:
        """Return a model in which only the scales can be trained."""
        from mft.models.causal_lm import clone_with_own_weights
        from mft_study.arms.fp32_steps import compute_in_fp32, learn_factors

        pairs = _starts_and_ends(ground).items()
        steps = {name: self.compress(end.float() - start.float()) for name, (start, end) in pairs}
        return learn_factors(compute_in_fp32(clone_with_own_weights(ground.start), steps), steps)


class _OfShare(_Compressed):
    takes = _Compressed.takes | {"shares"}
    needs = _Compressed.needs | {"shares"}


class Ternary(_OfShare):
    """Start + scale * sign(trained - start) for a share of the weights; the others stay at the start."""

    colour = COLOURS["ternary"]

    @classmethod
    def compress_matrices(cls, matrices: Tensor, share: float | None, factor: Tensor | None) -> Tensor:
        largest = _largest(matrices.abs(), share)
        scale = _rounded((matrices.abs() * largest).sum(-1, keepdim=True) / largest.sum(-1, keepdim=True))
        return (scale * matrices.sign()).where(largest, 0)

    @classmethod
    def bytes_of_matrices(cls, weight: Tensor, start: Tensor, matrices: int) -> int:
        from mft.files.mask_coding import coded_size

        changed = weight != start
        return coded_size(~changed) + math.ceil(int(changed.sum()) / 8) + NUMBER * matrices


class SparseDelta(_OfShare):
    """The trained value for a share of the weights; the others stay at the start."""

    colour = COLOURS["sparse delta"]

    @classmethod
    def compress_matrices(cls, matrices: Tensor, share: float | None, factor: Tensor | None) -> Tensor:
        return _rounded(matrices).where(_largest(matrices.abs(), share), 0)

    @classmethod
    def bytes_of_matrices(cls, weight: Tensor, start: Tensor, matrices: int) -> int:
        from mft.files.mask_coding import coded_size

        changed = weight != start
        return coded_size(~changed) + NUMBER * int(changed.sum())


def _starts_and_ends(ground: Ground) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the source trained, before and after training, on the CPU."""
    trained = ground.source.weights(ground)
    return {name: (ground.start.get_parameter(name).detach().cpu(), end) for name, end in trained.items()}


def _largest(sizes: Tensor, share: float | None) -> Tensor:
    """Return a mask of the share of largest entries in each row; at least one."""
    import torch

    assert share is not None
    count = max(1, round(share * sizes.shape[-1]))
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, sizes.topk(count, sorted=False).indices, True)


def _rounded(numbers: Tensor) -> Tensor:
    return numbers.bfloat16().float()
