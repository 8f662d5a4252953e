"""What a study measures: one model on one split, one run of one arm, and all of it together."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mft.evaluation.evaluate import Evaluation
from mft_study.arms.setting import Setting
from mft_study.config import StudyConfig
from mft_study.evidence.host import Host
from mft_study.grid import OpenEnd

_SUMS = ("tokens", "loss_sums", "correct")  # fields of an Evaluation, one value per document


@dataclass(frozen=True)
class Unit:
    """One run: an arm in a setting, on a domain, from a seed. part numbers an average's further runs; else it is 0."""

    domain: str
    arm: str
    seed: int
    setting: Setting
    part: int = 0

    def __str__(self) -> str:
        parts = [
            self.domain,
            self.arm,
            str(self.setting),
            f"seed {self.seed}",
            f"part {self.part}" if self.part else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass
class Measured:
    """One model on one split of one domain."""

    evaluation: Evaluation  # sums per document
    tempered: Evaluation | None = None  # the same at the temperature that is best on validation
    temperature: float | None = None
    answers: Tensor | None = None  # (documents,) examples per document whose generated answer is exact
    questions: Tensor | None = None  # (documents,) examples per document

    @property
    def exact(self) -> float | None:
        """Share of questions answered exactly; None if none was asked."""
        if self.answers is None or self.questions is None or not self.questions.sum():
            return None
        return (self.answers.sum() / self.questions.sum()).item()

    @property
    def choice(self) -> float:
        """What validation minimises: the loss; if questions were asked, the wrong answers first, then the loss."""
        loss = self.evaluation.loss
        if self.answers is None or self.questions is None:
            return loss
        return (self.questions.sum() - self.answers.sum()).item() + loss / (1 + loss)  # the latter is below 1


@dataclass
class General:
    """One model on text that it was not trained on."""

    evaluation: Evaluation
    kl: Tensor | None = None  # (documents,) sums over tokens of KL(start || model), nats; only on test

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence from the model at which the arm started, in nats per token."""
        assert self.kl is not None, "which is measured on test"
        return (self.kl.sum() / self.evaluation.tokens.sum()).item()


@dataclass
class Outcome:
    """A finished run, as validation saw it. diverged says why there is nothing to measure."""

    unit: Unit
    measured: Measured | None
    curve: list[tuple[float, float]] = field(default_factory=list)  # (share of the run done, validation loss)
    best_share: float = 1.0  # share of the run done at the chosen checkpoint
    # For a run by rewards: (share of the run done, share of validation's questions answered exactly).
    answers_curve: list[tuple[float, float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # for a run by rewards: of each step
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flips: float | None = None  # for masks: share of the bits that differ from the initial ones
    bytes: int | None = None  # what must be stored besides the start (see arms/size.py)
    resident: int | None = None  # bytes in memory besides the start while the model runs
    memory: int | None = None  # bytes while it trained, without activations (see arms/size.py)
    general: dict[str, "General"] = field(default_factory=dict)  # on validation, by the name of the text
    diverged: str | None = None
    fails: bool = False  # at every rate: the method cannot be run, loaded again or merged; diverged says why
    where: Host | None = None  # where it ran; None in older files

    @property
    def loss(self) -> float:
        """Validation loss; infinite if training diverged."""
        return float("inf") if self.measured is None else self.measured.evaluation.loss

    @property
    def choice(self) -> float:
        """What validation minimises (see Measured.choice); infinite if training diverged."""
        return float("inf") if self.measured is None else self.measured.choice


@dataclass
class Tested:
    """What test found for a chosen unit's model."""

    unit: Unit
    validation: Measured
    test: Measured
    general: dict[str, General] = field(default_factory=dict)  # on the text's test split, by its name
    where: Host | None = None  # where it was evaluated; None in older files


@dataclass
class Findings:
    """All that a report needs. The inner keys of chosen, validation and test: domain, arm (and seed)."""

    study: StudyConfig
    outcomes: list[Outcome]  # every run that was tried, of every arm and seed
    chosen: dict[str, dict[str, Setting]]
    validation: dict[str, dict[str, dict[int, Measured]]]
    test: dict[str, dict[str, dict[int, Measured]]]
    notes: list[str] = field(default_factory=list)
    general: dict[str, dict[str, dict[int, dict[str, General]]]] = field(default_factory=dict)  # last key: the text
    open_ends: list[OpenEnd] = field(default_factory=list)  # choices that lie at an end of their grid
    # By (domain, split, text), where text is the domain or a general text: each document's hash (evidence/sums.py).
    documents: dict[tuple[str, str, str], dict[int, int]] = field(default_factory=dict)
    reserve_openings: list[str] = field(default_factory=list)  # studies that opened the reserve, if it is the test
    test_openings: int = 1  # how many different sets of models test has seen, this one included
    without_result: dict[str, dict[str, str]] = field(default_factory=dict)  # by domain and arm: the reason
    tested: list[Tested] = field(default_factory=list)  # what validation, test and general are made from

    def rates(self, domain: str, arm: str) -> int | None:
        """Return how many rates the first seed tried for an arm, or for its source; None: it has no rate."""
        source, first = self.study.arms[arm].of or arm, self.study.seeds[0]
        tried = {
            outcome.unit.setting.lr
            for outcome in self.outcomes
            if (outcome.unit.domain, outcome.unit.arm, outcome.unit.seed) == (domain, source, first)
        }
        return len(tried - {None}) or None


# In JSON, a float's shortest decimal form restores its bits, so what is read equals what was written.


def unit_from(values: dict[str, Any]) -> Unit:
    return Unit(**values | {"setting": Setting(**values["setting"])})


def measured_values(measured: Measured) -> dict[str, Any]:
    return {
        "evaluation": _evaluation_values(measured.evaluation),
        "tempered": _make_if_known(_evaluation_values, measured.tempered),
        "temperature": measured.temperature,
        "answers": _make_if_known(Tensor.tolist, measured.answers),
        "questions": _make_if_known(Tensor.tolist, measured.questions),
    }


def measured_from(values: dict[str, Any]) -> Measured:
    return Measured(
        _evaluation_from(values["evaluation"]),
        _make_if_known(_evaluation_from, values["tempered"]),
        values["temperature"],
        _make_if_known(torch.tensor, values["answers"]),
        _make_if_known(torch.tensor, values["questions"]),
    )


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    measured = _make_if_known(measured_values, outcome.measured)
    changed = {"unit": asdict(outcome.unit), "measured": measured, "general": _general_values(outcome.general)}
    return vars(outcome) | changed | {"where": _make_if_known(asdict, outcome.where)}


def outcome_from(values: dict[str, Any]) -> Outcome:
    changed = {
        "measured": _make_if_known(measured_from, values["measured"]),
        "unit": unit_from(values["unit"]),
        "curve": [(share, loss) for share, loss in values["curve"]],
        "answers_curve": [(share, exact) for share, exact in values.get("answers_curve", ())],
        "general": _general_from(values["general"]),
        "where": _host_from(values),
    }
    return Outcome(**values | changed)


def tested_values(tested: Tested) -> dict[str, Any]:
    splits = {"validation": measured_values(tested.validation), "test": measured_values(tested.test)}
    values = {"unit": asdict(tested.unit), "general": _general_values(tested.general)} | splits
    return values | {"where": _make_if_known(asdict, tested.where)}


def tested_from(values: dict[str, Any]) -> Tested:
    validation, test = (measured_from(values[split]) for split in ("validation", "test"))
    return Tested(unit_from(values["unit"]), validation, test, _general_from(values["general"]), _host_from(values))


def _make_if_known(make: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else make(value)


def _host_from(values: dict[str, Any]) -> Host | None:
    return _make_if_known(lambda where: Host(**where), values.get("where"))


def _general_values(general: dict[str, General]) -> dict[str, Any]:
    return {
        name: {"evaluation": _evaluation_values(one.evaluation), "kl": _make_if_known(Tensor.tolist, one.kl)}
        for name, one in general.items()
    }


def _general_from(values: dict[str, Any]) -> dict[str, General]:
    double = functools.partial(torch.tensor, dtype=torch.float64)
    return {
        name: General(_evaluation_from(one["evaluation"]), _make_if_known(double, one["kl"]))
        for name, one in values.items()
    }


def _evaluation_values(evaluation: Evaluation) -> dict[str, list]:
    """Return the values without an objective's own figures: studies evaluate cross entropy only."""
    return {name: getattr(evaluation, name).tolist() for name in ("documents", *_SUMS)}


def _evaluation_from(values: dict[str, list]) -> Evaluation:
    tokens, loss_sums, correct = (torch.tensor(values[name], dtype=torch.float64) for name in _SUMS)
    return Evaluation(torch.tensor(values["documents"]), tokens, loss_sums, correct)
