"""Read the weights of a model on the meta device from its safetensors files: a tensor, or some of its rows, at a time.

    files = WeightFiles(model, make_outline(), directory)    # the dtypes and the ties of from_pretrained
    files.read("model.layers.0.mlp.up_proj.weight")          # its bits
    files.read("model.layers.0.mlp.up_proj.weight", 0, 128)  # reads only these rows

transformers itself renames, joins and casts what is read. Stacked experts are read by expert. Any other tensor that it
makes of several is made whole, and its rows are copied.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from mft.files.json_file import read_object
from mft.models.attached import attach, attached

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_INDEX = 1 << 26  # bytes: a model of 100,000 tensors has 10 MB


class WeightFiles:
    """The weights of ``model``, which stays on the meta device, in the files of a directory.

    Construction gives the parameters the dtypes and ties of from_pretrained, and computes the buffers.
    Args: outline: another such model, which no one else uses; dtype: as for from_pretrained.
    Raises: ValueError if the files do not fit the model.
    """

    def __init__(self, model: Any, outline: Any, directory: Path, dtype: torch.dtype) -> None:
        mapping = get_model_conversion_mapping(outline)
        plan = outline._get_dtype_plan(dtype)
        self._options = {"dtype": dtype, "dtype_plan": plan, "weight_mapping": mapping}
        self._outline, self._file_of = outline, _files_by_key(directory)
        self._shapes = {name: tensor.shape for name, tensor in outline.state_dict().items()}
        self._sources = self._find_sources()
        with self._slices(self._file_of) as slices:
            found = self._load(model, slices, "meta")
        model.mark_tied_weights_as_initialized(found)
        for name, buffer in model.named_non_persistent_buffers():
            _put(model, name, torch.empty_like(buffer, device="cpu"))
        model.initialize_weights()  # the flags of what was loaded keep it from touching anything but buffers
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        self._same: dict[str, str] = {}
        for name, other in model.all_tied_weights_keys.items():
            self._tie(model, name, other)
        model._adjust_missing_and_unexpected_keys(found)
        self.missing = sorted(found.missing_keys)
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta and name not in found.missing_keys:
                _put(model, name, self.read(name).clone())
        attach(model, files=self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightFiles":
        return self

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Return a parameter or buffer, or ``count`` of its rows. A whole one may be mapped: it must not be written."""
        name = self._same.get(name, name)
        shape, sources = self._shapes[name], self._sources[name]
        keys = [key for part in sources.values() for key in part]
        if count is None:
            with self._slices(keys) as slices:
                return self._read(name, slices, shape)
        last, rows = first + count, torch.Size((count, *shape[1:]))
        if count and self._is_stacked(name):
            with self._slices([key for part in sources.values() for key in part[first:last]]) as slices:
                return self._read(name, slices, rows).clone()
        if count and sources.keys() == {None}:
            with self._slices(keys) as slices:
                return self._read(name, {keys[0]: _Rows(slices[keys[0]], slice(first, last))}, rows).clone()
        return self.read(name)[first:last].clone()

    # ---------------------------------------------------------------------------------------------- private

    def _find_sources(self) -> dict[str, dict[str | None, list[str]]]:
        """Return the keys in the files that each parameter and buffer is made of, by the pattern that joins them."""
        changes = self._options["weight_mapping"]
        renamings = [change for change in changes if isinstance(change, loading.WeightRenaming)]
        converters = [change for change in changes if isinstance(change, loading.WeightConverter)]
        empty = self._outline.state_dict()
        prefix = self._outline.base_model_prefix
        found: dict[str, dict[str | None, list[str]]] = {}
        for key in sorted(self._file_of, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, empty)
            if name not in empty and key in empty:
                name, pattern = loading.rename_source_key(key, [], [], prefix, empty)
            if name in empty:
                found.setdefault(name, {}).setdefault(pattern, []).append(key)
        for first in [name for name, sources in found.items() if sources.keys() != {None}]:
            keys = [key for part in found[first].values() for key in part]
            with self._slices(keys) as slices, self._restored():
                missing = self._load(self._outline, slices, "meta").missing_keys
            found |= {name: found[first] for name in empty.keys() - missing}  # one tensor may be split into several
        return found

    def _is_stacked(self, name: str) -> bool:
        """Return whether each row is made of one tensor per pattern in the files, as for stacked experts."""
        sources = self._sources[name]
        if None in sources or any(len(part) != self._shapes[name][0] for part in sources.values()):
            return False
        of = next(change for change in self._options["weight_mapping"] if next(iter(sources)) in change.source_patterns)
        first, *others = of.operations
        stacks = isinstance(first, loading.MergeModulelist) and first.dim == 0
        return stacks and all(isinstance(op, loading.Concatenate) and op.dim > 0 for op in others)

    def _tie(self, model: Any, name: str, other: str) -> None:
        """Let two parameters that the model ties be one, unless the files have both and they differ."""
        there = [each for each in (name, other) if each in self._sources]
        if len(there) == 2:
            if not torch.equal(self.read(name), self.read(other)):
                return
            _put(model, name, model.get_parameter(other))
        self._same |= dict.fromkeys((name, other), there[-1]) if there else {}

    def _read(self, name: str, slices: Mapping[str, Any], shape: torch.Size) -> Tensor:
        outline = self._outline
        with self._restored():
            before = outline.get_parameter_or_buffer(name)
            made = torch.empty(shape, dtype=before.dtype, device="meta")
            is_parameter = isinstance(before, nn.Parameter)
            _put(outline, name, nn.Parameter(made, requires_grad=before.requires_grad) if is_parameter else made)
            self._load(outline, slices, "cpu")
            return outline.get_parameter_or_buffer(name).detach()

    def _load(self, model: Any, slices: Mapping[str, Any], device: str) -> Any:
        # A map that names the disk makes it read one tensor after the other; no parameter has that name.
        places = {"": torch.device(device), "-": "disk"}
        with quiet_progress():
            settings = LoadStateDictConfig(device_map=places, **self._options)
            found, _ = loading.convert_and_load_state_dict_in_model(model, dict(slices), settings)
        for name, shape, wanted in found.mismatched_keys:
            raise ValueError(f"{name} must have the model's shape {tuple(wanted)}, the file has {tuple(shape)}")
        for name, error in found.conversion_errors.items():
            raise ValueError(f"{name} must be made of what the files have, got {error}")
        return found

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put the outline's own tensors back afterwards."""
        outline = self._outline
        before = dict(outline.state_dict(keep_vars=True))
        try:
            yield
        finally:
            for name, tensor in before.items():
                if outline.get_parameter_or_buffer(name) is not tensor:
                    _put(outline, name, tensor)

    @contextmanager
    def _slices(self, keys: Any) -> Iterator[dict[str, Any]]:
        """Yield the slices of these keys. Nothing is read before they are indexed."""
        with ExitStack() as stack:
            paths = {self._file_of[key] for key in keys}
            opened = {path: stack.enter_context(safe_open(path, framework="pt", device="cpu")) for path in paths}
            yield {key: opened[self._file_of[key]].get_slice(key) for key in keys}


class _Rows:
    """Some rows of a slice of a file, which are read when it is indexed by an ellipsis."""

    def __init__(self, whole: Any, rows: slice) -> None:
        self._whole, self._rows = whole, rows

    def __getitem__(self, index: Any) -> Tensor:
        return self._whole[self._rows]


def weight_files(model: nn.Module) -> WeightFiles | None:
    """Return what reads the weights of a model that was loaded without them; None for any other model."""
    return attached(model).files


def are_readable(settings: Any, directory: Path) -> bool:
    """Return whether WeightFiles can read this model: it reads neither codes nor files under other names."""
    plain = getattr(settings, "quantization_config", None) is None
    named = getattr(settings, "transformers_weights", None) is None and not type(settings).extra_files
    return plain and named and any((directory / name).is_file() for name in (WEIGHTS, INDEX))


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide transformers' progress bars while weights load, which is quick. A download's own bar stays."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def _files_by_key(directory: Path) -> dict[str, Path]:
    """Return the file of each key, as from_pretrained finds them."""
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        names = sorted(set(read_object(directory / INDEX, MOST_INDEX)["weight_map"].values()))
    found: dict[str, Path] = {}
    for name in names:
        with safe_open(directory / name, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), directory / name)
    return found


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer of this name."""
    path, _, part = name.rpartition(".")
    setattr(model.get_submodule(path), part, tensor)
