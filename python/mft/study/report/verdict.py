"""What a study says in words: a verdict a domain that claims no more than its intervals allow, and how it was got.

Where forgetting is measured the verdict is of dominance: see dominance.py. Elsewhere MFT helps only if all three hold:
the interval of MFT - control lies below 0, its p stays below 0.05 after Holm's correction, and validation's difference
has the same sign. A loss is declared by the same rules.
"""

import math
from collections.abc import Iterable, Mapping

from mft.study.config import AVERAGE, CONTROL, DERIVED, INTERPOLATED, REWARDS
from mft.study.outcome import Findings
from mft.study.report.dominance import (
    DOMINATED,
    DOMINATES,
    LEVEL_WITH,
    TRADE_OFF,
    Comparison,
    OnLoss,
    draws_of,
    family_size,
)
from mft.study.report.rewards import rewards_remark
from mft.study.report.statistics import CONFIDENCE, DRAWS, WRONG, Difference, side
from mft.study.report.table import DomainTable, Row, study_tables

HELPS = "MFT helps"
LOST = "MFT does not help: the control is better"
NO_EVIDENCE = "No evidence beyond continued training"
FEW_DOCUMENTS = 20
_ONE_SEED = "A single seed: the intervals know of documents only, another seed of the training moves results too."
# By a comparison's verdict, and of a trade-off by the side of the loss on the domain.
_WORDS = {
    (DOMINATES, 0): "dominates",
    (DOMINATED, 0): "is dominated by",
    (TRADE_OFF, -1): "gains more and forgets more than",
    (TRADE_OFF, 1): "gains less and forgets less than",
    (LEVEL_WITH, 0): "is level with",
}


def study_verdicts(findings: Findings, tables: Mapping[str, DomainTable] | None = None) -> list[str]:
    """One paragraph a domain; where forgetting is measured, one a domain and text (beside it, of arms by rewards)."""
    tables = study_tables(findings) if tables is None else tables
    paragraphs, by_answers = [], findings.study.objective == REWARDS
    for domain, table in tables.items():
        if not table.general or by_answers:
            paragraphs.append(f"{domain}. {' '.join(_sentences(findings, table))}")
        for text in table.general:
            said = " ".join(_dominance(f"wrong answers a question on {domain}" if by_answers else domain, text, table))
            paragraphs.append(f"{domain}, and what is left of {text}. {said}")
    return paragraphs


def conclusion(row: Row) -> tuple[str, str]:
    """(HELPS, LOST or NO_EVIDENCE, why no more is claimed) of an MFT arm that was compared with its control."""
    difference = row.minus_control[row.decides]
    shown, why = side(difference, row.validation)
    if shown:
        return (HELPS if shown < 0 else LOST), ""
    if math.isnan(difference.low):
        return NO_EVIDENCE, why
    return NO_EVIDENCE, f"{'MFT' if difference.estimate < 0 else row.against} is ahead on test, but {why}"


def errors(findings: Findings) -> list[str]:
    """What must be mended before the verdicts are believed."""
    return [f"Error: {end}." for end in findings.open_ends]


def remarks(findings: Findings, tables: Mapping[str, DomainTable]) -> list[str]:
    """What a reader of the verdicts must know; warnings first."""
    return [*_warnings(findings, tables), *_method(findings, tables), *findings.notes]


def shown_interval(difference: Difference | None, scale: float = 1, digits: int = 4) -> str:
    """ "-0.0123 [-0.0200, -0.0046]" """
    if difference is None:
        return "-"
    estimate, low, high = (
        f"{scale * value + 0.0:+.{digits}f}" for value in (difference.estimate, difference.low, difference.high)
    )
    return estimate if math.isnan(difference.low) else f"{estimate} [{low}, {high}]"


def shown_p(p: float | None) -> str:
    if p is None or math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _sentences(findings: Findings, table: DomainTable) -> Iterable[str]:
    masked = [row for row in table.rows if row.masked]
    if table.control is None:
        yield "There is no control arm (the same layers' weights trained on), so there is no verdict."
    if not masked:
        yield "There is no MFT arm."
    for row in masked:
        control = table.row(row.against)
        if row.decides in row.minus_control and control is not None:
            yield _compared(row, control, table.full)
        else:
            yield f"{row.arm} - {table.full}: {shown_interval(row.minus_full)}{_uncompared(findings, table, row)}."
    if table.seeds == 1:
        yield _ONE_SEED


def _dominance(domain: str, text: str, table: DomainTable) -> Iterable[str]:
    masked = [row for row in table.rows if row.masked]
    if not masked:
        yield "There is no MFT arm."
    for row in masked:
        listed = [one for one in table.comparisons if (one.arm, one.text) == (row.arm, text)]
        yield _sides(row, listed) if listed else f"{row.arm} is not compared: there is no rival with the same seeds."
        yield from (_both(domain, one) for one in listed if one.rival == row.against)
        if ends := _ends(row, *(rival for one in listed if (rival := table.row(one.rival)) is not None)):
            yield f"Unsettled, at an end of its grid: {ends}."
    if masked and table.seeds == 1:
        yield _ONE_SEED


def _ends(*rows: Row) -> str:
    """The choices at an end of their grid that a comparison of these rows rests on."""
    return ", ".join(dict.fromkeys(end for row in rows for end in row.unsettled))


def _sides(row: Row, listed: list[Comparison]) -> str:
    """ "MFT dominates LoRA; is level with control." """
    rivals: dict[str, list[str]] = {words: [] for words in _WORDS.values()}
    for one in listed:
        rivals[_WORDS[one.verdict, one.domain.side if one.verdict == TRADE_OFF else 0]].append(one.rival)
    if len(rivals[_WORDS[DOMINATES, 0]]) == len(listed):
        return f"{row.arm} dominates every rival: {', '.join(one.rival for one in listed)}."
    parts = (f"{words} {', '.join(names)}" for words, names in rivals.items() if names)
    return f"{row.arm} {'; '.join(parts)}."


def _both(domain: str, one: Comparison) -> str:
    return f"{one.arm} - {one.rival}: {_on_loss(domain, one.domain)}; {_on_loss(one.text, one.general)}."


def _on_loss(name: str, found: OnLoss) -> str:
    validation = "none" if found.validation is None else f"{found.validation:+.4f}"
    p = shown_p(found.difference.p_holm)
    return f"{name} {shown_interval(found.difference)}, Holm-adjusted p {p}, on validation {validation}"


def _compared(row: Row, control: Row, full: str) -> str:
    difference = row.minus_control[row.decides]
    what, why = conclusion(row)
    validation = "none" if row.validation is None else f"{row.validation:+.4f}"
    ends = _ends(row, control)
    mark = f" (unsettled, at an end of its grid: {ends})" if ends else ""
    if row.decides == WRONG:
        exact = shown_interval(row.minus_control["answers"], 100, 1)
        return (
            f"{row.arm}: {what}{f' ({why})' if why else ''}{mark}. {row.arm} - {control.arm}: {exact} % of questions "
            f"answered exactly, Holm-adjusted p {shown_p(difference.p_holm)}; wrong answers a question on validation "
            f"{validation}."
        )
    return (
        f"{row.arm}: {what}{f' ({why})' if why else ''}{mark}. "
        f"{row.arm} - {full}: {shown_interval(row.minus_full)}; "
        f"{control.arm} - {full}: {shown_interval(control.minus_full)}; "
        f"{row.arm} - {control.arm}: {shown_interval(difference)} nats a token, "
        f"Holm-adjusted p {shown_p(difference.p_holm)}; on validation {validation}."
    )


def _uncompared(findings: Findings, table: DomainTable, row: Row) -> str:
    if table.control is None:
        return ""
    if row.against is None and findings.study.codes_under(row.arm) is not None:
        return "; not compared: no arm rounds a control of its layers and its exact start to such codes"
    if row.kind == AVERAGE and row.against is None:
        runs = findings.study.arms[row.arm].runs
        return f"; not compared: no arm averages {runs} runs of {table.control}, and a single run is no match"
    if row.kind == INTERPOLATED and row.against is None:
        return f"; not compared: no arm lies between {table.control} and its start"
    return f"; not compared: {row.against} was not tested in the same seeds"


def _warnings(findings: Findings, tables: Mapping[str, DomainTable]) -> Iterable[str]:
    study = findings.study
    if findings.test_openings > 1:
        yield (
            f"Warning: the test split was opened {findings.test_openings} times, each time with other arms or "
            "settings: the p-values are optimistic."
        )
    for domain, table in tables.items():
        if table.documents < FEW_DOCUMENTS:
            yield (
                f"Warning: {domain} has {table.documents} test documents, fewer than {FEW_DOCUMENTS}: "
                "its intervals are rough."
            )
        if missing := [arm for arm in study.arms if table.row(arm) is None]:
            yield f"Warning: {domain} was not tested for {', '.join(missing)}."
        for row in table.rows:
            difference = row.minus_control.get(row.decides, row.minus_full)
            if difference is not None and difference.seeds < table.seeds:
                yield (
                    f"Warning: {domain}, {row.arm}: compared in {difference.seeds} of {table.seeds} seeds, those that "
                    "it and its reference have."
                )


def _method(findings: Findings, tables: Mapping[str, DomainTable]) -> Iterable[str]:
    study, stage, seeds = findings.study, findings.study.stage, len(findings.study.seeds)
    yield (
        f"Test losses in nats a token, means of {seeds} {'seed' if seeds == 1 else 'seeds'}; differences are paired by "
        f"seed and document; {100 * CONFIDENCE:.0f} % intervals from {DRAWS} draws of seeds and documents at once, "
        "widened for how few there are; accuracy is that of the next token."
    )
    if study.named(CONTROL) is not None:
        claims = [
            row for table in tables.values() for row in table.rows if row.masked and row.decides in row.minus_control
        ]
        yield (
            f"p is two-sided against the control; Holm's correction runs over the {len(claims)} comparisons of MFT "
            "with it in all domains, and separately over those of the other arms, on which no verdict rests."
        )
    if family := family_size(table.comparisons for table in tables.values()):
        yield (
            "An MFT arm dominates a rival if it is better by one of two losses, on the domain and on a text that no "
            "arm was trained for, and worse by neither; it is dominated likewise; better by one and worse by the "
            "other is a trade-off. Better and worse mean that the interval excludes 0, p stays below 0.05 after "
            f"Holm's correction over these {family} differences ({draws_of(family)} draws; of every MFT arm from "
            "every rival, by both losses, over all domains and texts), and validation has the same sign. Level means "
            "that neither was shown, not that two arms are equal. Rivals are the tuned arms that are no masks, the "
            "full fine-tune among them; of an average of runs the averages of as many."
        )
    for domain, table in tables.items():
        tried = [f"{row.arm} {row.tried}" for row in table.rows if row.kind != AVERAGE]
        total = sum(row.tried for row in table.rows)
        means = [name for name, arm in study.arms.items() if arm.kind in DERIVED]  # part 0 of these is no run
        units = [(o.unit, o.seconds) for o in findings.outcomes if o.unit.domain == domain]
        runs = [seconds for unit, seconds in units if unit.arm not in means or unit.part > 0]
        yield (
            f"{domain}: {total} configurations tried ({', '.join(tried)}), each arm's chosen on validation with seed "
            f"{study.seeds[0]} and then run with every seed; {len(runs)} runs and {sum(runs):.0f} s "
            "in all."
        )
    if study.objective == REWARDS:
        yield rewards_remark(findings)
    else:
        yield (
            f"Budget of every trained arm after the fine-tune: {stage.batch_size * stage.accumulation} rows a step, "
            f"{stage.schedule} schedule, as many epochs as validation chose of its grid; the best of "
            f"{study.checkpoints} checkpoints on validation is kept."
        )
    if findings.test_openings == 1:
        yield "The test split was opened once, after every choice."
