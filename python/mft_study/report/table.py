"""All numbers of a report: a row per arm, a table per domain, and the same as values for JSON."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mft.files.json_file import finite
from mft_study.arms.full import Base, Control, Full
from mft_study.arms.means import Average, Between
from mft_study.arms.setting import Setting
from mft_study.config import REWARDS, StudyConfig
from mft_study.outcome import Findings, Measured
from mft_study.report.dominance import Comparison, comparisons, is_mft
from mft_study.report.equal_budgets import EqualBudget, equal_budgets
from mft_study.report.general import OnText, general_tables, start_of, validation_difference
from mft_study.report.statistics import (
    METRICS,
    Difference,
    Paired,
    adjust_holm,
    deciding_metric,
    differences,
    mean,
    paired,
)

Runs = Mapping[int, Measured]
FULL, CONTROL = "full", "control"  # what a difference is taken from: the full fine-tune, or Row.against


@dataclass
class Row:
    """An arm on the test split; means over seeds, differences paired.

    against: see reference_of. start: the arm at which it started, or None. of, teacher: made of, and taught by.
    """

    arm: str
    kind: str
    masked: bool  # MFT, or made of its runs
    setting: Setting | None
    against: str | None
    start: str | None
    of: str | None
    teacher: str | None
    loss: float
    accuracy: float
    exact: float | None  # share of questions answered exactly
    temperature: float | None
    minus_full: Difference | None = None  # loss
    minus_control: dict[str, Difference] = field(default_factory=dict)  # by metric
    decides: str = "loss"  # the metric that verdicts are about
    validation: float | None = None  # mean difference from against on validation, in that metric
    validation_exact: float | None = None  # share of exact answers on validation, if arms learned by rewards
    tried: int = 0  # configurations
    rates: int | None = None  # how many rates it, or the arm that it is made of, tried; None: it has no rate
    steps: float | None = None  # of a chosen run, mean over seeds; for an average, of one of its runs
    seconds: float | None = None  # of a chosen run, mean over seeds; for an average, of all its runs
    seconds_tried: float = 0.0  # of all runs
    flips: float | None = None
    memory: float | None = None  # bytes in training, without activations
    recovered: float | None = None  # share of the cost of rounding its start that it took back (see recovered_share)
    bytes: float | None = None  # bytes to store besides the start, mean over seeds
    resident: float | None = None  # bytes in memory besides the start while the model runs, mean over seeds
    general: dict[str, OnText] = field(default_factory=dict)  # by text
    seeds: int = 0  # of its runs on test; more than the table's if it led on validation
    unsettled: list[str] = field(default_factory=list)  # choices at an end of their grid, of the arm or of its start


@dataclass
class DomainTable:
    """What one domain's test split says."""

    full: str
    control: str | None
    seeds: int
    documents: int
    tokens: int
    questions: int
    rows: list[Row]
    general: list[str] = field(default_factory=list)  # texts that measure forgetting
    comparisons: list[Comparison] = field(default_factory=list)  # of MFT arms with rivals, text by text
    equal_budgets: list[EqualBudget] = field(default_factory=list)
    without_result: dict[str, str] = field(default_factory=dict)  # by arm, why it has no row

    def row(self, arm: str | None) -> Row | None:
        return next((row for row in self.rows if row.arm == arm), None)

    @property
    def leaders(self) -> list[Row]:
        """The rows of arms that ran with more seeds than the others, because they led on validation."""
        return [row for row in self.rows if row.seeds > self.seeds]


def study_tables(findings: Findings) -> dict[str, DomainTable]:
    """Return the tables by domain. Holm's correction runs once over MFT's differences, once over the others'."""
    tables: dict[str, DomainTable] = {}
    keys: list[tuple[str, str, str, str]] = []  # domain, arm, FULL or CONTROL, metric
    pairs: list[Paired] = []
    for domain in findings.test:
        tables[domain] = table = _table(findings, domain)
        table.equal_budgets = equal_budgets(findings, domain, {row.arm: row.against for row in table.rows})
        for key, pair in _pairs(findings, domain, table).items():
            keys.append((domain, *key))
            pairs.append(pair)
    found, decides = dict(zip(keys, differences(pairs))), deciding_metric(findings.study)
    for family in (True, False):
        claims = [key for key in keys if key[2:] == (CONTROL, decides) and _row(tables, key).masked == family]
        found.update(zip(claims, adjust_holm([found[key] for key in claims])))
    for place, difference in found.items():
        row, (*_, reference, metric) = _row(tables, place), place
        if reference == FULL:
            row.minus_full = difference
        else:
            row.minus_control[metric] = difference
    general, compared = general_tables(findings), comparisons(findings)
    for domain, table in tables.items():
        table.general, table.comparisons = findings.study.general_of(domain), compared[domain]
        for row in table.rows:
            row.general = general.get(domain, {}).get(row.arm, {})
    return tables


def reference_of(study: StudyConfig, arm: str) -> str | None:
    """Return the arm that ``arm`` is compared with: the control of the same layers, if there is one.

    For an average or an interpolated arm it is the same made of the control. Over codes it is a control of the same
    exact start that was rounded after its training.
    """
    config, codes = study.arms[arm], study.codes_under(arm)
    between = isinstance(config, Between)
    own = study.arms[str(config.of)] if between else config
    layers = own.layers_to_transform, own.target_modules
    start = study.start_of(arm if codes is None else codes)
    controls = [
        name
        for name, c in study.arms.items()
        if isinstance(c, Control) and (c.layers_to_transform, c.target_modules) == layers
    ]
    alike = [name for name in controls if study.start_of(name) == start]
    if codes is not None:
        quantization = study.arms[codes].quantization
        found = (name for name, c in study.arms.items() if c.quantization == quantization and c.start in alike)
        return None if isinstance(config, Average) else next(found, None)
    control = next(iter(alike or controls), None)
    if between:
        made = (type(config), control, config.runs)
        control = next((name for name, c in study.arms.items() if (type(c), c.of, c.runs) == made), None)
    return None if control == arm else control


def recovered_share(study: StudyConfig, losses: Mapping[str, float], arm: str) -> float | None:
    """Return (rounded - arm) / (rounded - exact): the share of the cost of rounding that an arm over codes took back.

    These are losses: of the arm's start in codes, of the arm, and of the exact model. None if rounding cost nothing.
    """
    rounded = study.codes_under(arm)
    if rounded is None:
        return None
    before = exact_start(study, rounded)
    if before not in losses or rounded not in losses or losses[rounded] <= losses[before]:
        return None
    return (losses[rounded] - losses[arm]) / (losses[rounded] - losses[before])


def exact_start(study: StudyConfig, rounded: str) -> str:
    """Return the arm whose end a quantized arm rounded."""
    return study.start_of(rounded) or str(study.first_of_kind(Base))


def study_numbers(findings: Findings, tables: Mapping[str, DomainTable] | None = None) -> dict[str, Any]:
    """Return what table.json holds and the plots draw; NaN and infinity become None."""
    tables = study_tables(findings) if tables is None else tables
    domains = {}
    for domain, table in tables.items():
        domains[domain] = dataclasses.asdict(table)
        domains[domain]["trials"] = [
            dataclasses.asdict(outcome.unit.setting)
            | {"arm": outcome.unit.arm, "seed": outcome.unit.seed, "part": outcome.unit.part}
            | {"validation_loss": outcome.loss, "seconds": outcome.seconds, "diverged": outcome.diverged}
            | {"general": {text: found.evaluation.loss for text, found in outcome.general.items()}}
            for outcome in findings.outcomes
            if outcome.unit.domain == domain
        ]
    numbers = {"domains": domains, "seeds": findings.study.seeds, "test_openings": findings.test_openings}
    return finite(numbers | {"open_ends": [dataclasses.asdict(end) for end in findings.open_ends]})


def _table(findings: Findings, domain: str) -> DomainTable:
    study, test = findings.study, findings.test[domain]
    full, control = str(study.first_of_kind(Full)), study.first_of_kind(Control)
    rows = [_means(findings, domain, arm) for arm in study.arms if test.get(arm)]
    losses = {row.arm: row.loss for row in rows}
    for row in rows:
        row.recovered = recovered_share(study, losses, row.arm)
    one = next(iter(test[full].values()))
    questions = 0 if one.questions is None else int(one.questions.sum())
    tokens = int(one.evaluation.tokens.sum())
    present = control if control in test else None
    documents, without = len(one.evaluation.documents), findings.without_result.get(domain, {})
    seeds = len(test[full].keys() & set(study.seeds))
    return DomainTable(full, present, seeds, documents, tokens, questions, rows, without_result=without)


def _means(findings: Findings, domain: str, arm: str) -> Row:
    """Return an arm's row, still without its differences on test."""
    study, runs = findings.study, list(findings.test[domain][arm].values())
    setting, against = findings.chosen.get(domain, {}).get(arm), reference_of(study, arm)
    outcomes = [o for o in findings.outcomes if (o.unit.domain, o.unit.arm) == (domain, arm)]
    # An average tried no settings: its setting was chosen for the arm that it averages.
    own = [o.unit.setting for o in outcomes if not isinstance(study.arms[arm], Average)]
    source = study.arms[arm].of or arm
    chosen = [
        o
        for o in findings.outcomes
        if (o.unit.domain, o.unit.arm, o.unit.setting, o.unit.part) == (domain, source, setting, 0)
    ]
    seconds = _mean(o.seconds for o in chosen)
    if isinstance(study.arms[arm], Average):
        seconds = _seconds_of_parts(findings, domain, arm, len(runs))
    # What validation answered counts only if arms learned by rewards.
    answered = findings.validation.get(domain, {}).get(arm, {}) if study.objective == REWARDS else {}
    first = [o for o in outcomes if (o.unit.setting, o.unit.part) == (setting, 0)]
    return Row(
        arm=arm,
        kind=study.arms[arm].kind,
        masked=is_mft(study, arm),
        setting=setting,
        against=against,
        start=start_of(study, arm),
        of=study.arms[arm].of,
        teacher=study.arms[arm].teacher,
        loss=mean(run.evaluation.loss for run in runs),
        accuracy=mean(run.evaluation.accuracy for run in runs),
        exact=_mean(run.exact for run in runs),
        temperature=_mean(run.temperature for run in runs),
        decides=deciding_metric(study),
        validation=validation_difference(findings, domain, arm, against),
        validation_exact=_mean(run.exact for run in answered.values()),
        tried=len(set(own)),
        rates=findings.rates(domain, arm),
        steps=_mean(o.steps for o in chosen),
        seconds=seconds,
        seconds_tried=sum(o.seconds for o in outcomes),
        flips=_mean(o.flips for o in chosen),
        memory=_mean(o.memory for o in chosen),
        bytes=_mean(o.bytes for o in first),
        resident=_mean(o.resident for o in first),
        seeds=len(runs),
        unsettled=_unsettled(findings, domain, arm),
    )


def _unsettled(findings: Findings, domain: str, arm: str) -> list[str]:
    """Return the open ends of an arm and of all arms that it needs."""
    rests = {arm} | findings.study.all_needs(arm)
    ends = [end for end in findings.open_ends if end.domain == domain and end.arm in rests]
    return [f"{end.arm}'s {end.what}" for end in ends]


def _pairs(findings: Findings, domain: str, table: DomainTable) -> dict[tuple[str, str, str], Paired]:
    """Return what can be compared, by (arm, FULL or CONTROL, metric)."""
    test, found = findings.test[domain], dict[tuple[str, str, str], Paired | None]()
    for row in table.rows:
        runs = test[row.arm]
        if findings.study.is_one_model(row.arm) and len(runs) == 1:
            runs = dict.fromkeys(test[table.full], next(iter(runs.values())))
        if row.arm != table.full:
            found[row.arm, FULL, "loss"] = paired(runs, test[table.full])
        if row.against in test:
            for metric in dict.fromkeys((*METRICS, row.decides)):
                found[row.arm, CONTROL, metric] = paired(runs, test[row.against], metric)
    return {key: pair for key, pair in found.items() if pair is not None}


def _seconds_of_parts(findings: Findings, domain: str, average: str, seeds: int) -> float:
    """Return the seconds of all runs of an average (its own and its source arm's), mean over seeds."""
    of, setting = findings.study.arms[average].of, findings.chosen.get(domain, {}).get(average)
    units = [(o.unit.domain, o.unit.setting, o.unit.arm, o.seconds) for o in findings.outcomes]
    return sum(seconds for *where, arm, seconds in units if where == [domain, setting] and arm in (of, average)) / seeds


def _row(tables: Mapping[str, DomainTable], key: tuple[str, str, str, str]) -> Row:
    return next(row for row in tables[key[0]].rows if row.arm == key[1])


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; None if there are none."""
    known = [float(value) for value in values if value is not None]
    return mean(known) if known else None
