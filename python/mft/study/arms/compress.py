"""What is left of a trained arm's difference from its start when few bits are kept of it.

delta = trained - start, one matrix at a time; of experts in one parameter (E, N, K) each expert's is a matrix.

    bitdelta      scale * sign(delta), scale the mean of |delta| (arXiv 2402.10193)
    ternary       of the share of largest |delta| scale * sign(delta), scale their mean |delta|; 0 elsewhere
    sparse_delta  the share of largest |delta| as it is; 0 elsewhere

Scales and kept numbers have the 16 bits that are counted for them (see size.py): bfloat16, rounded before they are
evaluated. A parameter of one dimension, such as a norm's, keeps all its numbers, so rounded. BitDelta has no sign for
0, which a third of a bfloat16 control's deltas are: + and - take turns there, so that sums are not shifted.

BitDelta's second step trains the scales, each as a factor that is 1 at first: here to the loss of the training data,
where the paper distils the trained model's logits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_map

from mft.study.arms.job import Weights
from mft.study.config import BITDELTA, SPARSE_DELTA


def compressed_weights(
    kind: str, starts: Weights, trained: Weights, share: float | None, factors: Mapping[str, Tensor]
) -> Weights:
    """start + what kind leaves of trained - start, in fp32."""
    found = {}
    for name, weight in trained.items():
        start = starts[name].float()
        left = compressed(kind, weight.float() - start, share, factors.get(name))
        found[name] = start + left
    return found


def compressed(kind: str, delta: Tensor, share: float | None = None, factor: Tensor | None = None) -> Tensor:
    """Of delta (N, K), (E, N, K) or (N,), fp32, what kind leaves.

    Args: share: of weights, for the kinds that choose some. factor: of bitdelta's scales, (1, 1) or (E, 1, 1).
    """
    if delta.dim() < 2:
        return _rounded(delta)
    matrices = delta.reshape(-1, delta.shape[-2:].numel())
    if kind == BITDELTA:
        scale = matrices.abs().mean(-1, keepdim=True)
        scale = _rounded(scale if factor is None else factor.reshape(-1, 1) * scale)
        even = torch.arange(matrices.shape[-1], device=delta.device) % 2 == 0
        return torch.where((matrices > 0) | ((matrices == 0) & even), scale, -scale).reshape(delta.shape)
    assert share is not None
    largest = _largest(matrices.abs(), share)
    if kind == SPARSE_DELTA:
        return torch.where(largest, _rounded(matrices), 0).reshape(delta.shape)
    scale = _rounded((matrices.abs() * largest).sum(-1, keepdim=True) / largest.sum(-1, keepdim=True))
    return torch.where(largest, scale * matrices.sign(), 0).reshape(delta.shape)


def compute_in_fp32(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Let the modules of these weights have fp32 ones of their own, in place; what goes in and comes out is as before.

    Steps of bfloat16 are as wide as a delta, which would vanish in a sum of that type; kept beside its start it does
    not.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(path)
        own = dict(module.named_parameters())
        dtype = next(iter(own.values())).dtype
        if dtype == torch.float32:
            continue
        for name, parameter in own.items():
            inner, _, part = name.rpartition(".")
            value = nn.Parameter(parameter.detach().float(), requires_grad=False)
            module.get_submodule(inner).register_parameter(part, value)
        module.register_forward_pre_hook(_Cast(torch.float32).before, with_kwargs=True)
        module.register_forward_hook(_Cast(dtype).after)
    return model


def learn_factors(model: nn.Module, steps: Weights) -> nn.Module:
    """Let each weight, of fp32, be its own + factor * step, in place: factors alone can be trained, one a matrix."""
    model.requires_grad_(False)
    for name, step in steps.items():
        path, _, part = name.rpartition(".")
        module = model.get_submodule(path)
        start = module.get_parameter(part)
        module.register_parameter(part, nn.Parameter(torch.ones(*step.shape[:-2], 1, 1, device=start.device)))
        register_parametrization(module, part, _Step(start.detach(), step.to(start.device)), unsafe=True)
    return model


def factors_of(trained: Weights) -> Weights:
    """By the weight's name, of the parameters that learn_factors leaves to be trained."""
    return {name.replace(".parametrizations.", ".").removesuffix(".original"): f for name, f in trained.items()}


@dataclass(frozen=True)
class _Cast:
    """Hooks of a module that give it, or what follows it, floating-point tensors of a dtype."""

    dtype: torch.dtype

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tree_map(self._cast, (args, kwargs))

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return tree_map(self._cast, output)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Step(nn.Module):
    """From a factor to a weight, in fp32; unsafe to PyTorch, since the two differ in shape."""

    def __init__(self, start: Tensor, step: Tensor) -> None:
        super().__init__()
        self._start, self._step = start, step

    def forward(self, factor: Tensor) -> Tensor:
        return self._start + factor * self._step


def _largest(sizes: Tensor, share: float) -> Tensor:
    """True at the share of largest entries of each row, one at the least."""
    count = max(1, round(share * sizes.shape[-1]))
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, sizes.topk(count, sorted=False).indices, True)


def _rounded(numbers: Tensor) -> Tensor:
    return numbers.bfloat16().float()
