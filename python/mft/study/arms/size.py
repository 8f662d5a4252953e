"""What an arm must store beside the model that it began at, in bytes.

Numbers count 16 bits each, whatever they were trained in; a mask, and which weights of a matrix a compressed arm
changes, what its entropy-coded export holds. Arms of fp32 are evaluated as they are: in the study of moe.yaml, on 64
rows of validation, rounding to bfloat16 moved the loss of a control by 0.00006 nats a token (its weights) or 0.00002
(their differences from the start, which take as many bytes), and that of LoRA of rank 8 by 0.000006.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mft.masks.convert import masked_modules
from mft.masks.export_format import coded_size
from mft.masks.quantize import coded_shapes
from mft.models.linears import weight_name
from mft.models.quantized_weight import QuantizedWeight
from mft.study.arms.job import Job, arm_of, rank_of
from mft.study.config import (
    AVERAGE,
    BASE,
    BITDELTA,
    COMPRESSED,
    CONTINUED,
    CONTROL,
    FULL,
    INTERPOLATED,
    LORA,
    MASK,
    ONE_SHOT,
    QUANTIZED,
    SPARSE_DELTA,
    TEMPERATURE,
    ArmConfig,
)
from mft.study.outcome import Unit
from mft.study.workspace import Workspace

_NUMBER = 2


def stored_bytes(workspace: Workspace, job: Job, model: nn.Module) -> int:
    """model: the unit's, after workspace.begin."""
    unit, numbers = job.unit, 0
    arm = arm_of(workspace, unit)
    if arm.kind == BASE or (arm.kind == FULL and not arm.lrs):  # the model as it comes
        return 0
    if arm.kind == TEMPERATURE:
        return _NUMBER
    if arm.kind == QUANTIZED:
        return weights_bytes(workspace, str(arm.quantization), _NUMBER)
    if arm.kind in COMPRESSED:
        names = [name for name, _ in workspace.model.named_parameters()]
        if workspace.study.arms[str(arm.of)].kind == CONTROL:
            names = [weight_name(workspace.model, name) for name in workspace.layers_of(arm)[0]]
        weights = [[each.get_parameter(name).detach() for each in (model, workspace.model)] for name in names]
        return sum(_compressed(arm.kind, weight, start) for weight, start in weights)
    if arm.kind == INTERPOLATED:
        assert job.source is not None
        unit, numbers = job.source[0], 1  # alpha, beside what it is of
        arm = arm_of(workspace, unit)
    if arm.kind == AVERAGE:
        return _mean_bytes(workspace, unit, model)
    if arm.kind in (FULL, CONTINUED):
        return _NUMBER * (numbers + sum(parameter.numel() for parameter in model.parameters()))
    names, _ = workspace.layers_of(arm)
    if arm.kind == LORA:
        return _NUMBER * (numbers + rank_of(workspace, unit) * adapter_sides(shapes_of(workspace, arm)))
    if arm.kind in (MASK, *ONE_SHOT):
        return _NUMBER * numbers + sum(coded_size(mask) for mask in _masks(workspace, model, names))
    return _NUMBER * (numbers + sum(map(math.prod, shapes_of(workspace, arm))))


def _mean_bytes(workspace: Workspace, unit: Unit, model: nn.Module) -> int:
    """Of a mean of runs its numbers; of masks how many runs keep a weight, of adapters all, where that is less."""
    arm = workspace.study.arms[unit.arm]
    of = workspace.study.arms[str(arm.of)]
    if of.kind == CONTINUED:
        return _NUMBER * sum(parameter.numel() for parameter in model.parameters())
    numbers = _NUMBER * sum(map(math.prod, shapes_of(workspace, arm)))
    if of.kind == MASK:
        return min(numbers, sum(map(coded_size, _kept_by_runs(workspace, model, arm))))
    if of.kind == LORA:
        rank = unit.setting.rank or of.lora_rank
        return min(numbers, _NUMBER * arm.runs * rank * adapter_sides(shapes_of(workspace, arm)))
    return numbers


def weights_bytes(workspace: Workspace, quantization: str | None, number: float | None = None) -> int:
    """Of the whole model, its decoder layers' linears in codes of this kind (null: none); else so many bytes a number.

    number: None: as many as each has.
    """
    coded = coded_shapes(workspace.base) if quantization is not None else {}
    empty = [QuantizedWeight.empty(shape, torch.float32, str(quantization), "meta") for shape in coded.values()]
    codes = sum(each.nbytes for each in empty)
    rest = (parameter for name, parameter in workspace.base.named_parameters() if name not in coded)
    return codes + int(sum(p.numel() * (number or p.itemsize) for p in rest))


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


def _kept_by_runs(workspace: Workspace, model: nn.Module, arm: ArmConfig) -> Iterator[Tensor]:
    """Of a mean of masks: True where one run at least keeps a weight, where two do, and so on."""
    for name in workspace.layers_of(arm)[0]:
        weight, start = (each.get_parameter(weight_name(each, name)).detach() for each in (model, workspace.model))
        kept = (weight / start * arm.runs).nan_to_num(arm.runs).round()  # a weight that is 0 does not tell
        yield from (kept >= count for count in range(1, arm.runs + 1))


def shapes_of(workspace: Workspace, arm: ArmConfig) -> list[torch.Size]:
    """Of the weights that the arm's mask, adapters or control are on."""
    names, _ = workspace.layers_of(arm)
    return [workspace.base.get_parameter(weight_name(workspace.base, name)).shape for name in names]


def adapter_sides(shapes: Iterable[tuple[int, ...]]) -> int:
    """What adapters of rank 1 hold on weights of these shapes; of experts in one parameter each has one."""
    return sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)


def _compressed(kind: str, weight: Tensor, start: Tensor) -> int:
    """Bytes of what takes start to weight."""
    numel = weight.numel()
    if weight.dim() < 2:
        return _NUMBER * numel
    scales = _NUMBER * (len(weight) if weight.dim() == 3 else 1)
    if kind == BITDELTA:
        return math.ceil(numel / 8) + scales
    changed = weight != start
    count = int(changed.sum())
    return coded_size(~changed) + (_NUMBER * count if kind == SPARSE_DELTA else math.ceil(count / 8) + scales)
