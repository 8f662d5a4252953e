"""Read a configuration from strict YAML plus `section.key=value` overrides (files/nested.py), and write it as YAML."""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from mft.checks import nearest, nearest_path, shown
from mft.config import CONFIGS, FinetuneConfig, RunConfig
from mft.files.atomic import write_whole
from mft.files.nested import YAML, Nested
from mft.files.regular_file import read_regular
from mft.files.yaml_file import dump_yaml, parse_yaml

_MOST_CONFIG = 1 << 16  # bytes: 25 times our longest file; parsing this many takes a second
# Our keys by the names that TRL, axolotl and other trainers, and the paper's own code, use.
FOREIGN_NAMES = {
    "learning_rate": "train.lr",
    "num_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size",
    "lr_scheduler": "train.schedule",
    "warmup_steps": "train.warmup_ratio",
    "gradient_clipping": "train.max_grad_norm",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler_type": "train.schedule",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "load_best_model_at_end": "train.keep_best",
    "early_stopping_patience": "train.patience",
    "early_stopping_threshold": "train.min_delta",
    "eval_strategy": "train.eval_every",
    "save_steps": "checkpoint_minutes",
    "log_with": "report_to",
    "wandb_project": "project",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "sample_packing": "data.packing",
    "assistant_only_loss": "data.assistant_only",
    "train_on_inputs": "data.assistant_only",
    "val_set_size": "data.validation_share",
    "data": "data.source",
    "path": "data.source",
    "data_files": "data.source",
    "train_file": "data.source",
    "dataset": "data.source",
    "dataset_name": "data.source",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.validation_split",
    "datasets": "data.sources",
    "dataset_mixer": "data.sources",
    "interleave_probs": "data.sources",
    "mix_strategy": "data.stopping_strategy",
    "shuffle_buffer_size": "data.buffer_size",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "model": "model.name",
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "sparsity": "mask.keep_ratio",
    "layers": "mask.layers_to_transform",
    "nsamples": "mask.calibration_rows",
    "num_calibration_samples": "mask.calibration_rows",
    "loss_type": "objective.name",
    "teacher_model_name_or_path": "objective.teacher",
}
_RUN = Nested(RunConfig, "train.lr=3e-4", FOREIGN_NAMES, elsewhere=True)
_FINETUNE = Nested(FinetuneConfig, "train.lr=3e-4", FOREIGN_NAMES, elsewhere=True)


def load_config(
    path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = (), *, of_weights: bool = False
) -> RunConfig:
    """Load a configuration: the defaults, then the YAML file at path, if any, then overrides such as "train.lr=3e-4".

    path may be the name of a shipped file, such as "paper". An override's value is YAML: null, true, 3e-4,
    [q_proj, v_proj]. If a key has two overrides, the last one wins. of_weights: with the defaults of mft finetune.
    """
    path = None if path is None else find_config(path, CONFIGS)
    return config_from({} if path is None else read_mapping(path), path, overrides, of_weights=of_weights)


def config_from(
    values: dict[str, Any],
    path: str | os.PathLike | None,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    of_weights: bool = False,
) -> RunConfig:
    """Do the same with the file's values, in the form of config_values. path is for messages."""
    values = copy.deepcopy(values)
    for override in overrides:
        _RUN.apply_override(values, override)
    return (_FINETUNE if of_weights else _RUN).build(values, path, overrides)


def load_saved(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Do the same as load_config with the file that a run saved in its directory, perhaps before some keys existed."""
    return config_from_saved({} if path is None else read_mapping(path), path, overrides)


def config_from_saved(
    values: dict[str, Any], path: Path | None, overrides: list[str] | tuple[str, ...] = ()
) -> RunConfig:
    """Do the same as config_from with what a run has saved."""
    values = copy.deepcopy(values)
    if isinstance(values.get("mask"), dict):
        complete_saved_mask(values["mask"])
    return config_from(values, path, overrides)


def complete_saved_mask(values: dict[str, Any]) -> None:
    """Add to the saved values of a MaskConfig the keys that they lack, with what an older run meant."""
    if values.get("budget") is not None:
        values.setdefault("fill_budget", True)  # before 2 December 2026 a budget was always filled
    if values.get("budget") is not None or values.get("threshold") is not None:
        values["keep_ratio"] = None  # until then it was given too, and not used
    elif values.get("keep_ratio") is None:
        values["keep_ratio"] = 0.99  # the default until then


def check_overrides(overrides: list[str]) -> None:
    """Raise ValueError for an override of an unknown key, whatever configuration it changes."""
    for override in overrides:
        _RUN.apply_override({}, override)


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write YAML from which load_config returns an equal config, whole or not at all. Raises: NotWritten."""
    write_whole(path, dump_yaml(config_values(config)))


def config_values(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain values, for YAML, JSON and config_from."""
    return plain_values(dataclasses.asdict(config))


def find_config(name: str | os.PathLike, directory: Path) -> Path:
    """Return the file at the path name, or name.yaml in directory. Raises: ValueError that lists the files there."""
    path, known = Path(name), {file.stem: file for file in sorted(directory.glob("*.yaml"))}
    if str(name) in known and not path.is_file():  # a directory is no configuration
        return known[str(name)]
    if path.exists() or len(path.parts) > 1:
        return path
    close = nearest(path.name.removesuffix(".yaml"), known) or nearest_path(path)
    if path.suffix in YAML:
        raise ValueError(f"config must be a YAML file that exists, got {path}: no such file{close}")
    raise ValueError(f"config must be a YAML file or one of {', '.join(known)}, got {path}{close}")


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file. Raises: ValueError that names the file."""
    if path.is_dir():
        raise ValueError(f"config must be a YAML file, got the directory {path}")
    if not path.exists():
        raise ValueError(f"config must be a YAML file that exists, got {path}{nearest_path(path)}")
    try:
        text = read_regular(path, _MOST_CONFIG).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: config must be UTF-8 text, byte {error.start} is not") from None
    except OSError as error:
        raise ValueError(
            f"{path}: config must be readable, got {error.strerror}: check the disk and the access rights"
        ) from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise ValueError(f"{path}: config must hold keys such as train:, got an empty file")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config must be a mapping of keys such as train:, got {shown(values)}")
    return values


def plain_values(value: Any) -> Any:
    """Return value with tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, list | tuple) else value
