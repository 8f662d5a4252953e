"""The recipe on top of mft_kernels: convert a Hugging Face model, fine-tune its masks, compare, merge."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig, load_config
    from .data.splits import load_splits
    from .evaluation.evaluate import evaluate
    from .masks.bank import MaskBank, load_mask_bank
    from .masks.convert import (
        mask_model,
        masked_modules,
        merge_model,
        print_trainable_parameters,
        trainable_parameters,
    )
    from .masks.export import load_masks, save_masks
    from .masks.peft import MaskPeftConfig, to_masked_model
    from .masks.quantize import quantize_model
    from .models.parallel import gathered
    from .models.pretrained import load_model, save_model
    from .training.checkpoint import newest_checkpoint
    from .training.loop import finetune, train_masks
    from .training.resume import Begin, Resume
    from .training.run import run_finetune, run_train
    from .training.saver import Saver

# Loaded at first use: `mft --help` and `mft env` need not wait for transformers.
_HOMES = {
    "config": ("DataConfig", "MaskConfig", "ModelConfig", "RunConfig", "TrainConfig", "load_config"),
    "data.splits": ("load_splits",),
    "evaluation.evaluate": ("evaluate",),
    "masks.bank": ("MaskBank", "load_mask_bank"),
    "masks.convert": (
        *("mask_model", "masked_modules", "merge_model"),
        *("print_trainable_parameters", "trainable_parameters"),
    ),
    "masks.export": ("load_masks", "save_masks"),
    "masks.peft": ("MaskPeftConfig", "to_masked_model"),
    "masks.quantize": ("quantize_model",),
    "models.parallel": ("gathered",),
    "models.pretrained": ("load_model", "save_model"),
    "training.checkpoint": ("newest_checkpoint",),
    "training.loop": ("finetune", "train_masks"),
    "training.resume": ("Begin", "Resume"),
    "training.run": ("run_finetune", "run_train"),
    "training.saver": ("Saver",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Begin",
    "DataConfig",
    "MaskBank",
    "MaskConfig",
    "MaskPeftConfig",
    "ModelConfig",
    "Resume",
    "RunConfig",
    "Saver",
    "TrainConfig",
    "evaluate",
    "finetune",
    "gathered",
    "load_config",
    "load_mask_bank",
    "load_masks",
    "load_model",
    "load_splits",
    "mask_model",
    "masked_modules",
    "merge_model",
    "newest_checkpoint",
    "print_trainable_parameters",
    "quantize_model",
    "run_finetune",
    "run_train",
    "save_masks",
    "save_model",
    "to_masked_model",
    "train_masks",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mft' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
