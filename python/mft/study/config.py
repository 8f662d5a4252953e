"""What a study declares before it runs: model, domains, arms with the settings that each may choose from, seeds.

A file of it is strict YAML (see configs/compare/small.yaml); whatever is unknown or out of range names its key.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

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
from mft.study.arms.arm import Arm
from mft.study.arms.full import Base, Full
from mft.study.arms.kinds import KINDS, class_of, name_of
from mft.study.arms.means import Average
from mft.study.arms.setting import Setting

# What the arms after the full fine-tune make smaller: the loss, or the share of wrong answers, by rewards.
OBJECTIVES = CROSS_ENTROPY, REWARDS = ("cross_entropy", "rewards")
# What a seed draws besides the order of the data: the model from scratch, and which documents are trained on.
VARIES = VARY_BASE, VARY_DATA = ("base", "data")
_NAME = re.compile(r"\w[\w .()+-]*")
LEAST_RATES = 3  # of which a trained arm may choose: the best of fewer cannot lie between two that are worse


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
class LeadersConfig:
    """The arms that run with more seeds, once validation has seen all arms with the study's seeds.

    Validation ranks the tuned arms that train no whole model, by their mean over seeds. Those that lead are its first
    ``arms`` and the best mask, and what they begin at or are made of.
    """

    seeds: Annotated[int, at_least(2)] = 5  # in all, those of the study first; 5 tell a p of 0.001, 3 one of 0.01
    arms: Annotated[int, at_least(1)] = 2  # the leader and its nearest rival
    # Arms are ranked once for each of these limits, among those that store at most so many bytes; none: once, all.
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
    mask: MaskConfig = field(default_factory=MaskConfig)  # which layers, for control, LoRA and every mask
    full: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))  # lr and epochs come from the arms
    stage: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1.0))  # of all trained arms after it
    objective: Annotated[str, one_of(OBJECTIVES)] = CROSS_ENTROPY
    # In place of stage where the objective is rewards; an epoch asks as many questions as there are.
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    # By domain: the data whose training rows are asked instead of the domain's own, on which it was fine-tuned.
    questions: dict[str, DataConfig] = field(default_factory=dict)
    seeds: Annotated[list[int], SEED] = field(default_factory=lambda: [0, 1, 2])
    vary: Annotated[list[str], one_of(VARIES)] = field(default_factory=list)  # with the seed, see VARIES
    leaders: LeadersConfig | None = None  # what is ahead on validation runs with more seeds; null: nothing does
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
        if VARY_BASE in self.vary:
            rule = f"leave out {VARY_BASE} without scratch: a model that is loaded is the same for every seed"
            check_rule(self.scratch is not None, "vary", rule, self.vary)
        if VARY_DATA in self.vary:
            for name, data in self.domains.items():
                rule = f"say how much of the data a seed draws, as vary has {VARY_DATA}"
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
        for section in ("domains", "general", "questions"):  # arms take epochs of them, in orders of their own
            for name, data in getattr(self, section).items():
                check_rule(not data.streaming, f"{section}.{name}.streaming", "be false in a study", data.streaming)
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
                rule = "be left out unless objective is rewards: of a text's words a teacher reads the text"
                check_rule(arm.teacher_prompt is None, f"arms.{name}.teacher_prompt", rule, arm.teacher_prompt)
        self._check_arms()

    def _check_arms(self) -> None:
        """What each says of the others."""
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
                rule = "name an arm that needs nothing of this one"
                check_rule(name not in self._all_needs(name), f"arms.{name}.teacher", rule, arm.teacher)

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

    def _all_needs(self, arm: str) -> set[str]:
        """What it needs, what that needs, and so on."""
        found, waiting = set[str](), self.needs(arm)
        while waiting:
            needed = waiting.pop()
            waiting += [] if needed in found else self.needs(needed)
            found.add(needed)
        return found

    def start_of(self, arm: str) -> str | None:
        """The arm at whose end this one begins; None: at the base model. An arm of another begins where that did."""
        config = self.arms[arm]
        if config.of is not None:
            return self.start_of(config.of)
        start = (config.start or self.named(Full)) if config.follows else None
        return None if start is None or self.is_base(start) else start

    def codes_under(self, arm: str) -> str | None:
        """The quantized arm at whose end this one begins, or what it begins at does; None: it begins exact."""
        start = self.start_of(arm)
        return start if start is None or self.arms[start].quantization is not None else self.codes_under(start)

    def chooser(self, arm: str) -> str:
        """The arm by whose grid this one's setting is chosen: its own, but for an average."""
        config = self.arms[arm]
        return str(config.of) if isinstance(config, Average) else arm

    def seeds_of(self, arm: str) -> list[int]:
        """Those that an arm runs with, before any leads; what is one model runs once."""
        return self.seeds[:1] if self.is_one_model(arm) else self.seeds

    @property
    def further_seeds(self) -> list[int]:
        """Those of the leaders alone: the first whole numbers that are no seeds of the study."""
        more = 0 if self.leaders is None else self.leaders.seeds - len(self.seeds)
        return list(itertools.islice((seed for seed in itertools.count() if seed not in self.seeds), more))

    @property
    def all_seeds(self) -> list[int]:
        """Those that any arm may run with."""
        return [*self.seeds, *self.further_seeds]

    def needs(self, arm: str) -> list[str]:
        """The arms whose chosen runs must be there before this one's begin."""
        config = self.arms[arm]
        teacher = None if config.teacher is None or self.is_base(config.teacher) else config.teacher
        return [name for name in (self.start_of(arm), config.of, teacher) if name is not None]

    def is_base(self, arm: str) -> bool:
        """Of which there are no runs: the model is there."""
        return isinstance(self.arms.get(arm), Base)

    def is_one_model(self, arm: str) -> bool:
        """Whether an arm is the same model whatever the seed: the base, unless each seed has its own."""
        return self.is_base(arm) and VARY_BASE not in self.vary

    def general_of(self, domain: str) -> list[str]:
        """The texts by which forgetting is measured on a domain: all but the one of its own name."""
        return [name for name in self.general if name != domain]

    def named(self, kind: type[Arm]) -> str | None:
        """The first arm of a kind."""
        return next((name for name, arm in self.arms.items() if isinstance(arm, kind)), None)

    def mask_of(self, arm: Arm) -> MaskConfig:
        """The study's mask with what the arm says of it; its keep ratio is a setting's."""
        return arm.mask_config(self.mask)

    def train_of(self, arm: Arm, setting: Setting, seed: int) -> TrainConfig:
        """How a trained arm is trained in a setting; seed draws the order of the data."""
        train = self.stage if arm.follows else self.full
        assert setting.lr is not None  # of a trained arm
        betas = train.betas if arm.betas is None else arm.betas
        if setting.beta1 is not None:
            betas = (setting.beta1, betas[1])
        return dataclasses.replace(train, lr=setting.lr, epochs=setting.epochs, steps=None, betas=betas, seed=seed)

    def rewards_of(self, arm: Arm, setting: Setting, seed: int, questions: int) -> RewardsConfig:
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
