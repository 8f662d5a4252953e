"""What an arm must store beside the model that it began at, in bytes.

Numbers count 16 bits each, whatever they were trained in; a mask what its entropy-coded export holds.
"""

import math

from torch import Tensor, nn

from mft.masks.convert import masked_modules
from mft.models.linears import weight_name
from mft.study.arms.job import Job, arm_of
from mft.study.config import BASE, CONTINUED, FULL, INTERPOLATED, LORA, MASK, ONE_SHOT, TEMPERATURE
from mft.study.workspace import Workspace

_NUMBER = 2


def stored_bytes(workspace: Workspace, job: Job, model: nn.Module) -> int:
    """model: the unit's, after workspace.begin."""
    arm, numbers = arm_of(workspace, job.unit), 0
    if arm.kind == BASE or (arm.kind == FULL and job.unit.setting.lr is None):
        return 0
    if arm.kind == TEMPERATURE:
        return _NUMBER
    if arm.kind == INTERPOLATED:
        numbers, arm = 1, workspace.study.arms[str(arm.of)]  # alpha, and what it is of
    if arm.kind in (FULL, CONTINUED):
        return _NUMBER * (numbers + sum(parameter.numel() for parameter in model.parameters()))
    names, _ = workspace.layers_of(arm)
    if arm.kind == LORA:
        adapters = sum(sum(_sides(workspace.model.get_parameter(weight_name(workspace.model, n)))) for n in names)
        return _NUMBER * (numbers + arm.lora_rank * adapters)
    if arm.kind in (MASK, *ONE_SHOT):
        return _NUMBER * numbers + sum(_coded(mask) for mask in _masks(workspace, model, names))
    return _NUMBER * (numbers + sum(model.get_parameter(weight_name(model, name)).numel() for name in names))


def _masks(workspace: Workspace, model: nn.Module, names: list[str]) -> list[Tensor]:
    """True where a weight stays."""
    masked, found = masked_modules(model), []
    for name in names:
        if name in masked:
            found.append(masked[name].mask())
            continue
        weight, start = (each.get_parameter(weight_name(each, name)) for each in (model, workspace.model))
        found.append(weight.detach() == start.detach())
    return found


def _sides(weight: Tensor) -> tuple[int, ...]:
    """What a column of an adapter of rank 1 and its row hold; of experts in one parameter each has both."""
    experts, rows, columns = weight.shape if weight.dim() == 3 else (1, *weight.shape)
    return experts * rows, experts * columns


def _coded(mask: Tensor) -> int:
    """Bytes at the entropy of its share of kept weights."""
    kept = mask.float().mean().item()
    bits = sum(-p * math.log2(p) for p in (kept, 1 - kept) if p > 0)
    return math.ceil(mask.numel() * bits / 8)
