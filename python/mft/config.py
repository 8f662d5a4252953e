"""Configuration: dataclasses read from strict YAML plus `section.key=value` overrides.

Whatever is unknown, of the wrong type or out of range is a ValueError that names the key, the rule and the value.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from mft.checks import (
    BETA,
    POSITIVE,
    POSITIVE_OR_NULL,
    SEED,
    SHARE,
    Rule,
    Text,
    at_least,
    check_not_empty,
    check_rule,
    coerce_fields,
    expand_home,
    nearest,
    nearest_path,
    one_of,
    read_named,
    shown,
)
from mft.files.atomic import write_whole
from mft.files.regular_file import read_regular
from mft.files.yaml_file import dump_yaml, parse_yaml

DTYPES = ("bfloat16", "float32", "float16")
MODES = ("magnitude", "value")
INITS = ("normal", "magnitude", "constant")
SCHEDULES = ("linear", "constant", "cosine")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")  # as of datasets.interleave_datasets
SCORES_DTYPES = ("float32", "bfloat16", "int16")  # int16: fixed point, see mft_kernels/fixed_point.py
MOMENTS = ("float32", "8bit")
QUANTIZATIONS = ("nf4", "nf4-dq", "int8")  # dq: double quantisation
CONFIG = "config.yaml"  # in the directory of a run
CONFIGS = Path(__file__).parent / "configs"  # shipped; --config takes their names
WAYS = ("plain", "resident", "quantized", "layerwise")  # or auto
TRACKERS = ("tensorboard", "trackio", "wandb")
# Objectives, and the keys that each reads.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "kl": ("beta",),
    "distill": ("teacher", "teacher_memory", "temperature", "weight"),
    "dpo": ("beta", "label_smoothing"),
}
_MOST_CONFIG = 1 << 16  # bytes: 25 times the longest of ours; its reader takes a second for them
_NAMED = "data.sources."  # a mapping of names that the file chooses
_MOST_LAYERS = 10_000  # no model has a tenth as many
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
    "loss_type": "objective.name",
    "teacher_model_name_or_path": "objective.teacher",
}


def parse_layers(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]"""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f'layers_to_transform must be an int, a list of ints or ranges such as "0-3,7", got {text!r}'
            )
        digits = len(str(_MOST_LAYERS))
        if any(len(number) > digits or int(number) >= _MOST_LAYERS for number in (first, last) if number):
            raise ValueError(
                f"layers_to_transform must count layers below {_MOST_LAYERS}, got {shown(text)}: give the model's own"
            )
        if dash and int(last) < int(first):
            raise ValueError(f"layers_to_transform must have ranges that rise, got {part.strip()!r} in {text!r}")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


def parse_trackers(text: str) -> list[str]:
    """ "tensorboard,trackio" -> ["tensorboard", "trackio"]"""
    return [part.strip() for part in text.split(",")]


def layer_ranges(layers: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7", which parse_layers reads."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# One, several, all (null), or a string such as "0-3,7".
Layers = Annotated[
    int | list[int] | None,
    Rule("count layers from 0", minimum=0),
    Text(r"^\s*[0-9]+\s*(-\s*[0-9]+\s*)?(,\s*[0-9]+\s*(-\s*[0-9]+\s*)?)*$", parse_layers),
]

# One, several, none ([]), or a string such as "tensorboard,trackio".
Trackers = Annotated[list[str], one_of(TRACKERS), Text(r"^\s*\w+\s*(,\s*\w+\s*)*$", parse_trackers)]


@dataclass
class ModelConfig:
    """Which model: a hub id, a local directory, a *.gguf file, or the shorthand smollm2-135m."""

    name: str = "smollm2-135m"
    revision: str | None = None
    dtype: Annotated[str, one_of(DTYPES)] = "bfloat16"
    attn_implementation: str | None = None
    # Of the frozen linears under mft train and evaluate; null: exact weights.
    quantization: Annotated[str | None, one_of(QUANTIZATIONS)] = None
    quantize_masked: bool = False  # the masked linears' weights too
    chat_template: str | None = None  # "tulu", or a Jinja file: for base models, whose tokenizers have none

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "name", "revision", "attn_implementation", "chat_template")
        expand_home(self, "name", "chat_template")
        check_rule(
            not self.quantize_masked or self.quantization is not None,
            "quantize_masked",
            f"be false where quantization is null (it may be {' or '.join(QUANTIZATIONS)})",
            self.quantize_masked,
        )


@dataclass
class MaskConfig:
    """Which linear layers get a mask, how much of each is kept, and how the scores begin.

    The defaults begin near the model as it is, less the smallest hundredth of its weights (docs/recipe.md).
    """

    target_modules: str | list[str] | None = None  # None: attention and MLP
    layers_to_transform: Layers = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None  # trained whole beside the masks, and saved with them
    keep_ratio: Annotated[float, SHARE] = 0.99
    mode: Annotated[str, one_of(MODES)] = "magnitude"
    init: Annotated[str, one_of(INITS)] = "magnitude"
    threshold: float | None = None
    scores_dtype: Annotated[str, one_of(SCORES_DTYPES)] = "float32"  # 16 bits are rounded stochastically
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "target_modules", "layers_to_transform", "exclude_modules", "modules_to_save")
        if isinstance(self.layers_to_transform, list):
            self.layers_to_transform = sorted(set(self.layers_to_transform))
        check_rule(
            self.scores_dtype != "int16" or self.threshold is None, "threshold", "be null with int16", self.threshold
        )
        if self.threshold is not None and self.mode == "magnitude":
            check_rule(self.threshold >= 0, "threshold", "be at least 0 in magnitude mode", self.threshold)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The paper's masks (arXiv 2503.22764): a random tenth of each matrix is dropped at first."""
        values: dict[str, Any] = {"keep_ratio": 0.9, "mode": "magnitude", "init": "normal"} | changes
        return cls(**values)


@dataclass
class SourceConfig:
    """One of data.sources: its text, and how much of the mix it is."""

    source: str
    weight: Annotated[float, POSITIVE] = 1.0  # of all weights' sum: its share of the training rows
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "source", "subset", "split", "validation_split")
        expand_home(self, "source")


@dataclass
class DataConfig:
    """Which text, and how it becomes rows of sequence_length tokens."""

    source: str = "stdlib"  # or headers, problems, a hub id, a directory, *.jsonl, *.parquet, *.csv
    subset: str | None = None  # of a hub data set; of stdlib: pretrain or finetune, parts of its training files
    split: str = "train"
    validation_split: str | None = None
    sources: dict[str, SourceConfig] | None = None  # several with weights, by names of your own; instead of source
    stopping_strategy: Annotated[str, one_of(STOPPING_STRATEGIES)] = "first_exhausted"  # of several sources
    streaming: bool = False  # read as training goes on, not before it: for what fits neither memory nor cache
    buffer_size: Annotated[int, at_least(1)] = 1000  # documents of a stream that are packed and shuffled together
    sequence_length: Annotated[int, at_least(2)] = 512
    packing: bool = True
    assistant_only: bool = True
    max_train_tokens: int | None = None
    max_eval_tokens: int | None = None
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        self.sources = read_named("sources", self.sources, SourceConfig)
        coerce_fields(self)
        check_not_empty(self, "source", "subset", "split", "validation_split")
        expand_home(self, "source")
        if self.sources is not None:
            for name in ("source", "subset", "split", "validation_split"):
                given, default = getattr(self, name), getattr(type(self), name)
                check_rule(
                    given == default,
                    name,
                    "be left out beside sources, each with its own (sources: null drops them)",
                    given,
                )
        check_rule(
            not self.streaming or self.max_train_tokens is None,
            "max_train_tokens",
            "be null with streaming, where train.steps says how much is read",
            self.max_train_tokens,
        )
        for name in ("max_train_tokens", "max_eval_tokens"):
            tokens = getattr(self, name)
            if tokens is not None:
                check_rule(
                    tokens >= self.sequence_length,
                    name,
                    f"be at least one row of sequence_length = {self.sequence_length} tokens",
                    tokens,
                )

    @property
    def every_source(self) -> list[str]:
        """Where the text comes from: source, or that of each of sources."""
        return [self.source] if self.sources is None else [given.source for given in self.sources.values()]

    def of_source(self, name: str) -> "DataConfig":
        """The same for one of sources alone."""
        given = dataclasses.asdict((self.sources or {})[name])
        del given["weight"]
        return dataclasses.replace(self, sources=None, **given)


@dataclass
class TrainConfig:
    """One training run. Exactly one of steps and epochs says how long it is.

    steps counts optimiser steps; each takes batch_size * accumulation rows.
    """

    # Masks move at 3e-4 to 4e-3 in short runs; the paper's 2e-5 needs about a thousand steps.
    lr: Annotated[float, POSITIVE] = 3e-4
    steps: Annotated[int | None, POSITIVE_OR_NULL] = None
    epochs: Annotated[float | None, POSITIVE_OR_NULL] = None
    batch_size: Annotated[int, at_least(1)] = 1
    accumulation: Annotated[int, at_least(1)] = 1
    warmup_ratio: Annotated[float, SHARE] = 0.03
    schedule: Annotated[str, one_of(SCHEDULES)] = "linear"
    max_grad_norm: Annotated[float | None, POSITIVE_OR_NULL] = None
    weight_decay: Annotated[float, at_least(0)] = 0.0
    betas: Annotated[tuple[float, float], BETA] = (0.9, 0.999)
    moments: Annotated[str, one_of(MOMENTS)] = "float32"  # of the scores' optimiser
    grad_dtype: Annotated[str | None, one_of(DTYPES)] = None  # of the gradient buffers; null: the weights'
    gradient_checkpointing: bool = False
    seed: Annotated[int, SEED] = 0
    log_every: Annotated[int, at_least(1)] = 1
    eval_every: Annotated[int | None, at_least(1)] = None  # steps between two evaluations on validation
    eval_minutes: Annotated[float | None, POSITIVE_OR_NULL] = None  # or minutes
    keep_best: bool = False  # export what had the least validation loss, in place of the last
    patience: Annotated[int | None, at_least(1)] = None  # evaluations without a lower loss, after which the run ends
    min_delta: Annotated[float, at_least(0)] = 0.0  # nats a token by which a loss must be lower to count for patience

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_rule(
            self.eval_every is None or self.eval_minutes is None,
            "eval_minutes",
            f"be null beside eval_every = {self.eval_every}",
            self.eval_minutes,
        )
        unless = "unless eval_every or eval_minutes says when to evaluate"
        check_rule(self.evaluates or not self.keep_best, "keep_best", f"be false {unless}", self.keep_best)
        check_rule(self.evaluates or self.patience is None, "patience", f"be null {unless}", self.patience)
        counted = self.patience is not None
        check_rule(counted or not self.min_delta, "min_delta", "be 0 where patience is null", self.min_delta)
        if self.steps is None and self.epochs is None:
            raise ValueError(
                "steps or epochs must be given (exactly one of them), got neither: set steps=100 or epochs=1"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps or epochs must be given (exactly one of them), got steps={self.steps} and "
                f"epochs={self.epochs}: set the other to null"
            )

    @property
    def evaluates(self) -> bool:
        """Whether the run is evaluated on validation while it trains."""
        return self.eval_every is not None or self.eval_minutes is not None

    def steps_for(self, rows: int | None) -> int:
        """Optimiser steps of a run on so many rows; None: as many as anybody asks for, of a stream."""
        if self.steps is not None:
            return self.steps
        if rows is None:
            raise ValueError(
                f"train.steps must be given with data.streaming, where nobody knows how long an epoch is, got "
                f"train.epochs={self.epochs:g}: set train.steps, and train.epochs to null"
            )
        return max(1, math.ceil((self.epochs or 0) * rows / (self.batch_size * self.accumulation)))


@dataclass
class ObjectiveConfig:
    """What training makes smaller (docs/objectives.md). A key that the named objective does not read must be null."""

    name: Annotated[str, one_of(tuple(OBJECTIVES))] = "cross_entropy"
    beta: Annotated[float | None, POSITIVE_OR_NULL] = None  # of dpo, and of kl: the weight of KL; 0.1
    label_smoothing: Annotated[float | None, Rule("lie in [0, 0.5)", minimum=0, exclusiveMaximum=0.5)] = None  # dpo; 0
    temperature: Annotated[float | None, POSITIVE_OR_NULL] = None  # of distill; 1
    weight: Annotated[float | None, SHARE] = None  # of the cross entropy in distill; 0.5
    teacher: str | None = None  # of distill: as model.name, with the same tokenizer
    teacher_memory: Annotated[str | None, one_of(("plain", "layerwise"))] = None  # plain

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "teacher")
        expand_home(self, "teacher")
        for item in dataclasses.fields(self)[1:]:
            if getattr(self, item.name) is not None and item.name not in OBJECTIVES[self.name]:
                readers = [name for name, keys in OBJECTIVES.items() if item.name in keys]
                raise ValueError(
                    f"{item.name} must be null with the objective {self.name}, got {getattr(self, item.name)}: it "
                    f"belongs to {' and '.join(readers)}; set objective.name"
                )
        check_rule(
            self.name != "distill" or self.teacher is not None, "teacher", "name a model for distill", self.teacher
        )

    @property
    def of_base(self) -> bool:
        """Whether the model is held to its base: then masks alone are trained."""
        return self.name in ("kl", "dpo")

    @property
    def of_pairs(self) -> bool:
        """Whether the data are preference pairs."""
        return self.name == "dpo"


@dataclass
class RunConfig:
    """Everything one command needs; the sections of a YAML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))
    output_dir: str = "runs/mft"
    # How masks are trained: the fastest way that fits, or the one that is named.
    memory: Annotated[str, one_of(("auto", *WAYS))] = "auto"
    # Between two checkpoints, from which --resume goes on; null: none is written.
    checkpoint_minutes: Annotated[float | None, Rule("be at least 0 (or null)", minimum=0)] = 10.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    report_to: Trackers = field(default_factory=list)  # beside metrics.jsonl
    project: str = "mft"  # in trackio and wandb

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_rule(
            self.mask.modules_to_save is None or self.memory in ("auto", "plain"),
            "memory",
            "be plain (or auto) with mask.modules_to_save, as the other ways train scores alone",
            self.memory,
        )
        check_rule(
            self.mask.modules_to_save is None or not self.objective.of_base,
            "mask.modules_to_save",
            f"be null with the objective {self.objective.name}, which holds masks to the base that they lie on",
            self.mask.modules_to_save,
        )
        check_not_empty(self, "output_dir", "project")
        expand_home(self, "output_dir")
        self.report_to = list(dict.fromkeys(self.report_to))


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "mask": MaskConfig,
    "train": TrainConfig,
    "objective": ObjectiveConfig,
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
