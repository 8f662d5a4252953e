"""An arm of a study: its keys in the file, and what every kind of arm says about itself. A kind is a subclass of Arm.

A kind names the keys that it takes. Class attributes tell plans and reports what it is, and methods make and train its
models and count their bytes. A key that no other kind has is a field of the kind's own class, which is then a
dataclass, because the keys of Arm itself enter the hashes of all arms.

Methods import what needs torch themselves: a wrong key should be told at once, and torch takes seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mft.checks import (
    BETA,
    POSITIVE,
    SHARE,
    Rule,
    Text,
    at_least,
    check_not_empty,
    check_rule,
    coerce_fields,
    one_of,
    split_hint,
)
from mft.config import (
    IMPORTANCE_METHODS,
    INITS,
    MODES,
    QUANTIZATIONS,
    Layers,
    MaskConfig,
    Sharpness,
    TrainConfig,
    parse_layers,
)
from mft.files.figure import COLOURS
from mft.rewards.on_policy_teacher import check_prompt
from mft_study.arms.setting import CHOICES, Setting
from mft_study.arms.size import NUMBER, model_numbers, trained_weight_bytes
from mft_study.arms.weights import Weights, clone_with_weights, load_weights

if TYPE_CHECKING:
    from torch import nn

    from mft.training.loop import StepReport

_SOME = Rule("lie in (0, 1]", exclusiveMinimum=0, maximum=1)
# Keys that several kinds take: for training, for learning after the full fine-tune, for arms on chosen layers.
TRAINING = frozenset({"lrs", "betas", "beta1s"})
LEARNING = TRAINING | {"start", "teacher", "teacher_prompt"}
ON_LAYERS = frozenset({"layers_to_transform", "target_modules"})
_OF_ALL = ("kind", "epochs", "lora_rank", "runs", "max_bytes")  # keys that any arm takes
_OF_MASKS = ("layers_to_transform", "target_modules", "mode", "threshold", "sharpness", "deletion_penalty")


def parse_arm_layers(text: str) -> list[int]:
    """Parse layers as parse_layers does; [] for "all"."""
    return [] if text.strip() == "all" else parse_layers(text)


_RANGES = next(text for text in split_hint(Layers)[1] if isinstance(text, Text))
ArmLayers = Annotated[
    int | list[int] | None,
    Rule("count layers from 0", minimum=0),
    Text(rf"^\s*all\s*$|{_RANGES.pattern}", parse_arm_layers),
]


@dataclass
class Arm:
    """One row of the table, and the grid of settings that validation chooses from."""

    kind: str
    lrs: Annotated[list[float], POSITIVE] = field(default_factory=list)
    epochs: Annotated[list[float], POSITIVE] = field(default_factory=lambda: [1.0])
    keep_ratios: Annotated[list[float], SHARE] = field(default_factory=list)  # empty: the study's mask.keep_ratio
    # How scores start: a value of mask.init, or a one-shot method; null: the study's mask.init.
    init: Annotated[str | None, one_of(tuple(dict.fromkeys((*INITS, *IMPORTANCE_METHODS))))] = None
    # What is compared with the threshold; null: the study's mask.mode.
    mode: Annotated[str | None, one_of(MODES)] = None
    threshold: float | None = None  # fixed; replaces keep_ratios
    beta1s: Annotated[list[float], BETA] = field(default_factory=list)  # AdamW's momentum, to choose from; empty: betas
    betas: Annotated[tuple[float, float] | None, BETA] = None  # AdamW's; null: those of full or stage
    layers_to_transform: ArmLayers = None  # null: the study's mask.layers_to_transform; all, or []: every layer
    target_modules: list[str] | None = None  # null: the study's mask.target_modules
    sharpness: Sharpness = None  # for scores with a threshold; null: the study's mask.sharpness
    deletion_penalty: Annotated[float | None, at_least(0)] = None  # null: the study's mask.deletion_penalty
    lora_rank: Annotated[int, at_least(1)] = 8
    lora_ranks: Annotated[list[int], at_least(1)] = field(default_factory=list)  # to choose from; empty: lora_rank
    # Validation does not choose a setting whose runs store more bytes than this besides their start; null: no limit.
    max_bytes: Annotated[int | None, at_least(0)] = None
    start: str | None = None  # the arm at whose end this one starts; null: the full fine-tune
    quantization: Annotated[str | None, one_of(QUANTIZATIONS)] = None  # for quantized
    # The arm whose end model teaches this one: its predictions replace the text (KL alone) or, with objective rewards,
    # the rewards of this arm's own answers. null: learn from the text, or by rewards.
    teacher: str | None = None
    teacher_prompt: str | None = None  # by rewards: what the teacher reads (OnPolicyTeacher.prompt); null: the question
    of: str | None = None
    runs: Annotated[int, at_least(2)] = 3
    alphas: Annotated[list[float], SHARE] = field(default_factory=list)  # for interpolated
    shares: Annotated[list[float], _SOME] = field(default_factory=list)  # kept; for ternary, sparse_delta, coded

    # What a kind is; the values here are right for most kinds.
    takes = frozenset[str]()  # keys that it may have, besides those of all arms
    needs = frozenset[str]()  # keys that it must have, of takes
    learns = ""  # what its training after the fine-tune changes, as mft estimate calls it; "": nothing
    follows = True  # it starts at the end of the full fine-tune, or of another arm
    whole_model = False  # its weights may differ from its start's anywhere, not only in its layers
    may_start = False  # its weights have the model's own names, so other arms may start at its end
    may_teach = False  # it may be another arm's teacher
    over_codes = True  # it may start at a quantized arm's end
    makes_weights = False  # its runs leave a file of weights although nothing is trained
    needs_codes = False  # it, or its source, must start at a quantized arm's end
    compressible = False  # the difference of its weights from its start's can be compressed
    is_mask = False  # a mask, trained or found in one shot
    is_mft = False  # a trained mask
    tuned = True  # it is a rival of MFT
    fades = False  # at a vanishing rate it equals its start (a mask does not: it drops weights from the beginning)
    tempered = False  # its logits are scaled by the temperature that validation chooses
    # How pictures show it.
    near = False  # pictures are wide enough for all arms of such kinds
    colour = COLOURS["one-shot mask"]  # the same in every picture
    joined = True  # a line joins it with others of its kind

    def __post_init__(self) -> None:
        coerce_fields(self)
        self._check_keys()
        check_rule(bool(self.epochs), "epochs", "hold at least one number", self.epochs)
        check_not_empty(self, "target_modules")
        for name in ("betas", "beta1s"):
            check_rule(bool(self.lrs) or not getattr(self, name), name, "be left out without lrs", getattr(self, name))
        if self.threshold is not None:
            rule = "be at least 0 unless mode is value"
            check_rule(self.threshold >= 0 or self.mode == "value", "threshold", rule, self.threshold)
            check_rule(not self.keep_ratios, "keep_ratios", "be left out with a threshold", self.keep_ratios)
        if self.teacher_prompt is not None:
            check_rule(self.teacher is not None, "teacher_prompt", "be left out without a teacher", self.teacher_prompt)
            check_prompt(self.teacher_prompt, "teacher_prompt")

    def _check_keys(self) -> None:
        """Check that keys which this kind does not take have their defaults, and that keys it needs do not."""
        taken = {*_OF_ALL, *self.takes, *(item.name for item in dataclasses.fields(self)[len(_FIELDS) :])}
        for item in _FIELDS:
            value = getattr(self, item.name)
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            check_rule(item.name in taken or value == default, item.name, "be left out for this kind", value)
            check_rule(item.name not in self.needs or value != default, item.name, "be given for this kind", value)

    # ------------------------------------------------------------------------------- what it says

    def settings(self, mask: MaskConfig) -> list[Setting]:
        """Return the declared grid, in order; one empty setting if there is nothing to choose. mask: the study's."""
        values = self.choices(mask)
        return [Setting(**dict(zip(values, one))) for one in itertools.product(*(v or [None] for v in values.values()))]

    def choices(self, mask: MaskConfig) -> dict[str, list[Any]]:
        """Return the values to choose from, by field of Setting and in the order of the fields."""
        found: dict[str, list[Any]] = {name: sorted(set(getattr(self, key))) for key, name in CHOICES.items()}
        return found if self.lrs else found | {"epochs": []}

    def mask_config(self, mask: MaskConfig) -> MaskConfig:
        """Return the study's mask with the arm's own values; the keep ratio comes from a setting."""
        said = {name: value for name in _OF_MASKS if (value := getattr(self, name)) is not None}
        if self.layers_to_transform == []:
            said["layers_to_transform"] = None  # in a MaskConfig: every layer
        if self.threshold is not None:
            said |= {"keep_ratio": None, "budget": None, "pattern": "matrix"}
        return dataclasses.replace(mask, **said)

    def may_be_of(self, source: type[Arm]) -> bool:
        """Return whether it can be made of the runs of an arm of the kind source."""
        return False

    def why_uncompared(self, control: str) -> str:
        """Return why reports compare it with no arm, although the study has this control; "" if they do."""
        return ""

    def optimiser(self) -> dict[str, Any]:
        """Return options of AdamW in place of those of full or stage, besides lr and betas."""
        return {}

    def largest_rank(self) -> int:
        """Return the largest adapter rank that validation chooses from."""
        return max(self.lora_ranks or [self.lora_rank])

    def check_installed(self) -> None:
        """Raise RuntimeError if a library is missing. It is called before anything is trained."""

    @property
    def leaves_weights(self) -> bool:
        """Whether its runs leave a file of weights."""
        return self.makes_weights or bool(self.lrs)

    # ------------------------------------------------------------------------------- its layers

    def targets(self, model: nn.Module, mask: MaskConfig, setting: Setting) -> list[str]:
        """Return the names of the linear layers that it changes. mask: the study's. Raises: ValueError if none."""
        from mft.masks.targets import select_targets

        return select_targets(model, self.mask_config(mask))

    def frozen_below(self, model: nn.Module, mask: MaskConfig, setting: Setting) -> int:
        """Return how many of the model's layers lie below everything that it changes."""
        from mft.models.causal_lm import clone_with_own_weights, first_trainable_layer
        from mft.models.linears import weight_name

        names = self.targets(model, mask, setting)
        clone = clone_with_own_weights(model, names)
        for name in names:
            clone.get_parameter(weight_name(clone, name)).requires_grad_(True)
        return first_trainable_layer(clone)

    # ------------------------------------------------------------------------------- its models

    def made_weights(self, ground: Ground) -> Weights | None:
        """Return the weights that an untrained arm's run saves; None: it saves none."""
        return None

    def model(self, ground: Ground, path: Path) -> nn.Module:
        """Return the model of a finished run, in eval mode. path: the weights that the run saved."""
        return self.model_with(ground, load_weights(path))

    def model_with(self, ground: Ground, weights: Weights) -> nn.Module:
        """Return the model from what trained_weights returned."""
        return clone_with_weights(ground.start, weights).eval()

    def decoded(self, ground: Ground, weights: Weights) -> nn.Module:
        """Return the model from fp32 weights; a model of a narrower dtype computes with them in fp32 too."""
        from mft.models.causal_lm import clone_with_own_weights
        from mft_study.arms.fp32_steps import compute_in_fp32

        model = ground.start
        if not self.whole_model:  # then no changed weight is tied
            model = compute_in_fp32(clone_with_own_weights(model), weights)
        return clone_with_weights(model, weights).eval()

    def merged(self, ground: Ground, weights: Weights) -> Weights:
        """Return the weights as the ordinary model has them, by its names."""
        return weights

    def round_to_codes(self, start: nn.Module, merged: Weights, codes: str) -> Weights:
        """Return merged as the format ``codes`` can hold it; the weights of start are in this format already."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- its training

    def untrained(self, ground: Ground) -> nn.Module:
        """Return a clone of the start with what the arm trains added. Nothing else requires grad."""
        raise NotImplementedError

    def train(
        self, model: nn.Module, ground: Ground, rows: Any, train: TrainConfig, **options: Any
    ) -> Sequence[StepReport]:
        """Train model, which untrained returned, in place. options: as in train_loop."""
        from mft.training.loop import train_loop

        return train_loop(model, rows, train, **options)

    def start_weights(self, ground: Ground) -> Weights:
        """Return what trained_weights would return before any training."""
        return {name: p.detach() for name, p in self.untrained(ground).named_parameters() if p.requires_grad}

    def trained_weights(self, model: nn.Module, ground: Ground) -> Weights:
        """Return what was trained, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------------------- its bytes

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes that must be stored besides the start (see size.py). model: the run's."""
        return NUMBER * ground.numbers()

    def bytes_of_mean(self, ground: Ground, model: nn.Module, runs: int) -> int:
        """Return the same for a model whose weights are the mean of this arm's runs. runs: how many."""
        return NUMBER * ground.numbers()

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes in memory besides the start while the model runs; the start stays unchanged."""
        return self.stored_bytes(ground, model)

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        """Return the bytes in memory while it trains, besides its start's weights (size.py). Here: all weights."""
        return trained_weight_bytes(ground.base, model_numbers(ground.base))


@dataclass(frozen=True)
class Source:
    """A run that an arm is made of."""

    arm: Arm
    setting: Setting
    path: Path  # the weights that it saved

    def weights(self, ground: Ground) -> Weights:
        """Return its weights by the ordinary model's names. ground: of the arm that is made of this run."""
        return self.arm.merged(self._ground(ground), load_weights(self.path))

    def start_weights(self, ground: Ground) -> Weights:
        """Return what it trained, as it was before training."""
        return self.arm.start_weights(self._ground(ground))

    def model_with(self, ground: Ground, weights: Weights) -> nn.Module:
        """Return its model with other weights in place of its own, in fp32."""
        return self.arm.decoded(self._ground(ground), weights)

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes to store, as if model were this run's."""
        return self.arm.stored_bytes(self._ground(ground), model)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes in memory, as if model were this run's."""
        return self.arm.resident_bytes(self._ground(ground), model)

    def _ground(self, ground: Ground) -> Ground:
        return dataclasses.replace(ground, setting=self.setting)


@dataclass(frozen=True)
class Ground:
    """Where a unit starts, and what its arm may use there."""

    start: nn.Module  # the model at which it starts, frozen and in eval mode: arms take clones
    base: nn.Module  # the base model
    layers: list[str]  # the linear layers that the arm, or the arm that it is made of, changes
    mask: MaskConfig  # the arm's, with the unit's keep ratio and seed
    setting: Setting
    seed: int
    rows: Callable[[], Any]  # loads the domain's training rows
    sources: tuple[Source, ...] = ()  # the runs that it is made of
    codes: str | None = None  # the format of a quantized start, one of QUANTIZATIONS; None: the start is exact

    @property
    def source(self) -> Source:
        """The only run that it is made of."""
        (source,) = self.sources
        return source

    def weight_names(self) -> list[str]:
        """Return the names of the layers' weights."""
        from mft.models.linears import weight_name

        return [weight_name(self.start, name) for name in self.layers]

    def numbers(self) -> int:
        """Return how many numbers these weights have in all."""
        return sum(self.start.get_parameter(name).numel() for name in self.weight_names())


_FIELDS = dataclasses.fields(Arm)
