"""A configuration from strict YAML plus `section.key=value` overrides, and back to YAML.

Whatever is unknown, of the wrong type or out of range is a ValueError that names the key, the rule and the value.
"""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from mft.checks import nearest, nearest_path, shown
from mft.config import CONFIGS, SECTIONS, RunConfig
from mft.files.atomic import write_whole
from mft.files.regular_file import read_regular
from mft.files.yaml_file import dump_yaml, parse_yaml

_MOST_CONFIG = 1 << 16  # bytes: 25 times the longest of ours; its reader takes a second for them
_NAMED = "data.sources."  # a mapping of names that the file chooses
# What other trainers, and the paper's own code, call our keys.
FOREIGN_NAMES = {
    "learning_rate": "train.lr",
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
    "max_seq_length": "data.sequence_length",
    "dataset": "data.source",
    "datasets": "data.sources",
    "dataset_mixer": "data.sources",
    "interleave_probs": "data.sources",
    "mix_strategy": "data.stopping_strategy",
    "shuffle_buffer_size": "data.buffer_size",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name",
    "sparsity": "mask.keep_ratio",
    "layers": "mask.layers_to_transform",
    "nsamples": "mask.calibration_rows",
    "num_calibration_samples": "mask.calibration_rows",
    "loss_type": "objective.name",
    "teacher_model_name_or_path": "objective.teacher",
}


def load_config(path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The defaults, then the YAML file at path (None: no file), then overrides such as "train.lr=3e-4".

    path may be the name of a shipped file, such as "paper". An override's value is YAML: null, true, 3e-4,
    [q_proj, v_proj]. The last of two for one key wins.
    """
    path = None if path is None else find_config(path, CONFIGS)
    return config_from({} if path is None else read_mapping(path), path, overrides)


def config_from(
    values: dict[str, Any], path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()
) -> RunConfig:
    """The same with the file's values, as config_values gives them; path is for messages."""
    values = copy.deepcopy(values)
    _check_keys(values, origin=f"{path}: ")
    _apply_overrides(values, overrides)
    sections = {}
    for name, section in SECTIONS.items():
        given = values.pop(name, None)
        if name == "train" and given is not None and not {"steps", "epochs"} & given.keys():
            given["epochs"] = RunConfig().train.epochs
        if given is not None:
            sections[name] = _build(section, given, name, path, overrides)
    return _build(RunConfig, values | sections, "", path, overrides)


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write YAML from which load_config gives back an equal config, whole or not at all. Raises: NotWritten."""
    write_whole(path, dump_yaml(config_values(config)))


def config_values(config: RunConfig) -> dict[str, Any]:
    """What YAML and JSON can hold, and config_from takes."""
    return plain_values(dataclasses.asdict(config))


def find_config(name: str | os.PathLike, directory: Path) -> Path:
    """The file at the path name, or else the one of directory that is called so without its .yaml.

    Raises: ValueError that lists those of directory, if name is neither and no path elsewhere.
    """
    path, known = Path(name), {file.stem: file for file in sorted(directory.glob("*.yaml"))}
    if str(name) in known and not path.is_file():  # a directory is no configuration
        return known[str(name)]
    if path.exists() or len(path.parts) > 1:
        return path
    close = nearest(path.name.removesuffix(".yaml"), known) or nearest_path(path)
    raise ValueError(f"config must be a YAML file or one of {', '.join(known)}, got {path}{close}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ValueError that names the file."""
    if path.is_dir():
        raise ValueError(f"config must be a YAML file, got the directory {path}")
    if not path.exists():
        raise ValueError(f"config must be a YAML file that exists, got {path}{nearest_path(path)}")
    try:
        text = read_regular(path, _MOST_CONFIG).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: config must be UTF-8 text, byte {error.start} is not") from None
    except OSError as error:
        raise ValueError(f"{path}: config must be readable, got {error.strerror}: see to the disk, or rights") from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise ValueError(f"{path}: config must hold keys such as train:, got an empty file")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config must be a mapping of keys such as train:, got {shown(values)}")
    return values


def _apply_overrides(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"an override must look like train.lr=3e-4, got {override!r}")
        if key in SECTIONS:
            names = ", ".join(f"{key}.{name}" for name in _field_names(SECTIONS[key]))
            raise ValueError(f"an override must name one key, got the section {key!r}: its keys are {names}")
        section, dot, name = key.partition(".")
        value = parse_yaml(text, f"override {override!r}")
        path = [section, *(name.split(".") if key.startswith(_NAMED) else [name] if dot else [])]
        _check_keys({section: {path[1]: None}} if dot else {section: value}, origin=f"override {override!r}: ")
        target = values
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {part} must be a mapping, got {shown(target)}")
        target[path[-1]] = value


def _check_keys(values: dict[Any, Any], origin: str) -> None:
    """Raise on the first key that no dataclass has, wherever it stands."""
    known = _field_names(RunConfig)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{origin}unknown key {str(key)!r}{_suggestion(str(key), '', known)}")
        if key not in SECTIONS or value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{origin}{key} must be a mapping of keys, got {shown(value)}")
        names = _field_names(SECTIONS[key])
        for name in value:
            if name not in names:
                raise ValueError(f"{origin}unknown key '{key}.{name}'{_suggestion(str(name), f'{key}.', names)}")


def _suggestion(name: str, prefix: str, names: list[str]) -> str:
    """The nearest name in this section, else the same name in another one, else all names of this section."""
    elsewhere = {f"{key}.{known}": known for key, section in SECTIONS.items() for known in _field_names(section)}
    elsewhere |= {known: known for known in _field_names(RunConfig) if known not in SECTIONS}
    last = name.rpartition(".")[2]
    exact = [path for path, known in elsewhere.items() if known == last or path == FOREIGN_NAMES.get(last)]
    if exact:
        return f"; did you mean {' or '.join(exact)}?"
    close = nearest(name, names, prefix=prefix)
    if not close:
        close = nearest(name, list(elsewhere.values()), paths=elsewhere)
    return close or f"; known here: {', '.join(prefix + known for known in names)}"


def _build(cls: type, values: dict[str, Any], name: str, path: str | os.PathLike | None, overrides) -> Any:
    """cls(**values); its errors begin with a field's name, so that the section and the file can stand before it."""
    try:
        return cls(**values)
    except ValueError as error:
        origin = f"{path}: " if path is not None else ""
        after = f" (with the overrides {' '.join(overrides)})" if overrides else ""
        raise ValueError(f"{origin}{name}{'.' if name else ''}{error}{after}") from None


def _field_names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def plain_values(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, list | tuple) else value
