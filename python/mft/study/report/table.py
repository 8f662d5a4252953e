"""All numbers of a report: a row an arm, a table a domain; and the same for JSON."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mft.evaluation.evaluate import Evaluation
from mft.study.arms.full import Base, Control, Full
from mft.study.arms.means import Average, Between
from mft.study.arms.setting import Setting
from mft.study.config import REWARDS, StudyConfig
from mft.study.outcome import Findings, Measured
from mft.study.report.dominance import Comparison, comparisons, is_mft
from mft.study.report.equal_budgets import EqualBudget, equal_budgets
from mft.study.report.general import OnText, general_tables, start_of
from mft.study.report.statistics import (
    METRICS,
    Difference,
    Paired,
    deciding_metric,
    differences,
    paired,
    with_holm,
)

Runs = Mapping[int, Measured]
FULL, CONTROL = "full", "control"  # what a difference is from: the full fine-tune, or what the arm is held against


@dataclass
class Row:
    """An arm on the test split; means over seeds, differences paired.

    against: the arm that it is held against: the control, or for an average of runs the control's average of as many,
        or for an interpolated arm the control's; over codes the control that was rounded to such codes after its
        training.
    start, of, teacher: the arms where it began (None: where no arm has that model), that it was made of, and by whose
        words it was taught.
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
    decides: str = "loss"  # the metric that verdicts are of
    validation: float | None = None  # mean difference from against, of what decides
    validation_exact: float | None = None  # share of validation's questions, where it chose by them
    tried: int = 0  # configurations
    rates: int | None = None  # how many of these it, or the arm that it is made of, tried; None: it learns at none
    steps: float | None = None  # of a chosen run, mean over seeds; of one run of an average
    seconds: float | None = None  # of a chosen run (of all runs that are averaged), mean over seeds
    seconds_tried: float = 0.0  # of all runs
    flips: float | None = None
    memory: float | None = None  # bytes in training, without activations
    recovered: float | None = None  # of what rounding its start cost, the share that it took back (see recovered_share)
    bytes: float | None = None  # of what must be stored beside the start, mean over seeds
    resident: float | None = None  # of what must be in memory beside it where the model runs, mean over seeds
    general: dict[str, OnText] = field(default_factory=dict)  # by text
    seeds: int = 0  # of its runs on test; more than the table's of what led on validation
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
    general: list[str] = field(default_factory=list)  # texts by which forgetting is measured
    comparisons: list[Comparison] = field(default_factory=list)  # of MFT arms with rivals, a text after the other
    equal_budgets: list[EqualBudget] = field(default_factory=list)
    without_result: dict[str, str] = field(default_factory=dict)  # by arm, why it has no row

    def row(self, arm: str | None) -> Row | None:
        return next((row for row in self.rows if row.arm == arm), None)

    @property
    def leaders(self) -> list[Row]:
        """Those that ran with more seeds than the others, as they led on validation."""
        return [row for row in self.rows if row.seeds > self.seeds]


def study_tables(findings: Findings) -> dict[str, DomainTable]:
    """By domain. Holm's correction runs over all domains: once over MFT's differences from the control, once over the
    other arms', which decide nothing."""
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
        found.update(zip(claims, with_holm([found[key] for key in claims])))
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
    """The arm that ``arm`` is held against, the control of the same layers; None for the control itself, and where
    there is none. Over codes it is such a control, rounded after its training, of the same exact start."""
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
    """(rounded - arm) / (rounded - exact), losses of an arm over codes, of its start and of what was rounded to it.

    Above 1 where it became better than the exact model. None for other arms, and where rounding cost nothing.
    """
    rounded = study.codes_under(arm)
    if rounded is None:
        return None
    before = exact_start(study, rounded)
    if before not in losses or rounded not in losses or losses[rounded] <= losses[before]:
        return None
    return (losses[rounded] - losses[arm]) / (losses[rounded] - losses[before])


def exact_start(study: StudyConfig, rounded: str) -> str:
    """The arm whose end a quantized arm rounded."""
    return study.start_of(rounded) or str(study.named(Base))


def study_numbers(findings: Findings, tables: Mapping[str, DomainTable] | None = None) -> dict[str, Any]:
    """What table.json holds and the plots draw; NaN and infinity become None."""
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


def finite(value: Any) -> Any:
    """For JSON: NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(findings: Findings, domain: str) -> DomainTable:
    study, test = findings.study, findings.test[domain]
    full, control = str(study.named(Full)), study.named(Control)
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
    """A row but for its differences on test."""
    study, runs = findings.study, list(findings.test[domain][arm].values())
    evaluations: list[Evaluation] = [run.evaluation for run in runs]
    answers = [run.exact for run in runs if run.exact is not None]
    temperatures = [run.temperature for run in runs if run.temperature is not None]
    setting, against = findings.chosen.get(domain, {}).get(arm), reference_of(study, arm)
    outcomes = [o for o in findings.outcomes if (o.unit.domain, o.unit.arm) == (domain, arm)]
    # The runs of an average were tried, and their setting chosen, by the arm that it averages.
    own = [o.unit.setting for o in outcomes if not isinstance(study.arms[arm], Average)]
    source = study.arms[arm].of or arm
    chosen = [
        o
        for o in findings.outcomes
        if (o.unit.domain, o.unit.arm, o.unit.setting, o.unit.part) == (domain, source, setting, 0)
    ]
    seconds = _mean([o.seconds for o in chosen]) if chosen else None
    if isinstance(study.arms[arm], Average):
        seconds = _seconds_of_parts(findings, domain, arm, len(runs))
    flips = [o.flips for o in chosen if o.flips is not None]
    memory = [float(o.memory) for o in chosen if o.memory is not None]
    first = [o for o in outcomes if (o.unit.setting, o.unit.part) == (setting, 0)]
    stored = [float(o.bytes) for o in first if o.bytes is not None]
    resident = [float(o.resident) for o in first if o.resident is not None]
    return Row(
        arm=arm,
        kind=study.arms[arm].kind,
        masked=is_mft(study, arm),
        setting=setting,
        against=against,
        start=start_of(study, arm),
        of=study.arms[arm].of,
        teacher=study.arms[arm].teacher,
        loss=_mean([evaluation.loss for evaluation in evaluations]),
        accuracy=_mean([evaluation.accuracy for evaluation in evaluations]),
        exact=_mean(answers) if answers else None,
        temperature=_mean(temperatures) if temperatures else None,
        decides=deciding_metric(study),
        validation=validation_difference(findings, domain, arm, against),
        validation_exact=_validation_exact(findings, domain, arm),
        tried=len(set(own)),
        rates=findings.rates(domain, arm),
        steps=_mean([float(o.steps) for o in chosen]) if chosen else None,
        seconds=seconds,
        seconds_tried=sum(o.seconds for o in outcomes),
        flips=_mean(flips) if flips else None,
        memory=_mean(memory) if memory else None,
        bytes=_mean([float(size) for size in stored]) if stored else None,
        resident=_mean([float(size) for size in resident]) if resident else None,
        seeds=len(runs),
        unsettled=_unsettled(findings, domain, arm),
    )


def _unsettled(findings: Findings, domain: str, arm: str) -> list[str]:
    """The open ends of an arm, of the one that it is made of and of those at whose end they begin."""
    rests = [arm]
    for each in rests:
        rests += [needed for needed in findings.study.needs(each) if needed not in rests]
    ends = [end for end in findings.open_ends if end.domain == domain and end.arm in rests]
    return [f"{end.arm}'s {end.what}" for end in ends]


def _pairs(findings: Findings, domain: str, table: DomainTable) -> dict[tuple[str, str, str], Paired]:
    """By (arm, FULL or CONTROL, metric), what can be compared."""
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


def validation_difference(findings: Findings, domain: str, arm: str, against: str | None) -> float | None:
    """Mean difference of what decides, on the validation split in the seeds of both."""
    measured = findings.validation.get(domain, {})
    if against is None or arm not in measured or against not in measured:
        return None
    pair = paired(measured[arm], measured[against], deciding_metric(findings.study))
    return None if pair is None else pair.estimate


def _validation_exact(findings: Findings, domain: str, arm: str) -> float | None:
    """Mean over seeds, where arms learned by rewards."""
    runs = findings.validation.get(domain, {}).get(arm, {}).values()
    shares = [run.exact for run in runs if run.exact is not None]
    return _mean(shares) if shares and findings.study.objective == REWARDS else None


def _seconds_of_parts(findings: Findings, domain: str, average: str, seeds: int) -> float:
    """Of all runs of an average: the one that it shares with the arm that it averages, and its own."""
    of, setting = findings.study.arms[average].of, findings.chosen.get(domain, {}).get(average)
    units = [(o.unit.domain, o.unit.setting, o.unit.arm, o.seconds) for o in findings.outcomes]
    return sum(seconds for *where, arm, seconds in units if where == [domain, setting] and arm in (of, average)) / seeds


def _row(tables: Mapping[str, DomainTable], key: tuple[str, str, str, str]) -> Row:
    return next(row for row in tables[key[0]].rows if row.arm == key[1])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
