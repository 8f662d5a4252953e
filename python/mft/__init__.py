"""The recipe on top of mft_kernels: convert a Hugging Face model, fine-tune its masks, compare, merge."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig, MaskConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
    from .config_file import load_config
    from .data.splits import load_splits
    from .engines.in_place_adamw import InPlaceAdamW, in_place, leave_in_place
    from .evaluation.evaluate import evaluate
    from .files.mask_coding import coded_size
    from .importance.initial_scores import init_from_data, mask_from_data
    from .importance.peft_init import init_adapter_from_data
    from .masks.bank import MaskBank, load_mask_bank
    from .masks.budget import grow_budget
    from .masks.convert import (
        mask_model,
        masked_modules,
        merge_model,
        print_trainable_parameters,
        trainable_parameters,
    )
    from .masks.export import load_masks, recode_masks, save_masks
    from .masks.merged_weights import merged_weights
    from .masks.peft import MaskPeftConfig, to_masked_model
    from .masks.quantize import quantize_model
    from .masks.trainer_callbacks import BudgetCallback, SharpnessCallback
    from .masks.unmasked import unmasked_model
    from .models.parallel import gathered
    from .models.pretrained import load_model, save_model
    from .objectives.distillation import Distillation
    from .objectives.dpo import DPO
    from .objectives.kl import KL
    from .objectives.log_prob_objective import LogProbObjective
    from .objectives.objective import Objective
    from .objectives.token_objective import TokenObjective
    from .patching.lora import write_gguf_lora
    from .patching.patch import patch_gguf, patch_gguf_in_place, undo_gguf_patch, undo_gguf_patch_in_place
    from .publishing.push import push_to_hub
    from .rewards.config import RewardsConfig
    from .rewards.on_policy_teacher import OnPolicyTeacher
    from .rewards.train_rewards import RewardReport, train_rewards
    from .training.checkpoint import newest_checkpoint
    from .training.loop import finetune, train_masks
    from .training.model_teacher import ModelTeacher
    from .training.resume import Begin, Resume
    from .training.saver import Saver
    from .training.training_run import run_finetune, run_train

    __version__: str

# {module: its public names}, imported at first use, so that `mft --help` and `mft env` do not wait for transformers.
_HOMES = {
    "config": ("DataConfig", "MaskConfig", "ModelConfig", "ObjectiveConfig", "RunConfig", "TrainConfig"),
    "config_file": ("load_config",),
    "data.splits": ("load_splits",),
    "engines.in_place_adamw": ("InPlaceAdamW", "in_place", "leave_in_place"),
    "evaluation.evaluate": ("evaluate",),
    "importance.peft_init": ("init_adapter_from_data",),
    "importance.initial_scores": ("init_from_data", "mask_from_data"),
    "masks.bank": ("MaskBank", "load_mask_bank"),
    "masks.budget": ("grow_budget",),
    "masks.convert": (
        *("mask_model", "masked_modules", "merge_model"),
        *("print_trainable_parameters", "trainable_parameters"),
    ),
    "files.mask_coding": ("coded_size",),
    "masks.export": ("load_masks", "recode_masks", "save_masks"),
    "masks.merged_weights": ("merged_weights",),
    "masks.peft": ("MaskPeftConfig", "to_masked_model"),
    "masks.quantize": ("quantize_model",),
    "masks.trainer_callbacks": ("BudgetCallback", "SharpnessCallback"),
    "masks.unmasked": ("unmasked_model",),
    "models.parallel": ("gathered",),
    "models.pretrained": ("load_model", "save_model"),
    "objectives.distillation": ("Distillation",),
    "objectives.dpo": ("DPO",),
    "objectives.kl": ("KL",),
    "objectives.log_prob_objective": ("LogProbObjective",),
    "objectives.objective": ("Objective",),
    "objectives.token_objective": ("TokenObjective",),
    "patching.lora": ("write_gguf_lora",),
    "patching.patch": ("patch_gguf", "patch_gguf_in_place", "undo_gguf_patch", "undo_gguf_patch_in_place"),
    "publishing.push": ("push_to_hub",),
    "rewards.config": ("RewardsConfig",),
    "rewards.on_policy_teacher": ("OnPolicyTeacher",),
    "rewards.train_rewards": ("RewardReport", "train_rewards"),
    "training.checkpoint": ("newest_checkpoint",),
    "training.loop": ("finetune", "train_masks"),
    "training.resume": ("Begin", "Resume"),
    "training.training_run": ("run_finetune", "run_train"),
    "training.saver": ("Saver",),
    "training.model_teacher": ("ModelTeacher",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DPO",
    "KL",
    "Begin",
    "BudgetCallback",
    "DataConfig",
    "Distillation",
    "InPlaceAdamW",
    "LogProbObjective",
    "MaskBank",
    "MaskConfig",
    "MaskPeftConfig",
    "ModelConfig",
    "ModelTeacher",
    "Objective",
    "ObjectiveConfig",
    "OnPolicyTeacher",
    "Resume",
    "RewardReport",
    "RewardsConfig",
    "RunConfig",
    "Saver",
    "SharpnessCallback",
    "TokenObjective",
    "TrainConfig",
    "coded_size",
    "evaluate",
    "finetune",
    "gathered",
    "grow_budget",
    "in_place",
    "init_adapter_from_data",
    "init_from_data",
    "leave_in_place",
    "load_config",
    "load_mask_bank",
    "load_masks",
    "load_model",
    "load_splits",
    "mask_from_data",
    "mask_model",
    "masked_modules",
    "merge_model",
    "merged_weights",
    "newest_checkpoint",
    "patch_gguf",
    "patch_gguf_in_place",
    "print_trainable_parameters",
    "push_to_hub",
    "quantize_model",
    "recode_masks",
    "run_finetune",
    "run_train",
    "save_masks",
    "save_model",
    "to_masked_model",
    "train_masks",
    "train_rewards",
    "trainable_parameters",
    "undo_gguf_patch",
    "undo_gguf_patch_in_place",
    "unmasked_model",
    "write_gguf_lora",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'mft' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def _version() -> str:
    """Return the version of mft_kernels without importing it: the import would load torch, which takes time."""
    spec = find_spec("mft_kernels")
    assert spec is not None, "mft is shipped with mft_kernels"
    assert spec.origin is not None
    return run_path(str(Path(spec.origin).with_name("_version.py")))["__version__"]


def __dir__() -> list[str]:
    return __all__
