"""Masks on disk: adapter_config.json and adapter_model.safetensors in PEFT's spelling, at most 1 bit per weight.

An export holds the masks (and modules_to_save), but no scores and no optimiser state. It serves evaluation, merging, or
as a start for further training. It stores a hash of the base weights that the masks were learned on.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft.checks import check_one_of
from mft.config import CODINGS, MaskConfig
from mft.files.atomic import atomic_directory
from mft.files.weights_hash import dtype_name, weights_hash
from mft.masks.budget import check_within_budget
from mft.masks.convert import (
    came_from_conv1d,
    check_unwrapped,
    convert,
    masked_modules,
    no_masks_error,
    set_scores,
)
from mft.masks.export_format import (
    CONFIG_FILE,
    MASK_FILE,
    UNVERIFIED,
    MaskEntry,
    MaskExport,
    Weights,
    check_base,
    content_hash,
    export_files,
    is_export,
    read_description,
    read_tensors,
    read_whole_export,
)
from mft.masks.in_place.model import use_masked_layers
from mft.masks.inspection import kept_weights
from mft.masks.location import masks_directory
from mft.masks.saved_modules import check_saved_tensors, put_saved_tensors, saved_modules, saved_tensors
from mft.models.attached import attach, attached
from mft.models.codes.weight import quantized_weights
from mft.models.linears import find_targets, layer_index, layer_stacks, linear_named
from mft.models.parallel import check_unsharded, uncompiled, unwrapped
from mft.models.weight_files import weight_files
from mft_kernels import MaskedLayer, unpack_mask

logger = logging.getLogger(__name__)

# Scores of a loaded mask lie _MARGIN above or below the threshold, on the scale of freshly initialised scores.
_THRESHOLD = {"magnitude": 0.02, "value": 0.0}
_MARGIN = 0.01


def save_masks(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    base_model_name_or_path: str | None = None,
    coding: str = "rice",
    masks: dict[str, Tensor] | None = None,
    system_prompt: str | None = None,
) -> Path:
    """Write a masked model's masks and its modules_to_save. Either the whole export appears in directory, or nothing.

    Args:
        model: may be wrapped in torch.compile or DistributedDataParallel. A model that fully_shard has sharded can be
            saved only under gathered(model). One process writes.
        directory: new, empty, or an earlier export, which is replaced. Anything else is refused.
        base_model_name_or_path: stored for the reader; by default the name that the model was loaded from.
        coding: "rice" is about the entropy of the masks (0.08 bit per weight if 99 % are kept). "by_weight" is a sixth
            smaller if small weights are dropped first, but only a reader that has the base's weights can use it.
            "packed" is 1 bit per weight and can also be read by versions that know only format 2.
        masks: the packed masks by layer, for a model that does not hold its scores itself.
        system_prompt: stored for the reader: the one with which all chats began on which the masks were learned.
    Returns: the directory.
    Raises: ValueError for a wrong argument, or for by_weight if the masked layers are quantised.
    """
    check_one_of("coding", coding, CODINGS)
    model = unwrapped(model)
    check_unwrapped(model)
    target = Path(directory)
    with use_masked_layers(model):
        masked = masked_modules(model)
        if not masked:
            raise nothing_to_save_error(model)
        _check_replaceable(target)
        if base_model_name_or_path is None:
            base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        if masks is None:
            masks = {name: module.packed_mask().cpu().contiguous() for name, module in masked.items()}
        saved = saved_tensors(model)
        export = _describe(model, masked, masks, saved, base_model_name_or_path, system_prompt)
        check_within_budget(model, sum(entry.kept for entry in export.modules))
        export = dataclasses.replace(export, coding=coding)
        return _write(target, export, masks, saved, partial(_exact_weight, model))


@torch.no_grad()
def recode_masks(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    coding: str = "rice",
    model: nn.Module | None = None,
) -> Path:
    """Write an export again with its masks stored in another coding. Its content, and so its content_hash, stay equal.

    Args:
        source: as for load_masks.
        directory, coding: as for save_masks; directory may be source.
        model: the base that the masks were learned on. Reading or writing coding by_weight needs it.
    Returns: the directory.
    Raises: the errors of load_masks; ValueError for an unknown coding, or a directory that holds anything else.
    """
    check_one_of("coding", coding, CODINGS)
    target = Path(directory)
    _check_replaceable(target)
    inner = None if model is None else uncompiled(model)
    weights = None if inner is None else partial(_exact_weight, inner)
    return _write(target, *recode_export(masks_directory(source), coding, inner), weights)


def recode_export(
    directory: Path, coding: str, model: nn.Module | None = None
) -> tuple[MaskExport, dict[str, Tensor], dict[str, Tensor]]:
    """Return an export's description with the new coding, its masks and its saved tensors, for export_files."""
    if model is None:
        export, masks, saved = read_whole_export(directory)
    else:
        export = read_description(directory)
        _check_fit(model, {entry.name: entry.shape for entry in export.modules})
        masks, saved = read_learned(model, export, directory, force=False)
    hashed = export.content_hash or content_hash(export, masks, saved)  # version 1 may lack it
    return dataclasses.replace(export, coding=coding, content_hash=hashed), masks, saved


@torch.no_grad()
def load_masks(
    model: nn.Module, directory: str | os.PathLike, *, revision: str | None = None, force: bool = False
) -> nn.Module:
    """Put the masks of an export on a model, in place.

    An ordinary model is converted as by mask_model; in a masked model the scores are replaced. The masks are exactly
    the stored ones: the threshold is fixed, and every score lies at the same distance from it.

    Args:
        model: the base that the masks were learned on, ordinary or masked in the same layers; may be wrapped in
            torch.compile.
        directory: an export of save_masks, or a run of mft train. A string may be a Hub repository, user/name or
            user/name@revision, if no directory has that name.
        revision: for a repository: a branch, a tag, or a commit hash, which pins it.
        force: accept other base weights of the same shapes. Coding by_weight cannot be read with other weights.
    Returns: the same model.
    Raises: FileNotFoundError; OSError if the Hub cannot be reached; ValueError if the export is damaged, does not fit
        the model, or (without force) was learned on other weights. The model is then unchanged.
    """
    inner = uncompiled(model)
    check_unwrapped(inner)
    check_unsharded(inner)
    path = masks_directory(directory, revision)
    export = read_description(path)
    kept_whole = export.modules_to_save or []
    shapes = {entry.name: entry.shape for entry in export.modules}
    _check_fit(inner, shapes)
    masks, saved = read_learned(inner, export, path, force=force)
    check_saved_tensors(inner, kept_whole, saved)
    put_masks(inner, masks, shapes, mode=export.mode, keep_ratio=export.keep_ratio)
    put_saved_tensors(inner, kept_whole, saved)
    return model


@torch.no_grad()
def put_masks(
    model: nn.Module,
    masks: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    *,
    mode: str = "magnitude",
    keep_ratio: float | None = None,
) -> nn.Module:
    """Put masks that have been read already on a model, as load_masks does, without a check of the base weights.

    Args: masks: packed, by module name; shapes: of their weights, (N, K), or (E, N, K) for experts.
    Raises: ValueError if they do not fit the model, which is then unchanged.
    """
    _check_fit(model, shapes)
    masked = masked_modules(model)
    if not masked:
        convert(model, list(shapes), loaded_config(mode))
        masked = masked_modules(model)
    for name, packed in masks.items():
        module = masked[name]
        module.mode, module.threshold, module.pattern = mode, _THRESHOLD[mode], "matrix"
        if keep_ratio is not None:
            module.keep_ratio = keep_ratio
        set_scores(module, scores_of_mask(packed.to(module.scores.device), module.scores.shape, mode))
    return model


def loaded_config(mode: str) -> MaskConfig:
    """Return the configuration of a loaded mask: a fixed threshold, see scores_of_mask."""
    return MaskConfig(mode=mode, init="constant", threshold=_THRESHOLD[mode])


def scores_of_mask(packed: Tensor, shape: tuple[int, ...] | torch.Size, mode: str) -> Tensor:
    """Return fp32 scores (N, K) that select exactly this mask, all equally far from loaded_config's threshold."""
    return scores_of_keep(unpack_mask(packed, shape), mode)


def scores_of_keep(keep: Tensor, mode: str) -> Tensor:
    """Return such scores for a boolean mask of any shape."""
    threshold = _THRESHOLD[mode]
    return torch.where(keep, threshold + _MARGIN, threshold - _MARGIN)


def base_hash(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Return the sha256 of the layers' names, weight dtypes, shapes (N, K) and bytes. Masking does not change it.

    Args: names: the layers, by default the masked ones. Weights are read in chunks, never copied whole.
    Raises: ValueError if a layer's exact weight is gone, because it was quantised without keep_base_hash.
    """
    with use_masked_layers(model):
        hashed = set(masked_modules(model) if names is None else names)
        quantized = sorted(hashed & quantized_weights(model).keys())
        known, found = attached(model).exact_base or (set(), "")
        if not quantized:
            return weights_hash(hashed, partial(weight_named, model))
        if hashed != known:
            raise ValueError(
                f"model must hold the exact weights that are hashed, got {len(quantized)} that are quantised "
                f"({quantized[0]}, ...): load the unquantised model"
            )
        return found


def weight_named(model: nn.Module, name: str) -> Tensor:
    """Return the weight (N, K) of a masked layer, or the parameter of experts; from the files if it is on meta."""
    path, _, part = name.rpartition(".")
    files, alone = weight_files(model), model.get_submodule(path)._parameters.get(part)
    if alone is not None:
        return alone.detach() if files is None else files.read(name)
    module = linear_named(model, name)
    if files is None:
        return module.weight.detach().t() if isinstance(module, Conv1D) else module.weight.detach()
    weight = files.read(name if module.weight.dim() == 3 else f"{name}.weight")
    return weight.t() if isinstance(module, Conv1D) or came_from_conv1d(module) else weight


@torch.no_grad()
def read_learned(
    model: nn.Module, export: MaskExport, directory: Path, *, force: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run read_tensors on an export that was learned on model's weights, or (with force) on others of the same shapes.

    Args: export: read_description of directory; model must have all its layers.
    Raises: ValueError if the shapes or, without force, the weights differ; the errors of read_tensors.
    """
    check_shapes(model, {entry.name: entry.shape for entry in export.modules})
    found = base_hash(model, [entry.name for entry in export.modules])
    check_base(export, directory, found, partial(weight_named, model), force=force)
    masks, saved = read_tensors(directory, export, partial(_exact_weight, model))
    if export.content_hash is None:
        logger.warning("%s: %s", directory, UNVERIFIED)
    return masks, saved


def check_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the layers of these names have weights of these shapes (N, K)."""
    for name, expected in shapes.items():
        shape = tuple(weight_named(model, name).shape)
        if shape != expected:
            raise ValueError(
                f"{name}: the mask is for a weight of {expected}, the model's is {shape}: load the base that it was "
                "learned on"
            )


def nothing_to_save_error(model: nn.Module) -> ValueError:
    """Return the error for a model without masked layers, from which no masks can be saved."""
    under_peft = "save mft.to_masked_model(model), which takes this model apart; model.save_pretrained keeps the scores"
    return no_masks_error(model, "save", "mask_model it first", under_peft)


def keep_base_hash(model: nn.Module) -> None:
    """Remember base_hash(model) of the masked layers' exact weights, which are about to be replaced by codes."""
    names = set(masked_modules(model))
    if names:
        attach(model, exact_base=(names, base_hash(model)))


# ---------------------------------------------------------------------------------------------- private


def _describe(
    model: nn.Module,
    masked: dict[str, MaskedLayer],
    packed: dict[str, Tensor],
    saved: dict[str, Tensor],
    base: str | None,
    system_prompt: str | None,
) -> MaskExport:
    modes = sorted({module.mode for module in masked.values()})
    if len(modes) > 1:
        raise ValueError(f"masked layers must share one mode to be saved together, got {' and '.join(modes)}")
    ratios = {module.keep_ratio if module.threshold is None else None for module in masked.values()}
    patterns = {module.pattern for module in masked.values()}
    stacks = layer_stacks(model)
    layers = sorted({index for name in masked if (index := layer_index(name, stacks)) is not None})
    quantized = quantized_weights(model)
    entries = [
        MaskEntry(name, tuple(module.scores.shape), dtype_name(module.weight), kept_weights([packed[name]]))
        for name, module in masked.items()
    ]
    export = MaskExport(
        base_model_name_or_path=base,
        base_hash=base_hash(model),
        mode=modes[0],
        keep_ratio=ratios.pop() if len(ratios) == 1 else None,
        target_modules=sorted({name.rpartition(".")[2] for name in masked}),
        layers_to_transform=layers or None,
        modules=entries,
        base_quantization=next((weight.kind for weight in quantized.values()), None),
        quantize_masked=not quantized.keys().isdisjoint(masked),
        modules_to_save=list(saved_modules(model)) or None,
        system_prompt=system_prompt,
        pattern=None if patterns == {"matrix"} or len(patterns) > 1 else patterns.pop(),
    )
    return dataclasses.replace(export, content_hash=content_hash(export, packed, saved))


def _write(
    target: Path, export: MaskExport, packed: dict[str, Tensor], saved: dict[str, Tensor], weights: Weights | None
) -> Path:
    """Both files, or nothing."""
    with atomic_directory(target) as scratch:
        for name, content in export_files(export, packed, saved, weights).items():
            (scratch / name).write_bytes(content)
    return target


def _check_fit(model: nn.Module, stored: dict[str, tuple[int, ...]]) -> None:
    masked = masked_modules(model)
    if masked and masked.keys() != stored.keys():
        missing, extra = sorted(stored.keys() - masked.keys()), sorted(masked.keys() - stored.keys())
        raise ValueError(
            f"model must be masked in the {len(stored)} layers of the export, or in none; "
            f"only in the export: {missing[:3] or 'none'}, only in the model: {extra[:3] or 'none'}"
        )
    if not masked:
        find_targets(model, stored)
    check_shapes(model, stored)


def _exact_weight(model: nn.Module, name: str) -> Tensor:
    """Return weight_named(model, name). Raises: ValueError if that weight is quantised."""
    if name in quantized_weights(model):
        raise ValueError(
            f"coding by_weight needs the exact weights, got {name} quantised: choose coding rice or packed to save "
            "masks here; to read them, load the unquantised model"
        )
    return weight_named(model, name)


def _check_replaceable(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        kind = "a symbolic link" if target.is_symlink() else "a file"
        raise ValueError(f"directory must be a directory, or not exist yet, got {kind}: {target}")
    if not target.exists() or not any(target.iterdir()):
        return
    if not is_export(target):
        held = ", ".join(sorted(path.name for path in target.iterdir())[:3])
        raise ValueError(
            f"directory must be new, empty or an earlier export of masks, got {target}, which holds {held}: choose "
            "another one"
        )
    foreign = sorted({path.name for path in target.iterdir()} - {CONFIG_FILE, MASK_FILE})
    if foreign:
        raise ValueError(
            f"directory {target} holds more than an export ({', '.join(foreign[:3])}), which replacing it "
            "would lose: move that, or choose another directory"
        )
