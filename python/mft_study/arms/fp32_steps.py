"""Give a model of another dtype fp32 weights, and let each be start + factor * step with only the factor trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_map

from mft_study.arms.weights import Weights


def compute_in_fp32(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Give the modules of these weights their own fp32 weights, in place. Inputs and outputs keep their dtype.

    A delta is as small as the spacing of bfloat16 numbers, and would vanish in a sum with its start.
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
    """Make each fp32 weight its start + factor * step, in place. Only the factors can be trained, one per matrix."""
    model.requires_grad_(False)
    for name, step in steps.items():
        path, _, part = name.rpartition(".")
        module = model.get_submodule(path)
        start = module.get_parameter(part)
        module.register_parameter(part, nn.Parameter(torch.ones(*step.shape[:-2], 1, 1, device=start.device)))
        register_parametrization(module, part, _Step(start.detach(), step.to(start.device)), unsafe=True)
    return model


def factors_of(trained: Weights) -> Weights:
    """Return the factors by their weights' names, from the parameters that learn_factors leaves to be trained."""
    return {name.replace(".parametrizations.", ".").removesuffix(".original"): f for name, f in trained.items()}


@dataclass(frozen=True)
class _Cast:
    """Hooks that cast floating-point tensors to dtype, before a module or after it."""

    dtype: torch.dtype

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tree_map(self._cast, (args, kwargs))

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return tree_map(self._cast, output)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Step(nn.Module):
    """Compute a weight from its factor, in fp32. For PyTorch it is "unsafe", because the two differ in shape."""

    def __init__(self, start: Tensor, step: Tensor) -> None:
        super().__init__()
        self._start, self._step = start, step

    def forward(self, factor: Tensor) -> Tensor:
        return self._start + factor * self._step
