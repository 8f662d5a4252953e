"""The export format of masks, version 4. Files are untrusted: every key, shape, bit and byte count is checked.

adapter_config.json holds the fields of MaskExport, peft_type "MFT" and format_version. adapter_model.safetensors holds
for each module "<name>.mask", int32 (N, ceil(K / 32)), or (E, N, ceil(K / 32)) for experts in one parameter. Bit j % 32
of word j // 32 in row n is set if weight (n, j) is kept. It also holds the tensors of modules_to_save, under their
names in the model.

Versions 3 and 4 have a key coding. It says how the same mask is stored in another tensor (files/mask_coding.py): "rice"
in version 3, or "by_weight" in version 4, which can be read only with the base's weights. Masks without a coding are
written as version 2, which older readers know. Version 1 equals version 2, but content_hash and the fields on
quantisation may be missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from mft.config import CODINGS, PATTERNS, QUANTIZATIONS
from mft.config import CONFIG as RUN_CONFIG
from mft.files.json_file import check_keys, expect, is_list_of, is_number, read_object, short
from mft.files.mask_coding import BY_NAME, codings_of, damage_error, packed_mask
from mft.files.rice import Words
from mft.files.safetensors_file import MOST_HEADER, open_tensors
from mft.files.weights_hash import dtype_name
from mft.masks.saved_modules import is_inside

CONFIG_FILE = "adapter_config.json"
MASK_FILE = "adapter_model.safetensors"
MODEL = "model"  # in the directory of a run of mft finetune
PEFT_TYPE = "MFT"
FORMAT_VERSION = max(coding.version for coding in BY_NAME.values())
_UNHASHED_VERSION = 1  # may lack content_hash
MOST_CONFIG = 1 << 24  # bytes, for 120,000 masked layers; 100 layers of 256 experts with 3 matrices each have 76,800
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_HASH_RULE = 'a string "sha256:" and 64 hexadecimal digits'
_ALONE = CODINGS[1]  # the coding for readers without the weights
_MODES = ("magnitude", "value")
_COPY_BOTH = "the two files come from different exports, or are damaged; copy both again"
_MASKED_RULE = "true or false, and false if base_quantization is null"
UNVERIFIED = "no content_hash, as in format_version 1: swapped masks cannot be detected; save_masks writes one"
Weights = Callable[[str], Tensor]  # a masked layer's name -> its base weight, (N, K), or (E, N, K) for experts
_FIXED = {"peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM"}
_IF_ANY = ("modules_to_save", "system_prompt", "pattern")  # absent if None, as in files of earlier versions


@dataclass(frozen=True)
class MaskEntry:
    """One masked layer: its weight, (N, K) or (E, N, K) for experts in one parameter, and how many weights are kept."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: int


@dataclass(frozen=True)
class MaskExport:
    """The content of adapter_config.json.

    keep_ratio is None if the masks came from thresholds, or if the layers' keep ratios differ.
    base_quantization: format of the other linears while the masks were learned; None: not quantised.
    quantize_masked: whether the masked layers were quantised too.
    content_hash: see content_hash(). Version 1 may lack this field and the two above; then it is None.
    modules_to_save: modules whose tensors are saved too; the key is absent if there are none.
    pattern: where keep_ratio held, if not in each whole matrix; the key is absent otherwise.
    system_prompt: the one that all chats of the training data share; the key is absent if there is none.
    coding: one of CODINGS, how the masks are stored; not part of the content.
    """

    base_model_name_or_path: str | None
    base_hash: str
    mode: str
    keep_ratio: float | None
    target_modules: list[str]
    layers_to_transform: list[int] | None
    modules: list[MaskEntry]
    base_quantization: str | None = None
    quantize_masked: bool = False
    content_hash: str | None = None
    modules_to_save: list[str] | None = None
    system_prompt: str | None = None
    pattern: str | None = None
    coding: str = CODINGS[0]

    def to_json(self) -> str:
        """Return the JSON text, with one module per line."""
        fields = _content_fields(self)
        modules = [json.dumps(entry) for entry in fields.pop("modules")]
        version: dict[str, Any] = {"format_version": BY_NAME[self.coding].version}
        if self.coding != CODINGS[0]:
            version["coding"] = self.coding
        head = json.dumps({**_FIXED, **version, **fields}, indent=2)
        return head.removesuffix("\n}") + ',\n  "modules": [\n    ' + ",\n    ".join(modules) + "\n  ]\n}\n"


def content_hash(export: MaskExport, masks: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None = None) -> str:
    """Return the sha256 of the other fields, packed masks and saved tensors. It detects damage to either file."""
    words = ((name, [masks[name].contiguous().view(-1).numpy()]) for name in sorted(masks))
    return _hash_of(export, words, sorted((saved or {}).items()))


def export_files(
    export: MaskExport,
    masks: Mapping[str, Tensor],
    saved: Mapping[str, Tensor] | None = None,
    weights: Weights | None = None,
) -> dict[str, bytes]:
    """Return the bytes of the two files by name. Raises: ValueError if the coding needs weights and got None."""
    coding = BY_NAME[export.coding]
    if coding.needs_weight and weights is None:
        raise ValueError(
            f"coding {export.coding} needs the base's weights to write, got masks alone: mft recode loads the base, "
            "as does mft.recode_masks(..., model=base)"
        )
    stored = {
        f"{entry.name}.mask": coding.store(masks[entry.name], entry.shape, _weight_for(export, entry, weights))
        for entry in export.modules
    }
    tensors = stored | dict(saved or {})
    return {CONFIG_FILE: export.to_json().encode(), MASK_FILE: safetensors.torch.save(tensors, {"format": "pt"})}


def is_export(directory: Path) -> bool:
    """Return whether directory claims to hold masks of this software; the files may still be damaged."""
    try:
        values = read_object(directory / CONFIG_FILE, MOST_CONFIG)
    except (OSError, ValueError):
        return False
    return values.get("peft_type") == PEFT_TYPE and not _is_of_peft(values)


def read_export(directory: Path) -> MaskExport:
    """Return the description of an export and check its other file too. Masks are not read if that needs weights.

    Raises: FileNotFoundError, or ValueError that names the file, its content and the expected content.
    """
    export = read_description(directory)
    if BY_NAME[export.coding].needs_weight:
        with _open_checked(directory / MASK_FILE, export):
            return export
    _check_hash(directory, export, stored_hash(directory, export))
    return export


def stored_hash(directory: Path, export: MaskExport) -> str:
    """Return content_hash of an export's other file with this description, whatever hash the description names.

    Only a block of a mask is in memory at a time: a small file may describe large ones.
    Raises: as read_tensors without weights.
    """
    _check_alone(directory, export)
    path, entries = directory / MASK_FILE, sorted(export.modules, key=lambda entry: entry.name)
    with _open_checked(path, export) as (file, saved):
        words = ((entry.name, _read_words(path, file, export, entry)) for entry in entries)
        return _hash_of(export, words, ((key, file.get_tensor(key)) for key in sorted(saved)))


def read_whole_export(directory: Path) -> tuple[MaskExport, dict[str, Tensor], dict[str, Tensor]]:
    """Return read_description, and what read_tensors returns without weights."""
    export = read_description(directory)
    return export, *read_tensors(directory, export)


def read_description(directory: Path) -> MaskExport:
    """Return the description of an export that has both files. Raises: as read_export."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: expected a directory with {CONFIG_FILE} and {MASK_FILE}, got "
            f"{'a file' if directory.exists() else 'nothing there'}"
        )
    check_run_has_masks(directory)
    for name in (CONFIG_FILE, MASK_FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(
                f"{directory / name}: missing; an export has {CONFIG_FILE} and {MASK_FILE}: copy both"
            )
    return read_config(directory / CONFIG_FILE)


def check_run_has_masks(directory: Path) -> None:
    """Raise ValueError if directory is a run's and holds no masks: of mft train before its end, or of mft finetune."""
    if not (directory / RUN_CONFIG).is_file() or (directory / CONFIG_FILE).exists():
        return
    if (model := directory / MODEL).exists():
        raise ValueError(
            f"{directory} must hold masks, got a run of mft finetune: it trains all weights, and its result is an "
            f"ordinary model, {model}"
        )
    raise ValueError(
        f"{directory} must hold masks, got a run that is not finished: mft train --resume {directory} goes on with it"
    )


def read_tensors(
    directory: Path, export: MaskExport, weights: Weights | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the packed mask of each module by name, and the tensors of modules_to_save.

    Args:
        export: read_description of directory.
        weights: those that the masks were learned on, checked by base_hash. Only a coding that needs them reads them.
    Raises: as read_export; ValueError if the coding needs weights and weights is None.
    """
    if weights is None:
        _check_alone(directory, export)
    path = directory / MASK_FILE
    with _open_checked(path, export) as (file, keys):
        masks = {
            entry.name: packed_mask(_read_words(path, file, export, entry, weights), entry.shape)
            for entry in export.modules
        }
        saved = {key: file.get_tensor(key) for key in keys}
    if export.content_hash is not None:
        _check_hash(directory, export, content_hash(export, masks, saved))
    return masks, saved


def check_masks_alone(export: MaskExport, directory: Path, reader: str) -> None:
    """Raise ValueError if modules_to_save were saved with the masks, because ``reader`` cannot use them."""
    if export.modules_to_save:
        raise ValueError(
            f"{directory}: expected masks alone, got modules_to_save too ({', '.join(export.modules_to_save)}): they "
            f"are not for {reader}; use load_masks"
        )


def check_base(export: MaskExport, directory: Path, found: str, weights: Weights, *, force: bool) -> None:
    """Raise ValueError unless found, the hash of the model's weights, is the export's, or force allows another."""
    if found == export.base_hash or (force and not BY_NAME[export.coding].needs_weight):
        return
    learned_on = export.base_model_name_or_path or "a base without a name"
    message = (
        f"{directory}: the masks were learned on other weights of the same shapes ({learned_on}): expected base "
        f"{export.base_hash}, the model's is {found}"
    )
    dtypes = sorted({dtype_name(weights(entry.name)) for entry in export.modules})
    stored = sorted({entry.dtype for entry in export.modules})
    if dtypes != stored:
        message += f". The model's weights are {' '.join(dtypes)}, those were {' '.join(stored)}: load it in that dtype"
    if BY_NAME[export.coding].needs_weight:
        raise ValueError(
            f"{message}. Masks in coding {export.coding} can only be read with exactly the weights that they were "
            f"learned on: mft recode {directory} DIRECTORY on that base writes masks that --force takes"
        )
    raise ValueError(f"{message}. To use the masks on this model anyway, pass force=True (--force)")


def most_bytes(export: MaskExport) -> int | None:
    """Return an upper bound in bytes for the mask file; None with modules_to_save, whose sizes are not described."""
    if export.modules_to_save:
        return None
    return MOST_HEADER + 8 + sum(BY_NAME[export.coding].most_bytes(entry.shape) for entry in export.modules)


# ---------------------------------------------------------------------------------------------- the description


def read_config(path: Path) -> MaskExport:
    """Return the description from a CONFIG_FILE alone. Raises: as read_export."""
    values = read_object(path, MOST_CONFIG)
    if values.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{path}: expected peft_type {PEFT_TYPE!r}, got {short(values.get('peft_type'))}: not our masks; load it "
            "with peft"
        )
    if _is_of_peft(values):
        raise ValueError(
            f"{path}: expected an export of masks, got an adapter that PEFT saved, which holds scores: load it with "
            "PeftModel.from_pretrained (docs/how-to/peft.md)"
        )
    version = values.get("format_version")
    if type(version) is not int or not _UNHASHED_VERSION <= version <= FORMAT_VERSION:  # True is an int, and equals 1
        newer = type(version) is int and version > FORMAT_VERSION
        remedy = "upgrade mft" if newer else "use the version of this software that wrote it"
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {short(version)}: {remedy}")
    fields = dataclasses.fields(MaskExport)
    known = [field.name for field in fields]
    optional = [field.name for field in fields if field.default is not dataclasses.MISSING]
    if version > _UNHASHED_VERSION:
        optional = [*_IF_ANY]
    if CODINGS[0] in codings_of(version):
        known.remove("coding")
    check_keys(path, values, [*known, *_FIXED, "format_version"], optional=optional)
    modules = values["modules"]
    expect(path, "modules", modules, isinstance(modules, list) and bool(modules), "a list of masked layers")
    entries = [_read_entry(path, number, entry) for number, entry in enumerate(modules)]
    twice = sorted(name for name, count in Counter(entry.name for entry in entries).items() if count > 1)
    expect(path, "modules", twice, not twice, "layers of different names")
    export = MaskExport(
        **{name: values[name] for name in known if name in values and name != "modules"}, modules=entries
    )
    _check_fields(path, export, version)
    if "content_hash" in values:
        expect(path, "content_hash", export.content_hash, _is_hash(export.content_hash), _HASH_RULE)
    return export


def _is_of_peft(values: dict) -> bool:
    """Return whether PEFT wrote this: its configurations always have inference_mode, ours never do."""
    return "inference_mode" in values


def _content_fields(export: MaskExport) -> dict[str, Any]:
    """Return the fields of the content."""
    fields = dataclasses.asdict(export)
    del fields["coding"]
    return {k: v for k, v in fields.items() if k not in _IF_ANY or v is not None}


def _check_fields(path: Path, export: MaskExport, version: int) -> None:
    base, layers, ratio = export.base_model_name_or_path, export.layers_to_transform, export.keep_ratio
    expect(path, "base_model_name_or_path", base, base is None or isinstance(base, str), "a string or null")
    expect(path, "base_hash", export.base_hash, _is_hash(export.base_hash), _HASH_RULE)
    expect(path, "mode", export.mode, export.mode in _MODES, " or ".join(_MODES))
    within = ratio is None or (is_number(ratio) and 0 <= ratio <= 1)
    expect(path, "keep_ratio", ratio, within, "a number in [0, 1] or null")
    expect(path, "target_modules", export.target_modules, is_list_of(export.target_modules, str), "a list of strings")
    expect(path, "layers_to_transform", layers, layers is None or is_list_of(layers, int), "a list of ints or null")
    saved = export.modules_to_save
    expect(path, "modules_to_save", saved, saved is None or is_list_of(saved, str), "a list of strings or null")
    system = export.system_prompt
    readable = system is None or (isinstance(system, str) and system == system.encode(errors="ignore").decode())
    expect(path, "system_prompt", system, readable, "Unicode text or null")
    expect(path, "pattern", export.pattern, export.pattern in (*PATTERNS, None), f"{' or '.join(PATTERNS)}, or null")
    coded = codings_of(version)
    expect(path, "coding", export.coding, export.coding in coded, " or ".join(coded))
    kind, masked = export.base_quantization, export.quantize_masked
    expect(path, "base_quantization", kind, kind in (*QUANTIZATIONS, None), f"{' or '.join(QUANTIZATIONS)}, or null")
    expect(path, "quantize_masked", masked, masked is False or (masked is True and kind is not None), _MASKED_RULE)


def _read_entry(path: Path, number: int, entry: Any) -> MaskEntry:
    where = f"modules[{number}]"
    expect(path, where, entry, isinstance(entry, dict), "an object")
    check_keys(path, entry, [field.name for field in dataclasses.fields(MaskEntry)], where)
    name, shape, kept = entry["name"], entry["shape"], entry["kept"]
    expect(path, f"{where}.name", name, isinstance(name, str) and bool(name), "a module's name")
    sized = is_list_of(shape, int) and len(shape) in (2, 3) and min(shape) > 0 and max(shape) < 2**31
    expect(path, f"{where}.shape", shape, sized, "two positive ints [N, K], or three for experts, below 2**31")
    expect(path, f"{where}.dtype", entry["dtype"], isinstance(entry["dtype"], str), "a dtype's name")
    counted = is_list_of([kept], int) and 0 <= kept <= math.prod(shape)
    expect(path, f"{where}.kept", kept, counted, f"an int from 0 to {math.prod(shape)}")
    return MaskEntry(name, tuple(shape), entry["dtype"], kept)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


# ---------------------------------------------------------------------------------------------- the masks


def _check_alone(directory: Path, export: MaskExport) -> None:
    """Raise ValueError if the masks cannot be read without weights."""
    if BY_NAME[export.coding].needs_weight:
        raise ValueError(
            f"{directory}: masks in coding {export.coding} can only be read with the weights of their base, "
            f"{export.base_model_name_or_path or 'which has no name'}, got none: mft recode {directory} DIRECTORY "
            f"--coding {_ALONE} loads the base, and writes masks that are read without it"
        )


def _check_hash(directory: Path, export: MaskExport, found: str) -> None:
    if export.content_hash not in (None, found):
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected content_hash {found}, as the two files together give, got "
            f"{export.content_hash}: damaged, or changed by hand; copy the export again"
        )


def _hash_of(
    export: MaskExport, masks: Iterable[tuple[str, Iterable[NDArray]]], saved: Iterable[tuple[str, Tensor]]
) -> str:
    """Return content_hash, given masks and saved tensors in the order of their names, and a mask's words in pieces."""
    said = {key: value for key, value in _content_fields(export).items() if key != "content_hash"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, pieces in masks:
        digest.update(f"\0{name}\0".encode())
        for words in pieces:
            digest.update(words.data)
    for name, tensor in saved:
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


@contextlib.contextmanager
def _open_checked(path: Path, export: MaskExport) -> Iterator[tuple[Any, set[str]]]:
    """Yield the open file, after checking its tensors against export, and the names of the modules_to_save tensors."""
    expected = {f"{entry.name}.mask": entry for entry in export.modules}
    with open_tensors(path, "copy the export again") as file:
        stored = set(file.keys())
        saved = {key for key in stored - expected.keys() if is_inside(key, export.modules_to_save or ())}
        stored -= saved
        unknown, missing = sorted(stored - expected.keys()), sorted(expected.keys() - stored)
        if unknown:
            raise ValueError(
                f"{path}: unknown tensor {short(unknown[0])}, which belongs to no module in {CONFIG_FILE}: {_COPY_BOTH}"
            )
        if missing:
            raise ValueError(
                f"{path}: missing tensor {short(missing[0])}, a module that {CONFIG_FILE} lists: {_COPY_BOTH}"
            )
        for key, entry in expected.items():  # before anything is allocated
            declared = file.get_slice(key)
            shape = tuple(declared.get_shape())
            BY_NAME[export.coding].check_declared(f"{path}: {key}", declared.get_dtype(), shape, entry.shape)
        yield file, saved


def _read_words(
    path: Path, file: Any, export: MaskExport, entry: MaskEntry, weights: Weights | None = None
) -> Iterator[Words]:
    """Yield the flattened words of a packed mask, some at a time. Raises: ValueError if the mask is damaged."""
    key, columns = f"{entry.name}.mask", entry.shape[-1]
    width, used, place, kept = -(-columns // 32), columns % 32, 0, 0
    weight = _weight_for(export, entry, weights)
    try:
        for words in BY_NAME[export.coding].pieces(file.get_tensor(key), entry.shape, weight):
            if used and (words[(width - 1 - place) % width :: width] >> used).any():
                raise ValueError(f"mask must have 0 in each row's last {32 - used} bits, its padding")
            kept += int.from_bytes(words.tobytes(), "little").bit_count()
            place += len(words)
            yield words
    except ValueError as error:
        raise damage_error(f"{path}: {key}", error) from None
    if kept != entry.kept:
        raise ValueError(
            f"{path}: {key} must keep {entry.kept} weights as {CONFIG_FILE} says, got {kept}: {_COPY_BOTH}"
        )


def _weight_for(export: MaskExport, entry: MaskEntry, weights: Weights | None) -> Tensor | None:
    """Return the module's base weight; None if the coding does not need it."""
    return weights(entry.name) if weights is not None and BY_NAME[export.coding].needs_weight else None
