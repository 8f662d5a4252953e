"""Choose the memory mode that fits this machine, and check the disk space, before any weight is loaded."""

import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mft.checks import check_rule
from mft.config import MaskConfig, RunConfig
from mft.engines.mode import MODES, default_device
from mft.engines.placed import Mode
from mft.memory.fit import Choice, choose, gigabytes
from mft.memory.model_config import read_model_config
from mft.memory.shapes import ModelShape, shape_from_config
from mft.memory.ways import WAYS, ways_over
from mft.memory.workload import Workload
from mft.models.frozen_layers import PrefixMemory
from mft.models.pretrained import load_outline
from mft.number_formats import unless_auto

_LOGS = 100_000_000  # bytes: metrics, tables, plot
# The configuration keys of the fields of Workload.
_KEYS = {
    "memory": "memory",
    "sequence": "data.sequence_length",
    "micro_batch": "train.batch_size",
    "accumulation": "train.accumulation",
    "batches_at_once": "train.batches_at_once",
    "scores": "mask.scores_dtype",
    "moments": "train.moments",
    "quantization": "model.quantization",
    "quantize_masked": "model.quantize_masked",
}


@dataclass(frozen=True)
class Plan:
    """How a run will train.

    config: the run's, with the chosen formats and batches_at_once in the fields that it left open. remember: whether
    the frozen layers' outputs are cached.
    """

    mode: Mode
    device: torch.device
    config: RunConfig
    remember: bool
    reason: str


def plan_training(config: RunConfig, processes: int = 1) -> Plan:
    """Plan the mode that config.memory names, or for "auto" the fastest mode that fits in the memory that is free now.

    A model whose shapes are unknown is not refused. processes: those on one machine share the host's memory equally.
    Raises: ValueError if there is no such model; if no setting fits, with the numbers and the nearest setting that
        does; or if the disk is too small.
    """
    device = default_device()
    workload = workload_of(config, device, processes)
    name, values = config.model.name, _model_config(config)
    try:
        shape = shape_from_config(values, name, dtype=config.model.dtype)
    except ValueError as error:
        way = config.memory
        if way not in WAYS:  # auto
            ways = ways_over(config.model.quantization, workload.device)
            scores, moments = unless_auto(workload.scores), unless_auto(workload.moments)
            known = replace(workload, scores=scores, moments=moments)
            way = next(one.name for one in ways if one.obstacle(known, quantized=1) is None)
        return _plan(config, way, device, True, f"memory: {way}, not estimated: {error}")
    for layer in workload.layers or ():
        check_rule(
            layer < shape.layers,
            "mask.layers_to_transform",
            f"lie in 0 to {shape.layers - 1}, {shape.name} has {shape.layers} layers",
            layer,
        )
    _check_disk(config, shape, workload)
    device_bytes, host_bytes = free_memory(device)
    choice = choose(shape, workload, device_bytes, host_bytes)
    if choice.chosen is None:
        raise ValueError(_refusal(choice, workload))
    found = choice.estimates[choice.chosen.memory]
    needs = f"{gigabytes(found.device_peak)} of {gigabytes(device_bytes)} on {device}"
    if host_bytes is not None:
        needs += f", {gigabytes(found.host_needed)} of {gigabytes(host_bytes)} in host memory"
    free, held = (device_bytes, found.device_peak) if host_bytes is None else (host_bytes, found.host_peak)
    remember = free - held >= PrefixMemory.max_bytes and _saves_a_tenth(shape, workload)
    reason = f"memory: {choice.way}, an estimated {needs}; {choice.reason}"
    return _plan(config, choice.chosen.memory, device, remember, reason, choice.chosen)


def _model_config(config: RunConfig) -> dict[str, Any]:
    """Return the config of the model. Raises: ValueError if there is no such model, as load_model does."""
    try:
        return read_model_config(config.model.name)
    except ValueError:  # a GGUF file, or no model
        return load_outline(config.model).config.to_dict()


def replan(config: RunConfig, *, way: str, remember: bool) -> Plan:
    """Return the plan of a resumed run: it must run as before to give the same bits."""
    return _plan(config, way, default_device(), remember, f"memory: {way}, as before")


def workload_of(config: RunConfig, device: torch.device, processes: int = 1) -> Workload:
    """Return the settings of a run's configuration that decide its memory."""
    mask, train = config.mask, config.train
    scores, moments = mask.scores_dtype, train.moments
    if mask.modules_to_save:  # weights are trained together with scores, by AdamW in fp32
        scores, moments = unless_auto(scores), unless_auto(moments)
    layers = mask.layers_to_transform
    return Workload(
        memory=config.memory,
        layers=None if layers is None else tuple(layers if isinstance(layers, list) else [layers]),
        target_modules=_masked_names(mask),
        sequence=config.data.sequence_length,
        micro_batch=train.batch_size,
        accumulation=train.accumulation,
        batches_at_once=train.batches_at_once,
        processes=processes,
        scores=scores,
        moments=moments,
        grad_dtype=train.grad_dtype,
        quantization=config.model.quantization,
        quantize_masked=config.model.quantize_masked,
        gradient_checkpointing=train.gradient_checkpointing,
        clipping=train.max_grad_norm is not None,
        keep_ratio=mask.keep_ratio or 0.0,
        fixed_threshold=mask.threshold is not None,
        budget=mask.budget,
        objective=config.objective.name,
        teacher_bytes=_teacher_bytes(config),
        device=device.type,
        reduces_every_batch=train.reduce_every == "micro_batch",
    )


# ---------------------------------------------------------------------------------------------- private


def _plan(
    config: RunConfig, way: str, device: torch.device, remember: bool, reason: str, chosen: Workload | None = None
) -> Plan:
    """Make the plan. chosen: None if nothing was estimated; fields that are "auto" then get their default."""
    scores, moments, at_once = config.mask.scores_dtype, config.train.moments, config.train.batches_at_once
    if chosen is not None:
        scores, moments, at_once = chosen.scores, chosen.moments, chosen.batches_at_once
    model = replace(config.model, quantization=WAYS[way].base(config.model.quantization))
    mask = replace(config.mask, scores_dtype=unless_auto(scores))
    train = replace(config.train, moments=unless_auto(moments), batches_at_once=at_once)
    return Plan(MODES[way], device, replace(config, model=model, mask=mask, train=train), remember, reason)


def _masked_names(mask: MaskConfig) -> tuple[str, ...] | None:
    """Return the name endings of the masked matrices; None for all, and for a pattern, which is estimated as all."""
    modules, parameters = mask.target_modules, mask.target_parameters
    if isinstance(modules, str) or (modules is None and parameters is None):
        return None
    return (*(modules or ()), *(name.removesuffix(".weight") for name in parameters or ()))


def _teacher_bytes(config: RunConfig) -> int:
    """Return the bytes of the teacher's weights on the device; 0 without one, in host memory, or of unknown shapes."""
    name = config.objective.teacher
    if name is None or WAYS[config.objective.teacher_memory or "plain"].offloads:
        return 0
    try:
        shape = shape_from_config(read_model_config(name), name, dtype=config.model.dtype)
    except ValueError:
        return 0
    return shape.parameters * shape.dtype_bytes


def _saves_a_tenth(shape: ModelShape, workload: Workload) -> bool:
    """Return whether the layers below the first masked one (cost 1, others 4) take a tenth of a step's time or more."""
    first = min(workload.layers or (0,))
    return first >= 0.1 * (first + 4 * (shape.layers - first))


def free_memory(device: torch.device) -> tuple[float, float | None]:
    """Return the free bytes on the device, and on the host if it has separate memory."""
    host = _available_host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # shared by torchrun's processes
    return (host, None) if device.type == "cpu" else (torch.cuda.mem_get_info(device)[0], host)


def _available_host_bytes() -> float:
    """Return the bytes that are available without swapping: the kernel's MemAvailable, or the free pages."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_disk(config: RunConfig, shape: ModelShape, workload: Workload) -> None:
    """Raise ValueError if the disk of output_dir has no room for the masks (1 bit per weight) and the logs."""
    layers = shape.layers if workload.layers is None else len(workload.layers)
    targets = shape.targets(None if workload.target_modules is None else list(workload.target_modules))
    weights = layers * sum(n * k for n, k in (shape.matrices[name] for name in targets))
    directory = Path(config.output_dir).absolute()
    while not directory.exists():
        directory = directory.parent
    needed, free = weights / 8 + _LOGS, shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"output_dir must lie on a disk with {gigabytes(needed)} free, {config.output_dir} has {gigabytes(free)}"
        )


def _refusal(choice: Choice, workload: Workload) -> str:
    near = choice.nearest
    if near is None:
        return f"{choice.reason}; no setting was found that fits: mask fewer layers, or take a smaller model"
    changes = [
        f"{_KEYS[item.name]}={'null' if getattr(near, item.name) is None else str(getattr(near, item.name)).lower()}"
        for item in fields(Workload)
        if item.name in _KEYS and getattr(near, item.name) != getattr(workload, item.name)
    ]
    return f"{choice.reason}; the nearest setting that fits: {' '.join(changes)}"
