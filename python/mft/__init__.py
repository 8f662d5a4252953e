"""The recipe on top of mft_kernels: convert a Hugging Face model, fine-tune its masks, compare, merge."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MaskConfig, load_config
    from .masks.bank import MaskBank, load_mask_bank
    from .masks.convert import (
        mask_model,
        masked_modules,
        merge_model,
        print_trainable_parameters,
        trainable_parameters,
    )
    from .masks.export import load_masks, save_masks
    from .models.parallel import gathered
    from .models.pretrained import load_model, save_model

# Loaded at first use: `mft --help` and `mft env` need not wait for transformers.
_HOMES = {
    "MaskBank": "masks.bank",
    "MaskConfig": "config",
    "gathered": "models.parallel",
    "load_config": "config",
    "load_mask_bank": "masks.bank",
    "load_masks": "masks.export",
    "load_model": "models.pretrained",
    "mask_model": "masks.convert",
    "masked_modules": "masks.convert",
    "merge_model": "masks.convert",
    "print_trainable_parameters": "masks.convert",
    "save_masks": "masks.export",
    "save_model": "models.pretrained",
    "trainable_parameters": "masks.convert",
}

__all__ = [
    "MaskBank",
    "MaskConfig",
    "gathered",
    "load_config",
    "load_mask_bank",
    "load_masks",
    "load_model",
    "mask_model",
    "masked_modules",
    "merge_model",
    "print_trainable_parameters",
    "save_masks",
    "save_model",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mft' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
