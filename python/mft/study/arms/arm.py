"""An arm of a study: the keys of its file, and what every kind of arm says of itself; a kind is a class below Arm.

A kind names the keys that it takes, tells plans and reports what it is by class attributes, and has methods that make,
train and weigh its models. A key that no other kind has is a field of its own class (a dataclass then): the keys of
Arm itself stand in the hashes of all arms.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import load_file
from torch import nn

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
from mft.importance.importance import METHODS
from mft.masks.targets import select_targets
from mft.models.causal_lm import clone_with_own_weights, first_trainable_layer
from mft.models.linears import weight_name
from mft.rewards.teacher import check_prompt
from mft.study.arms.fp32_steps import compute_in_fp32
from mft.study.arms.memory import trained_weight_bytes
from mft.study.arms.setting import CHOICES, Setting
from mft.study.arms.size import NUMBER, model_numbers
from mft.study.arms.weights import Weights, with_weights
from mft.training.loop import StepReport, train_loop

_SOME = Rule("lie in (0, 1]", exclusiveMinimum=0, maximum=1)
# Keys that several kinds take: of training, of an arm after the full fine-tune that learns, of one on chosen layers.
TRAINING = frozenset({"lrs", "betas", "beta1s"})
LEARNING = TRAINING | {"start", "teacher", "teacher_prompt"}
ON_LAYERS = frozenset({"layers_to_transform", "target_modules"})
_OF_ALL = ("kind", "epochs", "lora_rank", "runs", "max_bytes")  # keys that any arm takes
_OF_MASKS = ("layers_to_transform", "target_modules", "mode", "threshold", "sharpness", "deletion_penalty")


def parse_arm_layers(text: str) -> list[int]:
    """As parse_layers; [] for "all"."""
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
    # Of scores, one of mask.init's or a one-shot method; null: the study's mask.init.
    init: Annotated[str | None, one_of(tuple(dict.fromkeys((*INITS, *METHODS))))] = None
    # What is compared with the threshold; null: the study's mask.mode.
    mode: Annotated[str | None, one_of(MODES)] = None
    threshold: float | None = None  # fixed, in place of keep_ratios
    beta1s: Annotated[list[float], BETA] = field(default_factory=list)  # of AdamW, its momentum; empty: that of betas
    betas: Annotated[tuple[float, float] | None, BETA] = None  # of AdamW; null: those of full or stage
    layers_to_transform: ArmLayers = None  # null: the study's mask.layers_to_transform; all, or []: every layer
    target_modules: list[str] | None = None  # null: the study's mask.target_modules
    sharpness: Sharpness = None  # of scores with a threshold; null: the study's mask.sharpness
    deletion_penalty: Annotated[float | None, at_least(0)] = None  # null: the study's mask.deletion_penalty
    lora_rank: Annotated[int, at_least(1)] = 8
    lora_ranks: Annotated[list[int], at_least(1)] = field(default_factory=list)  # to choose from; empty: lora_rank
    # A setting whose runs store more beside their start does not count when validation chooses; null: any does.
    max_bytes: Annotated[int | None, at_least(0)] = None
    start: str | None = None  # the arm whose end this one begins at; null: the full fine-tune
    quantization: Annotated[str | None, one_of(QUANTIZATIONS)] = None  # of quantized
    # The arm whose end this one learns the words of, in place of the text's (KL alone), or of the rewards of its own
    # answers; null: the text's, or by rewards.
    teacher: str | None = None
    teacher_prompt: str | None = None  # by rewards: what the teacher reads (OnPolicyTeacher.prompt); null: the question
    of: str | None = None
    runs: Annotated[int, at_least(2)] = 3
    alphas: Annotated[list[float], SHARE] = field(default_factory=list)  # of interpolated
    shares: Annotated[list[float], _SOME] = field(default_factory=list)  # of weights, for ternary and sparse_delta

    # What a kind is; the values here are those of most.
    takes = frozenset[str]()  # keys that it may have, beside those of all
    needs = frozenset[str]()  # keys that it must have, of takes
    learns = ""  # what its training after the fine-tune moves, as mft estimate calls it; "": nothing
    follows = True  # begins at the end of the full fine-tune, or of another arm
    whole_model = False  # its weights may differ from its start's anywhere, not in its layers alone
    may_start = False  # its weights bear the model's own names: other arms may begin at its end
    may_teach = False  # other arms may learn its words
    over_codes = True  # it may begin at a quantized arm's end
    needs_codes = False  # it must begin there, or what it is made of
    compressible = False  # its weights differ from its start's by what can be made small
    is_mask = False  # trained, or found in one shot
    is_mft = False  # a trained mask
    tuned = True  # a rival of MFT
    fades = False  # at a vanishing rate it does nothing: it is its start (a mask begins with what it drops at first)
    tempered = False  # its logits are scaled, by what validation likes best
    # How pictures show it.
    near = False  # they are as wide as all arms of such kinds need
    colour = COLOURS["one-shot mask"]  # the same in every picture
    joined = True  # by a line there, with others of its kind

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
            check_rule(not self.keep_ratios, "keep_ratios", "be left out beside a threshold", self.keep_ratios)
        if self.teacher_prompt is not None:
            check_rule(self.teacher is not None, "teacher_prompt", "be left out without a teacher", self.teacher_prompt)
            check_prompt(self.teacher_prompt, "teacher_prompt")

    def _check_keys(self) -> None:
        """Those that this kind does not take have their defaults, and those that it needs do not."""
        taken = {*_OF_ALL, *self.takes, *(item.name for item in dataclasses.fields(self)[len(_FIELDS) :])}
        for item in _FIELDS:
            value = getattr(self, item.name)
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            check_rule(item.name in taken or value == default, item.name, "be left out for this kind", value)
            check_rule(item.name not in self.needs or value != default, item.name, "be given for this kind", value)

    # ------------------------------------------------------------------------------- what it says

    def settings(self, mask: MaskConfig) -> list[Setting]:
        """The declared grid, in order; one empty setting where there is nothing to choose. mask: the study's."""
        values = self.choices(mask)
        return [Setting(**dict(zip(values, one))) for one in itertools.product(*(v or [None] for v in values.values()))]

    def choices(self, mask: MaskConfig) -> dict[str, list[Any]]:
        """By field of Setting, in their order, the values to choose from."""
        found: dict[str, list[Any]] = {name: sorted(set(getattr(self, key))) for key, name in CHOICES.items()}
        return found if self.lrs else found | {"epochs": []}

    def mask_config(self, mask: MaskConfig) -> MaskConfig:
        """The study's mask with what the arm says of it; its keep ratio is a setting's."""
        said = {name: value for name in _OF_MASKS if (value := getattr(self, name)) is not None}
        if self.layers_to_transform == []:
            said["layers_to_transform"] = None  # of MaskConfig, every layer
        return dataclasses.replace(mask, **said)

    def may_be_of(self, source: type["Arm"]) -> bool:
        """Whether it can be made of the runs of an arm of this kind."""
        return False

    def why_uncompared(self, control: str) -> str:
        """Why reports hold it against nothing, though the study has this control; "" if they do."""
        return ""

    def largest_rank(self) -> int:
        """The largest rank of adapters among those that validation chooses from."""
        return max(self.lora_ranks or [self.lora_rank])

    def check_installed(self) -> None:
        """Raise RuntimeError if a library is missing: asked before anything is trained."""

    @property
    def leaves_weights(self) -> bool:
        """Whether its runs leave a file of weights."""
        return bool(self.lrs)

    # ------------------------------------------------------------------------------- its layers

    def targets(self, model: nn.Module, mask: MaskConfig, setting: Setting) -> list[str]:
        """The linears that it changes. mask: the study's. Raises: ValueError if there are none."""
        return select_targets(model, self.mask_config(mask))

    def frozen_below(self, model: nn.Module, mask: MaskConfig, setting: Setting) -> int:
        """How many of the model's layers lie below all that it changes."""
        names = self.targets(model, mask, setting)
        clone = clone_with_own_weights(model, names)
        for name in names:
            clone.get_parameter(weight_name(clone, name)).requires_grad_(True)
        return first_trainable_layer(clone)

    # ------------------------------------------------------------------------------- its models

    def made(self, ground: "Ground") -> Weights | None:
        """The weights that a run leaves without being trained; None: it leaves none."""
        return None

    def model(self, ground: "Ground", path: Path) -> nn.Module:
        """The model of a finished run, in eval mode; path: of the weights that the run left."""
        return self.model_with(ground, load_file(path))

    def model_with(self, ground: "Ground", weights: Weights) -> nn.Module:
        """The same from the weights that trained_weights gave."""
        return with_weights(ground.start, weights).eval()

    def decoded(self, ground: "Ground", weights: Weights) -> nn.Module:
        """The same from weights in fp32, which a narrower model is given in fp32 too."""
        model = ground.start
        if not self.whole_model:  # then weights are nowhere tied
            model = compute_in_fp32(clone_with_own_weights(model), weights)
        return with_weights(model, weights).eval()

    def merged(self, ground: "Ground", weights: Weights) -> Weights:
        """The same weights in the names of the ordinary model."""
        return weights

    def in_codes(self, start: nn.Module, merged: Weights, codes: str) -> Weights:
        """What merged gave, as codes of this kind hold it; the weights of start are such already."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- its training

    def untrained(self, ground: "Ground") -> nn.Module:
        """A clone of the start, with what the arm trains added: that requires grad, and nothing else."""
        raise NotImplementedError

    def train(
        self, model: nn.Module, ground: "Ground", rows: Any, train: TrainConfig, **options: Any
    ) -> Sequence[StepReport]:
        """Train model, which untrained gave, in place; options as of train_loop."""
        return train_loop(model, rows, train, **options)

    def begun(self, ground: "Ground") -> Weights:
        """What trained_weights would give before any training."""
        return {name: p.detach() for name, p in self.untrained(ground).named_parameters() if p.requires_grad}

    def trained_weights(self, model: nn.Module, ground: "Ground") -> Weights:
        """What was trained, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------------------- its bytes

    def stored_bytes(self, ground: "Ground", model: nn.Module) -> int:
        """What must be stored beside the start (see size.py); model: the run's."""
        return NUMBER * ground.numbers()

    def bytes_of_mean(self, ground: "Ground", model: nn.Module, runs: int) -> int:
        """The same of a model whose weights are the mean of so many runs of this arm."""
        return NUMBER * ground.numbers()

    def resident_bytes(self, ground: "Ground", model: nn.Module) -> int:
        """Bytes in memory besides the start while the model runs; the start stays as it is."""
        return NUMBER * ground.numbers()

    def training_bytes(self, ground: "Ground", train: TrainConfig) -> int:
        """What must be in memory while it trains, beside its start's weights (see memory.py); here, of all weights."""
        return trained_weight_bytes(ground.base, model_numbers(ground.base))


@dataclass(frozen=True)
class Source:
    """A run that an arm is made of."""

    arm: Arm
    setting: Setting
    path: Path  # of the weights that it left

    def weights(self, ground: "Ground") -> Weights:
        """In the names of the ordinary model; ground: of the arm that is made of it."""
        return self.arm.merged(self._ground(ground), load_file(self.path))

    def begun(self, ground: "Ground") -> Weights:
        """What it trained, as it was before."""
        return self.arm.begun(self._ground(ground))

    def model_with(self, ground: "Ground", weights: Weights) -> nn.Module:
        """Its model with others of its weights, in fp32."""
        return self.arm.decoded(self._ground(ground), weights)

    def stored_bytes(self, ground: "Ground", model: nn.Module) -> int:
        """As if model were this run's."""
        return self.arm.stored_bytes(self._ground(ground), model)

    def resident_bytes(self, ground: "Ground", model: nn.Module) -> int:
        """The same."""
        return self.arm.resident_bytes(self._ground(ground), model)

    def _ground(self, ground: "Ground") -> "Ground":
        return dataclasses.replace(ground, setting=self.setting)


@dataclass(frozen=True)
class Ground:
    """Where a unit begins, and what its arm may use there."""

    start: nn.Module  # the model at which it begins, frozen and in eval mode: arms take clones
    base: nn.Module  # the base model
    layers: list[str]  # the linears that the arm changes, or the one that it is made of
    mask: MaskConfig  # of the arm, in the unit's setting and from its seed
    setting: Setting
    seed: int
    rows: Callable[[], Any]  # loads the domain's training rows
    sources: tuple[Source, ...] = ()  # the runs that it is made of
    codes: str | None = None  # those over which it begins, one of QUANTIZATIONS; None: its start is exact

    def weight_names(self) -> list[str]:
        """Of the weights of the layers."""
        return [weight_name(self.start, name) for name in self.layers]

    def shapes(self) -> list[tuple[int, ...]]:
        """(N, K) of each of these weights; of experts (E, N, K)."""
        return [tuple(self.start.get_parameter(name).shape) for name in self.weight_names()]

    def numbers(self) -> int:
        """How many numbers these weights have."""
        return sum(map(math.prod, self.shapes()))


_FIELDS = dataclasses.fields(Arm)
