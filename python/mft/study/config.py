"""What a study declares before it runs: model, domains, arms with the settings that each may choose from, seeds.

A file of it is strict YAML (see configs/compare/small.yaml); whatever is unknown or out of range names its key.
"""

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from mft.checks import (
    BETA,
    POSITIVE,
    SEED,
    SHARE,
    Rule,
    Text,
    at_least,
    check_not_empty,
    check_one_of,
    check_rule,
    coerce_fields,
    expand_home,
    nearest,
    one_of,
    split_hint,
)
from mft.config import (
    INITS,
    MODES,
    QUANTIZATIONS,
    DataConfig,
    Layers,
    MaskConfig,
    ModelConfig,
    Sharpness,
    TrainConfig,
    parse_layers,
)
from mft.importance.importance import METHODS
from mft.rewards.config import RewardsConfig
from mft.rewards.teacher import check_prompt

# What an arm is. "full" is where all but "base" start; there is one of it, and one of "base" at most.
FULL_KINDS = BASE, FULL = ("base", "full")
TRAINED = CONTINUED, CONTROL, LORA, MASK = ("continued", "control", "lora", "mask")
ONE_SHOT = tuple(METHODS)  # random, magnitude, magnitude_rows, wanda, gradient, fisher
TEMPERATURE = "temperature"
QUANTIZED = "quantized"  # its start, rounded: where arms may begin that train over codes
# What is made of another arm's runs.
COMPRESSED = BITDELTA, TERNARY, SPARSE_DELTA = ("bitdelta", "ternary", "sparse_delta")
AVERAGE, INTERPOLATED = "average", "interpolated"
DERIVED = (AVERAGE, INTERPOLATED, *COMPRESSED)
KINDS = (*FULL_KINDS, *TRAINED, *ONE_SHOT, TEMPERATURE, QUANTIZED, *DERIVED)
_MERGED = (FULL, CONTINUED, CONTROL, MASK)  # whose weights bear the model's own names: where another arm may start
# What the arms after the full fine-tune make smaller: the loss, or the share of wrong answers, by rewards.
OBJECTIVES = CROSS_ENTROPY, REWARDS = ("cross_entropy", "rewards")
_WEIGHTS = (FULL, CONTINUED, CONTROL)  # whose weights differ from their start's by what can be made small
_NAME = re.compile(r"\w[\w .()+-]*")
LEAST_RATES = 3  # of which a trained arm may choose: the best of fewer cannot lie between two that are worse
_SOME = Rule("lie in (0, 1]", exclusiveMinimum=0, maximum=1)


def parse_arm_layers(text: str) -> list[int]:
    """As parse_layers; [] for "all"."""
    return [] if text.strip() == "all" else parse_layers(text)


_RANGES = next(text for text in split_hint(Layers)[1] if isinstance(text, Text))
ArmLayers = Annotated[
    int | list[int] | None,
    Rule("count layers from 0", minimum=0),
    Text(rf"^\s*all\s*$|{_RANGES.pattern}", parse_arm_layers),
]


@dataclass(frozen=True)
class Setting:
    """One configuration of an arm; None where the arm has no such choice."""

    lr: float | None = None
    epochs: float | None = None
    keep_ratio: float | None = None
    beta1: float | None = None
    alpha: float | None = None
    rank: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        parts = (
            *(("lr", self.lr), ("epochs", self.epochs), ("keep", self.keep_ratio), ("beta1", self.beta1)),
            ("alpha", self.alpha),
            ("rank", self.rank),
            ("share", self.share),
        )
        return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None)


@dataclass
class ArmConfig:
    """One row of the table, and the grid of settings that validation chooses from.

    kind: base: before the full fine-tune. full: the full fine-tune, annealed; without lrs, the model as it comes, for
    one that needs no fine-tune. continued: all weights trained on.
    control: the masked layers' weights trained on. lora: adapters on the same layers. mask: scores trained.
    random, magnitude, magnitude_rows, wanda, gradient, fisher: a mask found in one shot (importance.py). temperature:
    the fine-tune with its logits scaled. quantized: its start, the decoder layers' linears rounded to what codes of
    `quantization` hold; whatever begins at it trains over codes. average: the mean weights of `runs` runs of the arm
    `of`, from one fine-tune.
    interpolated: start + alpha * (trained - start), trained being what the arm `of` made of its start.
    bitdelta, ternary, sparse_delta: start + what few bits hold of trained - start (see arms/compress.py);
    with lrs the scales of bitdelta are trained then.
    """

    kind: Annotated[str, one_of(KINDS)]
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

    def __post_init__(self) -> None:
        coerce_fields(self)
        derived = self.kind in DERIVED
        trained = self.kind in TRAINED or (self.kind in (FULL, BITDELTA) and bool(self.lrs))
        check_rule(bool(self.lrs) == trained, "lrs", "be given for a trained kind, and for no other", self.lrs)
        check_rule(bool(self.epochs), "epochs", "hold at least one number", self.epochs)
        masked = self.kind in (MASK, *ONE_SHOT)
        check_rule(masked or not self.keep_ratios, "keep_ratios", "be left out for this kind", self.keep_ratios)
        check_not_empty(self, "target_modules")
        rule = "be left out for this kind"
        for name in ("layers_to_transform", "target_modules"):
            value = getattr(self, name)
            check_rule(value is None or self.kind in (CONTROL, LORA, MASK, *ONE_SHOT), name, rule, value)
        for name in ("init", "mode", "threshold", "sharpness", "deletion_penalty"):
            value = getattr(self, name)
            check_rule(self.kind == MASK or value is None, name, "be left out for this kind", value)
        if self.threshold is not None:
            rule = "be at least 0 unless mode is value"
            check_rule(self.threshold >= 0 or self.mode == "value", "threshold", rule, self.threshold)
            check_rule(not self.keep_ratios, "keep_ratios", "be left out beside a threshold", self.keep_ratios)
        check_rule(trained or self.betas is None, "betas", "be left out for this kind", self.betas)
        check_rule(trained or not self.beta1s, "beta1s", "be left out for this kind", self.beta1s)
        check_rule(self.kind == LORA or not self.lora_ranks, "lora_ranks", "be left out for this kind", self.lora_ranks)
        rule = "be left out for this kind, whose setting the arm that it is of chooses"
        check_rule(self.kind != AVERAGE or self.max_bytes is None, "max_bytes", rule, self.max_bytes)
        rule = f"name an arm, for the kinds {', '.join(DERIVED)} alone"
        check_rule(derived == (self.of is not None), "of", rule, self.of)
        rule = "be left out for this kind"
        begins = self.kind in (*TRAINED, *ONE_SHOT, QUANTIZED)
        check_rule(self.start is None or begins, "start", rule, self.start)
        check_rule(self.teacher is None or self.kind in TRAINED, "teacher", rule, self.teacher)
        if self.teacher_prompt is not None:
            check_rule(self.teacher is not None, "teacher_prompt", "be left out without a teacher", self.teacher_prompt)
            check_prompt(self.teacher_prompt, "teacher_prompt")
        rule = f"be given for the kind {QUANTIZED}, and left out for others"
        check_rule((self.quantization is not None) == (self.kind == QUANTIZED), "quantization", rule, self.quantization)
        rule = f"hold at least one number for the kind {INTERPOLATED}, and be left out for others"
        check_rule(bool(self.alphas) == (self.kind == INTERPOLATED), "alphas", rule, self.alphas)
        some = (TERNARY, SPARSE_DELTA)
        rule = f"hold at least one number for the kinds {' and '.join(some)}, and be left out for others"
        check_rule(bool(self.shares) == (self.kind in some), "shares", rule, self.shares)

    def settings(self, mask: MaskConfig) -> list[Setting]:
        """The declared grid, in order; one empty setting where there is nothing to choose."""
        lrs: list[Any] = sorted(set(self.lrs)) or [None]
        epochs: list[Any] = sorted(set(self.epochs)) if self.lrs else [None]
        ratios: list[Any] = [None]
        if self.kind in (MASK, *ONE_SHOT) and self.threshold is None:
            ratios = sorted(set(self.keep_ratios)) or [mask.keep_ratio]
        beta1s: list[Any] = sorted(set(self.beta1s)) or [None]
        alphas: list[Any] = sorted(set(self.alphas)) or [None]
        ranks: list[Any] = sorted(set(self.lora_ranks)) or [None]
        shares: list[Any] = sorted(set(self.shares)) or [None]
        return [Setting(*values) for values in itertools.product(lrs, epochs, ratios, beta1s, alphas, ranks, shares)]


@dataclass
class ScratchConfig:
    """A small Llama, or with experts a small Qwen3-MoE, trained from scratch on the standard library (from_scratch.py).

    intermediate_size is each expert's, where there are any. The tokenizer is trained too.
    """

    vocab_size: Annotated[int, at_least(1)] = 2048
    hidden_size: Annotated[int, at_least(1)] = 128
    intermediate_size: Annotated[int, at_least(1)] = 352
    layers: Annotated[int, at_least(1)] = 4
    heads: Annotated[int, at_least(1)] = 4
    experts: Annotated[int, at_least(0)] = 0  # of each layer's MLP; 0: none, an MLP for all tokens
    experts_per_token: Annotated[int, at_least(1)] = 2
    data: DataConfig = field(
        default_factory=lambda: DataConfig(source="stdlib", subset="pretrain", sequence_length=256)
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            lr=5e-3, epochs=2.0, batch_size=4, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0
        )
    )

    def __post_init__(self) -> None:
        coerce_fields(self)
        _check_not_evaluated("train.", self.train)
        check_rule(self.data.sources is None, "data.sources", "be null: one source makes the tokenizer", "several")
        check_rule(not self.data.streaming, "data.streaming", "be false in a study", self.data.streaming)
        rule = f"be a multiple of heads = {self.heads}"
        check_rule(self.hidden_size % self.heads == 0, "hidden_size", rule, self.hidden_size)
        rule = f"be at most experts = {self.experts}"
        few = not self.experts or self.experts_per_token <= self.experts
        check_rule(few, "experts_per_token", rule, self.experts_per_token)


@dataclass
class StudyConfig:
    """Everything that `mft compare` runs."""

    arms: dict[str, ArmConfig]
    domains: dict[str, DataConfig]
    model: ModelConfig = field(default_factory=ModelConfig)
    scratch: ScratchConfig | None = None  # instead of model.name
    mask: MaskConfig = field(default_factory=MaskConfig)  # which layers, for control, LoRA and every mask
    full: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))  # lr and epochs come from the arms
    stage: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))  # of all trained arms after it
    objective: Annotated[str, one_of(OBJECTIVES)] = CROSS_ENTROPY
    # In place of stage where the objective is rewards; an epoch asks as many questions as there are.
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    # By domain: the data whose training rows are asked instead of the domain's own, on which it was fine-tuned.
    questions: dict[str, DataConfig] = field(default_factory=dict)
    seeds: Annotated[list[int], SEED] = field(default_factory=lambda: [0, 1, 2])
    # Further settings that an arm may try, one at a time, while its best lies at an end of its grid (grid.py): a step
    # of epochs and the rates beside it are three.
    extensions: Annotated[int, at_least(0)] = 6
    max_epochs: Annotated[float, POSITIVE] = 32.0  # up to which a grid of epochs grows; it may declare more
    checkpoints: Annotated[int, at_least(1)] = 4  # of a run after the fine-tune, of which validation chooses one
    answers: list[str] = field(default_factory=list)  # domains whose completions are generated and compared exactly
    # Text that no arm is trained for, by which forgetting is measured: its loss, and the KL divergence from an arm's
    # start. A text that bears a domain's name is that domain's own, and general to the others alone.
    general: dict[str, DataConfig] = field(default_factory=dict)
    workers: Annotated[int, at_least(1)] = 2  # processes of one thread each
    output_dir: str = "runs/compare"

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_rule(bool(self.seeds), "seeds", "hold at least one int", self.seeds)
        check_rule(len(set(self.seeds)) == len(self.seeds), "seeds", "be different ints", self.seeds)
        check_not_empty(self, "output_dir")
        expand_home(self, "output_dir")
        check_rule(bool(self.domains), "domains", "hold at least one data set", self.domains)
        for section in ("arms", "domains", "general"):  # their names become directories
            for name in getattr(self, section):
                check_rule(
                    bool(_NAME.fullmatch(name)), section, "have names of letters, digits and -+_. ()", repr(name)
                )
        for name in self.questions:
            check_one_of("questions", name, tuple(self.domains))
        for section in ("domains", "general", "questions"):  # arms take epochs of them, in orders of their own
            for name, data in getattr(self, section).items():
                check_rule(not data.streaming, f"{section}.{name}.streaming", "be false in a study", data.streaming)
        for name in ("full", "stage"):
            _check_not_evaluated(f"{name}.", getattr(self, name))
        annealed = self.full.schedule != "constant"
        check_rule(annealed, "full.schedule", "fall to 0 (linear or cosine): arms start at its end", self.full.schedule)
        check_rule(self.mask.threshold is None, "mask.threshold", "be null: an arm has it", self.mask.threshold)
        for name in self.answers:
            check_one_of("answers", name, tuple(self.domains))
        if self.objective == REWARDS:
            self.answers = list(self.domains)
        else:
            unset = self.rewards == RewardsConfig()
            check_rule(unset, "rewards", "be left out unless objective is rewards", "keys of it")
            rule = "be left out unless objective is rewards"
            check_rule(not self.questions, "questions", rule, ", ".join(self.questions))
            for name, arm in self.arms.items():
                rule = "be left out unless objective is rewards: of a text's words a teacher reads the text"
                check_rule(arm.teacher_prompt is None, f"arms.{name}.teacher_prompt", rule, arm.teacher_prompt)
        kinds = [arm.kind for arm in self.arms.values()]
        check_rule(kinds.count(FULL) == 1, "arms", "hold exactly one of kind full", kinds.count(FULL))
        check_rule(kinds.count(BASE) <= 1, "arms", "hold at most one of kind base", kinds.count(BASE))
        for name, arm in self.arms.items():
            if arm.kind in DERIVED:
                may = {AVERAGE: TRAINED, INTERPOLATED: (FULL, *TRAINED)}.get(arm.kind, _WEIGHTS)
                self._check_named(f"arms.{name}.of", arm.of, (CONTROL,) if arm.lrs else may)
            if arm.start is not None:
                self._check_named(f"arms.{name}.start", arm.start, (BASE, *_MERGED, QUANTIZED))
            if arm.teacher is not None:
                self._check_named(f"arms.{name}.teacher", arm.teacher, (BASE, *_MERGED))
        for name in self.arms:
            seen = [name]
            while (before := self.arms[seen[-1]].start) is not None:
                check_rule(before not in seen, f"arms.{name}.start", "lead back to the full fine-tune", before)
                seen.append(before)
        for name, arm in self.arms.items():
            self._check_over_codes(name)
            if arm.teacher is not None:
                rule = "name an arm that needs nothing of this one"
                check_rule(name not in self._all_needs(name), f"arms.{name}.teacher", rule, arm.teacher)

    def _check_named(self, key: str, value: str | None, kinds: tuple[str, ...]) -> None:
        known = [name for name, config in self.arms.items() if config.kind in kinds]
        rule = f"name an arm of the kinds {', '.join(kinds)}: {', '.join(known)}{nearest(str(value), known)}"
        check_rule(value in known, key, rule, value)

    def _check_over_codes(self, name: str) -> None:
        arm, codes = self.arms[name], self.codes_under(name)
        if codes is None:
            return
        key, kind = f"arms.{name}.start", self.arms[codes].quantization
        rule = f"lead to no {QUANTIZED} arm, here {codes}, whose weights are {kind} already"
        check_rule(arm.kind != QUANTIZED, key, rule, arm.start)
        rule = (
            f"lead to no {QUANTIZED} arm for the kind {arm.kind}, here {codes}: weights in {kind} do not train; train "
            f"them exactly, and round them in an arm {{kind: {QUANTIZED}, start: {name}, quantization: {kind}}}"
        )
        check_rule(arm.kind not in (CONTROL, CONTINUED), key, rule, arm.start)

    def _all_needs(self, arm: str) -> set[str]:
        """What it needs, what that needs, and so on."""
        found, waiting = set[str](), self.needs(arm)
        while waiting:
            needed = waiting.pop()
            waiting += [] if needed in found else self.needs(needed)
            found.add(needed)
        return found

    def start_of(self, arm: str) -> str | None:
        """The arm at whose end this one begins; None: at the base model. A derived arm begins where its source did."""
        config = self.arms[arm]
        if config.kind in DERIVED:
            return self.start_of(str(config.of))
        start = None if config.kind in FULL_KINDS else config.start or self.named(FULL)
        return None if start is None or self._is_base(start) else start

    def codes_under(self, arm: str) -> str | None:
        """The quantized arm at whose end this one begins, or what it begins at does; None: it begins exact."""
        start = self.start_of(arm)
        return start if start is None or self.arms[start].kind == QUANTIZED else self.codes_under(start)

    def chooser(self, arm: str) -> str:
        """The arm by whose grid this one's setting is chosen: its own, but for an average."""
        config = self.arms[arm]
        return str(config.of) if config.kind == AVERAGE else arm

    def needs(self, arm: str) -> list[str]:
        """The arms whose chosen runs must be there before this one's begin."""
        config = self.arms[arm]
        teacher = None if config.teacher is None or self._is_base(config.teacher) else config.teacher
        return [name for name in (self.start_of(arm), config.of, teacher) if name is not None]

    def _is_base(self, arm: str) -> bool:
        """Of which there are no runs: the model is there."""
        return arm in self.arms and self.arms[arm].kind == BASE

    def general_of(self, domain: str) -> list[str]:
        """The texts by which forgetting is measured on a domain: all but the one of its own name."""
        return [name for name in self.general if name != domain]

    def named(self, kind: str) -> str | None:
        """The first arm of a kind."""
        return next((name for name, arm in self.arms.items() if arm.kind == kind), None)

    def mask_of(self, arm: ArmConfig) -> MaskConfig:
        """The study's mask with what the arm says of it; its keep ratio is a setting's."""
        names = ("layers_to_transform", "target_modules", "mode", "threshold", "sharpness", "deletion_penalty")
        said = {name: value for name in names if (value := getattr(arm, name)) is not None}
        if arm.layers_to_transform == []:
            said["layers_to_transform"] = None  # of MaskConfig, every layer
        return dataclasses.replace(self.mask, **said)

    def train_of(self, arm: ArmConfig, setting: Setting, seed: int) -> TrainConfig:
        """How a trained arm is trained in a setting; seed draws the order of the data."""
        train = self.full if arm.kind == FULL else self.stage
        assert setting.lr is not None  # of a trained arm
        betas = train.betas if arm.betas is None else arm.betas
        if setting.beta1 is not None:
            betas = (setting.beta1, betas[1])
        return dataclasses.replace(train, lr=setting.lr, epochs=setting.epochs, steps=None, betas=betas, seed=seed)

    def rewards_of(self, arm: ArmConfig, setting: Setting, seed: int, questions: int) -> RewardsConfig:
        """The same where the objective is rewards, of which there are so many questions."""
        assert setting.lr is not None  # of a trained arm
        betas = self.rewards.betas if arm.betas is None else arm.betas
        if setting.beta1 is not None:
            betas = (setting.beta1, betas[1])
        steps = max(1, math.ceil((setting.epochs or 1.0) * questions / self.rewards.questions))
        return dataclasses.replace(self.rewards, lr=setting.lr, steps=steps, betas=betas, seed=seed)


def _check_not_evaluated(section: str, train: TrainConfig) -> None:
    for key in ("eval_every", "eval_minutes"):
        value = getattr(train, key)
        check_rule(value is None, section + key, "be null in a study, whose own checkpoints validation chooses", value)
