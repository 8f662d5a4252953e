"""Read and write masks.pt, the paper code's pickled file: module name -> (N, K) tensor of ones (kept) and zeros.

It is read by torch's weights-only loader, restricted to dense tensors. Their values are mapped from the file, and no
tensor is read before all of them are known to lie in the file. No other file of ours is a pickle.
"""

import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mft.files.atomic import atomic_file
from mft.files.regular_file import open_regular
from mft.masks.convert import masked_modules
from mft.masks.export import nothing_to_save_error, put_masks
from mft.masks.saved_modules import saved_modules
from mft_kernels import pack_mask

_MOST_PICKLE = 1 << 22  # bytes of the pickle, which holds no values: about 300 per module
_NUMBERS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMED = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *(f"torch {number}Storage" for number in _NUMBERS),
}

# Errors that torch's loader raises for bytes that are no such file. All of them mean that the file is bad.
_BROKEN = (
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, ArithmeticError, AssertionError, AttributeError),
    *(EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
)


def import_paper_masks(model: nn.Module, path: Path) -> nn.Module:
    """Put the masks of a masks.pt on an ordinary model, in place; as load_masks, but the base cannot be verified.

    Raises: FileNotFoundError, or ValueError that names the file, the module, the value found and the value expected.
    """
    masks = read_paper_masks(path)
    packed = {name: pack_mask(mask.float(), torch.tensor(0.5)) for name, mask in masks.items()}
    return put_masks(model, packed, {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()})


def read_paper_masks(path: Path) -> dict[str, Tensor]:
    """Return module name -> bool mask (N, K). Raises as import_paper_masks does."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the masks.pt of the paper's code, got nothing there")
    try:
        _check_pickle(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected a dictionary of tensors saved by torch, got a file with: {reason}"
        ) from None
    if not isinstance(content, dict) or not content:
        size = f"of {len(content)} entries" if hasattr(content, "__len__") else ""
        raise ValueError(f"{path}: expected a dictionary of masks, got {type(content).__name__} {size}")
    for name, mask in content.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: expected modules' names as keys, got {name!r}")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.numel():
            shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
            raise ValueError(f"{path}: {name} must be a dense matrix (N, K), got {type(mask).__name__}{shape}")
    needed, stored = sum(mask.nbytes for mask in content.values()), path.stat().st_size
    if needed > stored:
        raise ValueError(
            f"{path}: expected every value of every mask in the file, got {stored} bytes for masks of {needed}: save "
            "contiguous tensors (mask.contiguous()), each with a memory of its own"
        )
    return {name: _mask(path, name, mask) for name, mask in content.items()}


def write_paper_masks(model: nn.Module, path: Path) -> None:
    """Write a masked model's masks as the paper's code does, in the weights' dtype. The write is atomic."""
    masked = masked_modules(model)
    if not masked:
        raise nothing_to_save_error(model)
    whole = saved_modules(model)
    if whole:
        raise ValueError(
            f"model must hold masks alone for the paper's format, got modules_to_save too ({', '.join(whole)}), "
            "which that format cannot hold: use save_masks"
        )
    masks = {name: module.mask().to(module.weight.dtype).cpu() for name, module in masked.items()}
    with atomic_file(path) as scratch:
        torch.save(masks, scratch)


def _check_pickle(path: Path) -> None:
    """Raise ValueError, or an error of zipfile or pickletools, unless the pickle names dense tensors only."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, which torch does not write")
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
            raise ValueError(f"{len(pickles)} pickles, where torch writes one of at most {_MOST_PICKLE} bytes")
        content = archive.read(pickles[0])
    for opcode, named, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and named not in _NAMED:
            raise ValueError(f"{str(named).replace(' ', '.')!r}, which no dictionary of dense masks needs")


def _mask(path: Path, name: str, mask: Tensor) -> Tensor:
    kept = mask != 0
    other = mask[kept & (mask != 1)]
    if other.numel():
        raise ValueError(
            f"{path}: {name} must hold ones and zeros, got {other.numel()} other values, {other[0].item()} among them"
        )
    return kept
