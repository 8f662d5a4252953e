"""The declaration of a study: model, domains, seeds, and arms with the settings that each may choose from.

Its file is strict YAML (see configs/small.yaml). Errors name the key that is unknown or out of range.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from mft.checks import (
    POSITIVE,
    SEED,
    at_least,
    check_not_empty,
    check_one_of,
    check_rule,
    coerce_fields,
    expand_home,
    nearest,
    one_of,
)
from mft.config import DataConfig, MaskConfig, ModelConfig, TrainConfig
from mft.files.nested import CLASS_BY_VALUES
from mft.rewards.config import RewardsConfig
from mft_study.arms.arm import Arm
from mft_study.arms.full import Base, Full
from mft_study.arms.kinds import KINDS, class_of, name_of
from mft_study.arms.means import Average
from mft_study.arms.setting import Setting

# What the arms after the full fine-tune minimise: the loss, or (by rewards) the share of wrong answers.
OBJECTIVES = CROSS_ENTROPY, REWARDS = ("cross_entropy", "rewards")
# What a seed may draw besides the order of the data: the model from scratch, and the documents to train on.
VARIES = VARY_BASE, VARY_DATA = ("base", "data")
_NAME = re.compile(r"\w[\w .()+-]*")
LEAST_RATES = 3  # rates that a trained arm should try: the best of fewer cannot lie between two worse ones


@dataclass
class ScratchConfig:
    """A small Llama (with experts: a small Qwen3-MoE), trained from scratch on the standard library (from_scratch.py).

    With experts, intermediate_size is the size of each expert. The tokenizer is trained too.
    """

    vocab_size: Annotated[int, at_least(1)] = 2048
    hidden_size: Annotated[int, at_least(1)] = 128
    intermediate_size: Annotated[int, at_least(1)] = 352
    layers: Annotated[int, at_least(1)] = 4
    heads: Annotated[int, at_least(1)] = 4
    experts: Annotated[int, at_least(0)] = 0  # in each layer's MLP; 0: a dense MLP without experts
    experts_per_token: Annotated[int, at_least(1)] = 2
    data: DataConfig = field(
        default_factory=lambda: DataConfig(source="stdlib", subset="pretrain", sequence_length=256)
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig.of_weights(
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
class LeadersConfig:
    """Which arms run with more seeds, after validation has seen all arms with the study's seeds.

    Validation ranks the tuned arms that do not train the whole model, by their mean over seeds. The leaders are the
    first ``arms`` of this ranking, the best mask, and every arm that these need: start, source or teacher.
    """

    seeds: Annotated[int, at_least(2)] = 5  # in all, the study's own first; 5 can show a p of 0.001, 3 a p of 0.01
    arms: Annotated[int, at_least(1)] = 2  # the leader and its nearest rival
    # Arms are ranked once per limit, among those that store at most this many bytes; empty: once, among all arms.
    max_bytes: Annotated[list[int], at_least(1)] = field(default_factory=list)

    def __post_init__(self) -> None:
        coerce_fields(self)


@dataclass
class StudyConfig:
    """Everything that `mft compare` runs."""

    arms: dict[str, Arm] = field(metadata={CLASS_BY_VALUES: class_of})
    domains: dict[str, DataConfig]
    model: ModelConfig = field(default_factory=ModelConfig)
    scratch: ScratchConfig | None = None  # instead of model.name
    # Which layers the control, LoRA and every mask change
    mask: MaskConfig = field(default_factory=lambda: MaskConfig(keep_ratio=0.99))
    # lr and epochs come from the arms
    full: TrainConfig = field(default_factory=lambda: TrainConfig.of_weights(epochs=1.0))
    # For all trained arms after full
    stage: TrainConfig = field(default_factory=lambda: TrainConfig.of_weights(epochs=1.0))
    objective: Annotated[str, one_of(OBJECTIVES)] = CROSS_ENTROPY
    # Replaces stage if the objective is rewards; an epoch asks as many questions as the data has.
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    # By domain: data whose training rows are asked instead of the domain's own, which the fine-tune has seen.
    questions: dict[str, DataConfig] = field(default_factory=dict)
    seeds: Annotated[list[int], SEED] = field(default_factory=lambda: [0, 1, 2])
    # What a seed draws besides the order of the data: base (the model from scratch), data (the documents to train on).
    vary: Annotated[list[str], one_of(VARIES)] = field(default_factory=list)
    leaders: LeadersConfig | None = None  # arms that lead on validation run with more seeds; null: none does
    # Further settings that an arm may try, one at a time, while its best lies at an end of its grid (grid.py). One step
    # of epochs and the rates beside it are three.
    extensions: Annotated[int, at_least(0)] = 6
    max_epochs: Annotated[float, POSITIVE] = 32.0  # a grid of epochs grows up to this; it may declare more
    checkpoints: Annotated[int, at_least(1)] = 4  # per run after the fine-tune; validation chooses one
    answers: list[str] = field(default_factory=list)  # domains whose completions are generated and compared exactly
    # Text that no arm is trained on. It measures forgetting, by its loss and by the KL divergence from an arm's start.
    # A text with the name of a domain is not used for that domain, only for the others.
    general: dict[str, DataConfig] = field(default_factory=dict)
    workers: Annotated[int, at_least(1)] = 2  # processes of one thread each
    output_dir: str = "runs/compare"

    def __post_init__(self) -> None:
        coerce_fields(self)
        check_rule(bool(self.seeds), "seeds", "hold at least one int", self.seeds)
        check_rule(len(set(self.seeds)) == len(self.seeds), "seeds", "be different ints", self.seeds)
        if VARY_BASE in self.vary:
            rule = f"leave out {VARY_BASE} without scratch: a model that is loaded is the same for every seed"
            check_rule(self.scratch is not None, "vary", rule, self.vary)
        if VARY_DATA in self.vary:
            for name, data in self.domains.items():
                rule = f"say how much of the data each seed draws, because vary has {VARY_DATA}"
                check_rule(data.max_train_tokens is not None, f"domains.{name}.max_train_tokens", rule, None)
        if self.leaders is not None:
            rule = f"be more than the study's own {len(self.seeds)}"
            check_rule(self.leaders.seeds > len(self.seeds), "leaders.seeds", rule, self.leaders.seeds)
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
        for section in ("domains", "general", "questions"):  # arms read them for several epochs, in their own order
            for name, data in getattr(self, section).items():
                check_rule(not data.streaming, f"{section}.{name}.streaming", "be false in a study", data.streaming)
                for split, use in (("validation", "chooses"), ("test", "reports")):
                    share, rule = getattr(data, f"{split}_share"), f"be above 0 in a study, which {use} by {split} rows"
                    check_rule(share > 0 or section == "questions", f"{section}.{name}.{split}_share", rule, share)
        for name in ("full", "stage"):
            _check_not_evaluated(f"{name}.", getattr(self, name))
        annealed = self.full.schedule != "constant"
        check_rule(annealed, "full.schedule", "fall to 0 (linear or cosine): arms start at its end", self.full.schedule)
        for name in ("threshold", "budget"):
            value = getattr(self.mask, name)
            check_rule(value is None, f"mask.{name}", "be null: an arm has it", value)
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
                rule = "be left out unless objective is rewards: with other objectives a teacher reads the text itself"
                check_rule(arm.teacher_prompt is None, f"arms.{name}.teacher_prompt", rule, arm.teacher_prompt)
        self._check_arms()

    def _check_arms(self) -> None:
        """Check what each arm says about other arms."""
        for kind, least in ((Full, 1), (Base, 0)):
            count = sum(isinstance(arm, kind) for arm in self.arms.values())
            rule = f"hold {'exactly' if least else 'at most'} one of kind {name_of(kind)}"
            check_rule(least <= count <= 1, "arms", rule, count)
        for name, arm in self.arms.items():
            if arm.of is not None:
                self._check_named(f"arms.{name}.of", arm.of, arm.may_be_of)
            if arm.start is not None:
                self._check_named(f"arms.{name}.start", arm.start, lambda kind: kind.may_start)
            if arm.teacher is not None:
                self._check_named(f"arms.{name}.teacher", arm.teacher, lambda kind: kind.may_teach)
        for name in self.arms:
            seen = [name]
            while (before := self.arms[seen[-1]].start) is not None:
                check_rule(before not in seen, f"arms.{name}.start", "lead back to the full fine-tune", before)
                seen.append(before)
        for name, arm in self.arms.items():
            if arm.needs_codes:
                rule = "name an arm that begins at a quantized one"
                check_rule(self.codes_under(name) is not None, f"arms.{name}.of", rule, arm.of)
            if not arm.over_codes and (codes := self.codes_under(name)) is not None:
                rule = f"lead to no quantized arm{self._why_not_over(name, codes)}"
                check_rule(False, f"arms.{name}.start", rule, arm.start)
            if arm.teacher is not None:
                rule = "name an arm that does not need this one"
                check_rule(name not in self.all_needs(name), f"arms.{name}.teacher", rule, arm.teacher)

    def _check_named(self, key: str, value: str, may: Callable[[type[Arm]], bool]) -> None:
        known = [name for name, arm in self.arms.items() if may(type(arm))]
        kinds = ", ".join(kind for kind, cls in KINDS.items() if may(cls))
        rule = f"name an arm of the kinds {kinds}: {', '.join(known)}{nearest(value, known)}"
        check_rule(value in known, key, rule, value)

    def _why_not_over(self, name: str, codes: str) -> str:
        arm, held = self.arms[name], self.arms[codes].quantization
        if arm.quantization is not None:
            return f", here {codes}, whose weights are {held} already"
        return (
            f" for the kind {arm.kind}, here {codes}: weights in {held} do not train; train them exactly, and round "
            f"them in an arm {{kind: quantized, start: {name}, quantization: {held}}}"
        )

    def all_needs(self, arm: str) -> set[str]:
        """Return all arms that an arm needs, directly or through others."""
        found, waiting = set[str](), self.needs(arm)
        while waiting:
            needed = waiting.pop()
            waiting += [] if needed in found else self.needs(needed)
            found.add(needed)
        return found

    def start_of(self, arm: str) -> str | None:
        """Return the arm at whose end this one starts; None: at the base model. A derived arm starts as its source."""
        config = self.arms[arm]
        if config.of is not None:
            return self.start_of(config.of)
        start = (config.start or self.first_of_kind(Full)) if config.follows else None
        return None if start is None or self.is_base(start) else start

    def codes_under(self, arm: str) -> str | None:
        """Return the quantized arm that this one starts from, directly or through others; None: an exact start."""
        start = self.start_of(arm)
        return start if start is None or self.arms[start].quantization is not None else self.codes_under(start)

    def chooser(self, arm: str) -> str:
        """Return the arm whose grid chooses this one's setting: the source of an average, else the arm itself."""
        config = self.arms[arm]
        return str(config.of) if isinstance(config, Average) else arm

    def seeds_of(self, arm: str) -> list[int]:
        """Return the seeds that an arm runs with unless it leads; an arm that is one model for all seeds runs once."""
        return self.seeds[:1] if self.is_one_model(arm) else self.seeds

    @property
    def further_seeds(self) -> list[int]:
        """The seeds that only leaders run with: the first whole numbers that are not seeds of the study."""
        more = 0 if self.leaders is None else self.leaders.seeds - len(self.seeds)
        return list(itertools.islice((seed for seed in itertools.count() if seed not in self.seeds), more))

    @property
    def all_seeds(self) -> list[int]:
        """All seeds that any arm may run with."""
        return [*self.seeds, *self.further_seeds]

    def needs(self, arm: str) -> list[str]:
        """Return the arms whose chosen runs must exist before this arm's runs begin."""
        config = self.arms[arm]
        teacher = None if config.teacher is None or self.is_base(config.teacher) else config.teacher
        return [name for name in (self.start_of(arm), config.of, teacher) if name is not None]

    def is_base(self, arm: str) -> bool:
        """Return whether an arm is the base model, which exists without any run."""
        return isinstance(self.arms.get(arm), Base)

    def is_one_model(self, arm: str) -> bool:
        """Return whether an arm is one model for all seeds: the base, unless each seed has its own."""
        return self.is_base(arm) and VARY_BASE not in self.vary

    def general_of(self, domain: str) -> list[str]:
        """Return the texts that measure forgetting on a domain: all but the one with the domain's own name."""
        return [name for name in self.general if name != domain]

    def first_of_kind(self, kind: type[Arm]) -> str | None:
        """Return the name of the first arm of a kind, or None."""
        return next((name for name, arm in self.arms.items() if isinstance(arm, kind)), None)

    def train_of(self, arm: Arm, setting: Setting, seed: int) -> TrainConfig:
        """Return how an arm is trained in a setting. seed draws the order of the data."""
        train = self.stage if arm.follows else self.full
        own = _own_optimiser(arm, setting, train.betas)
        return dataclasses.replace(train, epochs=setting.epochs, steps=None, seed=seed, **own)

    def rewards_of(self, arm: Arm, setting: Setting, seed: int, questions: int) -> RewardsConfig:
        """Return the same for the objective rewards. questions: the number of training questions."""
        own = _own_optimiser(arm, setting, self.rewards.betas)
        steps = max(1, math.ceil((setting.epochs or 1.0) * questions / self.rewards.questions))
        return dataclasses.replace(self.rewards, steps=steps, seed=seed, **own)


def _own_optimiser(arm: Arm, setting: Setting, betas: tuple[float, float]) -> dict[str, Any]:
    """Return an arm's own options of AdamW in a setting. betas: those of an arm without its own."""
    assert setting.lr is not None  # trained arms have a rate
    beta1, beta2 = betas if arm.betas is None else arm.betas
    momentum = beta1 if setting.beta1 is None else setting.beta1
    return {"lr": setting.lr, "betas": (momentum, beta2), **arm.optimiser()}


def _check_not_evaluated(section: str, train: TrainConfig) -> None:
    rule = "be null in a study, because validation chooses between the study's own checkpoints"
    for key in ("eval_every", "eval_minutes"):
        check_rule(getattr(train, key) is None, section + key, rule, getattr(train, key))
