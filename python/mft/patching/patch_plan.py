"""Plan a patch: which elements of which tensors it changes, and whether the file is the masks' base."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import dequantize
from gguf.constants import GGMLQuantizationType
from torch import Tensor, nn

from mft.files.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from mft.files.weights_hash import weights_hash
from mft.masks.export import check_shapes, weight_named
from mft.masks.export_format import (
    MaskEntry,
    MaskExport,
    check_masks_alone,
    content_hash,
    read_description,
    read_tensors,
)
from mft.masks.location import masks_directory
from mft.patching.layout import Layout
from mft.patching.outline import gguf_outline
from mft.patching.threads import make_ahead

LoadBase = Callable[[], nn.Module]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Correlation of a layer's weights in the file with those in the base. Weights of another model, or in another order,
# correlate at about 0. A ternary quantisation of ordinary weights has 0.75, and 3 bits have 0.98.
_LEAST_CORRELATION = 0.5


@dataclass(frozen=True)
class Plan:
    """The weights of a file that masks drop."""

    path: Path
    header: GgufHeader
    export: MaskExport
    masks_hash: str  # content_hash of the export
    dropped: dict[str, np.ndarray]  # {name of a tensor with masked weights: its dropped elements, ascending}
    base: str  # a sentence that says whether the file is the masks' base

    @property
    def count(self) -> int:
        return sum(map(len, self.dropped.values()))

    def tensor(self, name: str) -> GgufTensor:
        return self.header.tensors[name]


def plan_patch(
    model: str | os.PathLike, masks: str | os.PathLike, *, load_base: LoadBase | None = None, force: bool = False
) -> Plan:
    """Read a GGUF file and masks, and find the weights that they drop. Arguments and errors are those of patch_gguf."""
    path, directory = Path(model), masks_directory(masks)
    header = read_gguf_header(path)
    export = read_description(directory)
    check_masks_alone(export, directory, "mft patch")
    layers = {entry.name: entry.shape for entry in export.modules}
    layout = Layout(path, header, gguf_outline(path, header), layers)
    base = _Base(path, layout, export, load_base)
    words = base.judge(directory, force=force)
    read, _ = read_tensors(directory, export, base.weight)
    parts: dict[str, list[np.ndarray]] = {}
    for entry in export.modules:
        for tensor, elements in layout.elements(entry.name, _dropped(read[entry.name], entry)):
            parts.setdefault(tensor.name, []).append(elements)
    dropped = {name: np.unique(np.concatenate(found)) if len(found) > 1 else found[0] for name, found in parts.items()}
    return Plan(path, header, export, export.content_hash or content_hash(export, read), dropped, words)


def tensor_values(path: Path, tensor: GgufTensor) -> np.ndarray:
    """Return the decoded values of a tensor, float32 in its shape. Raises: ValueError if gguf cannot decode it."""
    return decode_tensor(path, tensor, np.fromfile(path, np.uint8, tensor.size, offset=tensor.start))


def decode_tensor(path: Path, tensor: GgufTensor, stored: np.ndarray) -> np.ndarray:
    """Return tensor_values from a tensor's stored bytes. path: for the message."""
    kind = GGMLQuantizationType(tensor.kind)
    try:
        with np.errstate(all="ignore"):  # scales may be NaN
            values = dequantize(stored.reshape(math.prod(tensor.shape[:-1]), -1), kind)
    except NotImplementedError:
        raise ValueError(f"{path}: {tensor.name} must be of a type that gguf decodes, got {kind.name}") from None
    return values.reshape(tensor.shape)


def _dropped(packed: Tensor, entry: MaskEntry) -> np.ndarray:
    """Return the flat places where a packed mask is 0. It uses numpy, as torch's threads stall on a busy machine."""
    kept = np.unpackbits(packed.numpy().view(np.uint8), axis=-1, count=entry.shape[-1], bitorder="little")
    return np.flatnonzero(kept == 0)


class _Base:
    """Tells whether a file holds the weights that masks were learned on, and returns these weights."""

    def __init__(self, path: Path, layout: Layout, export: MaskExport, load: LoadBase | None) -> None:
        self.path, self.layout, self.export, self.load = path, layout, export, load
        self.entries = {entry.name: entry for entry in export.modules}
        self.model: nn.Module | None = None  # the base, if the file's weights are not bit-equal to it

    def judge(self, directory: Path, *, force: bool) -> str:
        """Return a sentence on whether the file is the base. Raises: ValueError if it is not, without force."""
        names = sorted(self.entries)
        ahead = make_ahead(lambda name: self._file_weight(self.entries[name]), names)
        found = weights_hash(names, lambda _: next(ahead))  # weights_hash asks in sorted order too
        if found == self.export.base_hash:
            return f"{self.path} is the base of the masks: its weights have their hash"
        if force:
            self.model = self.load() if self.load is not None and self.export.coding == "by_weight" else None
            return f"{self.path} is not bit-identical to the base of the masks, and was not compared with it (force)"
        if self.load is None:
            raise ValueError(
                f"{self.path} must hold the weights that the masks in {directory} were learned on, "
                f"{self.export.base_hash}, got {found}: name that file; if it is a quantisation of that model, "
                "give the model to compare it with (load_base), or take it as it is (force=True, --force)"
            )
        self.model = self.load()
        check_shapes(self.model, {name: entry.shape for name, entry in self.entries.items()})
        name, least = min(((name, self._correlation(name)) for name in self.entries), key=lambda pair: pair[1])
        if not least >= _LEAST_CORRELATION:
            raise ValueError(
                f"{self.path} must be a quantisation of the model that the masks in {directory} were learned on, got "
                f"weights of {name} whose correlation with its weights is {least:.2f}: name the file of that model, or "
                "take it as it is (force, --force)"
            )
        likeness = (
            f"shapes agree, and the correlation of weights is {math.floor(1e5 * least) / 1e5:.5f} or more "
            f"(lowest in {name})"
        )
        kinds = set().union(*map(self._kinds, names))
        if not kinds <= _FLOATS.keys():
            return f"{self.path} is taken for a quantisation of the base of the masks: {likeness}"
        formats = ", ".join(sorted(kind.name for kind in kinds))
        if self._is_rounded_base(names):
            return f"{self.path} is the base of the masks, rounded to {formats}"
        return (
            f"warning: {self.path} holds other weights than the base of the masks, in {formats}: it is no "
            f"quantisation, and may be another model, such as a fine-tune or a merged model; {likeness}"
        )

    def weight(self, name: str) -> Tensor:
        """Return the weight that a layer's mask was learned on, for a coding that needs it."""
        return self._file_weight(self.entries[name]) if self.model is None else weight_named(self.model, name)

    def _file_weight(self, entry: MaskEntry) -> Tensor:
        values = {tensor.name: tensor_values(self.path, tensor) for tensor in self.layout.tensors[entry.name]}
        weight = torch.from_numpy(np.ascontiguousarray(self.layout.weight(entry.name, values)))
        return weight.to(_DTYPES.get(entry.dtype, torch.float32))

    def _kinds(self, name: str) -> set[GGMLQuantizationType]:
        return {GGMLQuantizationType(tensor.kind) for tensor in self.layout.tensors[name]}

    def _is_rounded_base(self, names: list[str]) -> bool:
        """Return whether the loaded model is the masks' base, and the file holds its weights in other float formats."""
        model = self.model
        assert model is not None
        if weights_hash(names, lambda name: weight_named(model, name)) != self.export.base_hash:
            return False
        for name in names:
            kinds, ours = self._kinds(name), self._file_weight(self.entries[name])
            rounded = (weight_named(model, name).cpu().to(_FLOATS[kind]).to(ours.dtype) for kind in kinds)
            if len(kinds) > 1 or not torch.equal(ours, next(rounded)):
                return False
        return True

    def _correlation(self, name: str) -> float:
        assert self.model is not None
        ours = self._file_weight(self.entries[name]).double().flatten()
        theirs = weight_named(self.model, name).double().flatten().cpu()
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        found = float(ours @ theirs / (ours.norm() * theirs.norm()))
        return found if math.isfinite(found) else 0.0
