"""masks.pt, the file of the paper's own code: module name -> (N, K) tensor of ones (kept) and zeros, pickled.

It is read by torch's weights-only loader, which makes tensors and containers and runs nothing else, and only when asked
for by name: no other file of ours is a pickle.
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mft.atomic import atomic_file
from mft.convert import masked_modules
from mft.export import put_masks
from mft_kernels import pack_mask

# What torch's loader raises on bytes that are no such file; whatever it is, the file is to blame.
_BROKEN = (
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, ArithmeticError, AssertionError, AttributeError),
    *(EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
)


def import_paper_masks(model: nn.Module, path: Path) -> nn.Module:
    """Put the masks of a masks.pt on an ordinary model, in place; as load_masks, but nothing tells which base they had.

    Raises: FileNotFoundError, or ValueError naming the file, the module, what was found and what was expected.
    """
    masks = read_paper_masks(path)
    packed = {name: pack_mask(mask.float(), torch.tensor(0.5)) for name, mask in masks.items()}
    return put_masks(model, packed, {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()})


def read_paper_masks(path: Path) -> dict[str, Tensor]:
    """Module name -> (N, K) bool. Raises as import_paper_masks does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the masks.pt of the paper's code, got nothing there")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected a dictionary of tensors saved by torch, got a file with: {reason}"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a dictionary of masks, got {type(content).__name__} {_size(content)}")
    return {_name(path, name): _mask(path, name, mask) for name, mask in content.items()}


def write_paper_masks(model: nn.Module, path: Path) -> None:
    """Write a masked model's masks as the paper's code does, in the weights' dtype; the file appears whole or not."""
    masked = masked_modules(model)
    if not masked:
        raise ValueError(f"model has no masked layers to save, got a plain {type(model).__name__}: mask_model it first")
    masks = {name: module.mask().to(module.weight.dtype).cpu() for name, module in masked.items()}
    with atomic_file(path) as scratch:
        torch.save(masks, scratch)


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: expected modules' names as keys, got {name!r}")
    return name


def _mask(path: Path, name: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.dim() != 2 or not mask.numel():
        shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise ValueError(f"{path}: {name} must be a dense matrix (N, K), got {type(mask).__name__}{shape}")
    if mask.is_complex():
        raise ValueError(f"{path}: {name} must hold ones and zeros, got {mask.dtype}")
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise ValueError(
            f"{path}: {name} must hold ones and zeros, got {other.numel()} other values, {other[0].item()} among them"
        )
    return mask != 0


def _size(content: Any) -> str:
    return f"of {len(content)} entries" if hasattr(content, "__len__") else ""
