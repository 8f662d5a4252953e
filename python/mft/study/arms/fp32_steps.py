"""Weights of fp32 in a model of another type, each its start + a step, whose factor alone can be trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_map

from mft.study.arms.weights import Weights


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
