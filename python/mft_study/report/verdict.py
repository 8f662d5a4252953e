"""The verdicts of a study in words, one per domain, which claim no more than the intervals allow.

If forgetting is measured, the verdict is about dominance: see dominance.py. Otherwise, by the rules of judge.py, MFT
helps if MFT - control is shown to lie below 0, and the control is better if it is shown to lie above 0. With too few
documents, seeds or rates, or with an interval that is too wide, nothing can be concluded. The verdict then begins by
saying so, and what would be needed.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from mft_study.outcome import Findings
from mft_study.report.dominance import (
    BETTER_BY_ONE,
    DOMINATED,
    DOMINATES,
    LEVEL_WITH,
    TRADE_OFF,
    UNDECIDED,
    WORSE_BY_ONE,
    Comparison,
    OnLoss,
)
from mft_study.report.judge import few_rates, shortage, side, too_wide
from mft_study.report.statistics import WRONG, Difference, smallest_p
from mft_study.report.table import DomainTable, Row, study_tables

HELPS = "MFT helps"
LOST = "MFT does not help: the control is better"
NO_EVIDENCE = "No evidence beyond continued training"
INCONCLUSIVE = "Nothing can be concluded"
_ONE_SEED = "A single seed: the intervals know of documents only, another seed of the training moves results too."
# Verdicts whose words also depend on the side of the loss on the domain.
_BY_SIDE = (TRADE_OFF, BETTER_BY_ONE, WORSE_BY_ONE)
_WORDS = {
    (DOMINATES, 0): "dominates",
    (DOMINATED, 0): "is dominated by",
    (TRADE_OFF, -1): "gains more and forgets more than",
    (TRADE_OFF, 1): "gains less and forgets less than",
    (BETTER_BY_ONE, -1): "gains more, and perhaps forgets more, than",
    (BETTER_BY_ONE, 0): "forgets less, and perhaps gains less, than",
    (WORSE_BY_ONE, 1): "gains less, and perhaps forgets less, than",
    (WORSE_BY_ONE, 0): "forgets more, and perhaps gains more, than",
    (LEVEL_WITH, 0): "is level with",
    (UNDECIDED, 0): "cannot be told from",
}
_MEGA = 1e6
_NOT_JUDGED = "is not judged against"  # too few documents, seeds or rates


def study_verdicts(findings: Findings, tables: Mapping[str, DomainTable] | None = None) -> list[str]:
    """Return one paragraph per domain or, if forgetting is measured, per domain and text. By rewards, return both."""
    tables = study_tables(findings) if tables is None else tables
    return verdicts_of(tables, lambda table, row: _uncompared(findings, table, row))


def verdicts_of(tables: Mapping[str, DomainTable], uncompared: Callable[[DomainTable, Row], str]) -> list[str]:
    """Return the same from the tables alone. uncompared: says why a row has no difference from a control."""
    paragraphs = []
    for domain, table in tables.items():
        by_answers = any(row.decides == WRONG for row in table.rows)
        if not table.general or by_answers:
            paragraphs.append(f"{domain}. {' '.join(_sentences(table, uncompared))}")
        for text in table.general:
            said = " ".join(_dominance(f"wrong answers a question on {domain}" if by_answers else domain, text, table))
            paragraphs.append(f"{domain}, and what is left of {text}. {said}")
    return paragraphs


def conclusion(row: Row, control: Row) -> tuple[str, str]:
    """Judge an MFT arm against its control: (HELPS, LOST, NO_EVIDENCE or INCONCLUSIVE, why no more is claimed)."""
    difference = row.minus_control[row.decides]
    lacks = [shortage(difference), few_rates({row.arm: row.rates, control.arm: control.rates})]
    if any(lacks):
        return INCONCLUSIVE, "; ".join(filter(None, lacks))
    shown, why = side(difference, row.validation)
    if shown:
        return (HELPS if shown < 0 else LOST), ""
    if difference.low <= 0 <= difference.high and (wide := too_wide(difference)):
        return INCONCLUSIVE, wide
    return NO_EVIDENCE, f"{'MFT' if difference.estimate < 0 else row.against} is ahead on test, but {why}"


def conclusion_of(table: DomainTable, row: Row) -> str | None:
    """Return what table.json says about a row; None without a comparison with a control, or if dominance decides."""
    control = table.row(row.against)
    if not row.masked or control is None or row.decides not in row.minus_control or table.general:
        return None
    return conclusion(row, control)[0]


def results_of(tables: Mapping[str, DomainTable]) -> list[str]:
    """Return a sentence per domain: the best arm on test, and how far from it the best mask or other arm is."""
    return [_result(domain, table) for domain, table in tables.items()]


def shown_interval(difference: Difference | None, scale: float = 1, digits: int = 4) -> str:
    """Return estimate and interval, such as "-0.0123 [-0.0200, -0.0046]"; "-" for None."""
    if difference is None:
        return "-"
    estimate, low, high = (
        f"{scale * value + 0.0:+.{digits}f}" for value in (difference.estimate, difference.low, difference.high)
    )
    return estimate if math.isnan(difference.low) else f"{estimate} [{low}, {high}]"


def shown_p(difference: Difference | None) -> str:
    """Return p after Holm's correction, or "<" and the smallest p that the seeds can tell if p is smaller."""
    if difference is None or difference.p_holm is None or math.isnan(difference.p_holm):
        return "-"
    least = smallest_p(difference.seeds)
    return f"<{least:g}" if difference.p_holm < least else f"{difference.p_holm:.3f}"


def _result(domain: str, table: DomainTable) -> str:
    by_answers = all(row.decides == WRONG and row.exact is not None for row in table.rows)
    wrong = {row.arm: 1 - (row.exact or 0.0) if by_answers else row.loss for row in table.rows}
    best, *others = sorted(table.rows, key=lambda row: wrong[row.arm])
    size = f" in {best.bytes / 1000:,.{1 if best.bytes < _MEGA else 0}f} kB" if best.bytes else ""
    found = f"{100 * (best.exact or 0.0):.1f} %" if by_answers else f"{best.loss:.4f}"
    said = f"{domain}: {'most exact answers' if by_answers else 'lowest test loss'}: {best.arm}, {found}{size}"
    other = next((row for row in others if row.masked != best.masked), None)
    if other is None:
        return f"{said}."
    gap = wrong[other.arm] - wrong[best.arm]
    far = f"{100 * gap:.1f} points below it" if by_answers else f"{gap:.4f} above it"
    return f"{said}; {other.arm}, the best {'mask' if other.masked else 'arm that is no mask'}, is {far}."


def _sentences(table: DomainTable, uncompared: Callable[[DomainTable, Row], str]) -> Iterable[str]:
    masked = [row for row in table.rows if row.masked]
    if table.control is None:
        yield "There is no control arm (the same layers' weights trained on), so there is no verdict."
    if not masked:
        yield "There is no MFT arm."
    for row in masked:
        control = table.row(row.against)
        if row.decides in row.minus_control and control is not None:
            yield _comparison_words(row, control, table.full)
        else:
            yield f"{row.arm} - {table.full}: {shown_interval(row.minus_full)}{uncompared(table, row)}."
    if table.seeds == 1:
        yield _ONE_SEED


def _dominance(domain: str, text: str, table: DomainTable) -> Iterable[str]:
    masked = [row for row in table.rows if row.masked]
    if not masked:
        yield "There is no MFT arm."
    for row in masked:
        listed = [one for one in table.comparisons if (one.arm, one.text) == (row.arm, text)]
        if lacks := _lacks(listed):
            yield f"{row.arm}: {INCONCLUSIVE[0].lower()}{INCONCLUSIVE[1:]} ({lacks})."
        yield _sides(row, listed) if listed else f"{row.arm} is not compared: there is no rival with the same seeds."
        for one in listed:
            if one.rival == row.against:
                losses = f"{_loss_words(domain, one.domain)}; {_loss_words(text, one.general)}"
                yield f"{row.arm} - {one.rival}: {losses}."
        if ends := _ends(row, *(rival for one in listed if (rival := table.row(one.rival)) is not None)):
            yield f"Unsettled, at an end of its grid: {ends}."
    if masked and table.seeds == 1:
        yield _ONE_SEED


def _ends(*rows: Row) -> str:
    """Return the choices at an end of their grid that a comparison of these rows rests on."""
    return ", ".join(dict.fromkeys(end for row in rows for end in row.unsettled))


def _sides(row: Row, listed: list[Comparison]) -> str:
    """Return an arm's verdicts in one sentence, such as: MFT dominates LoRA; is level with control."""
    rivals: dict[str, list[str]] = {words: [] for words in (*_WORDS.values(), _NOT_JUDGED)}
    for one in listed:
        words = _WORDS[one.verdict, one.domain.side if one.verdict in _BY_SIDE else 0]
        rivals[_NOT_JUDGED if one.lacks else words].append(one.rival)
    if len(rivals[_WORDS[DOMINATES, 0]]) == len(listed):
        return f"{row.arm} dominates every rival: {', '.join(one.rival for one in listed)}."
    parts = (f"{words} {', '.join(names)}" for words, names in rivals.items() if names)
    return f"{row.arm} {'; '.join(parts)}."


def _lacks(listed: list[Comparison]) -> str:
    """Return why none of an arm's comparisons can be decided; "" if one can."""
    lacks = [one.lacks for one in listed]
    return "; ".join(dict.fromkeys(lacks)) if all(lacks) else ""


def _loss_words(name: str, found: OnLoss) -> str:
    validation = "none" if found.validation is None else f"{found.validation:+.4f}"
    p = shown_p(found.difference)
    return f"{name} {shown_interval(found.difference)}, Holm-adjusted p {p}, on validation {validation}"


def _comparison_words(row: Row, control: Row, full: str) -> str:
    difference = row.minus_control[row.decides]
    what, why = conclusion(row, control)
    validation = "none" if row.validation is None else f"{row.validation:+.4f}"
    ends = _ends(row, control)
    mark = f" (unsettled, at an end of its grid: {ends})" if ends else ""
    if row.decides == WRONG:
        exact = shown_interval(row.minus_control["answers"], 100, 1)
        return (
            f"{row.arm}: {what}{f' ({why})' if why else ''}{mark}. {row.arm} - {control.arm}: {exact} % of questions "
            f"answered exactly, Holm-adjusted p {shown_p(difference)}; wrong answers a question on validation "
            f"{validation}."
        )
    return (
        f"{row.arm}: {what}{f' ({why})' if why else ''}{mark}. "
        f"{row.arm} - {full}: {shown_interval(row.minus_full)}; "
        f"{control.arm} - {full}: {shown_interval(control.minus_full)}; "
        f"{row.arm} - {control.arm}: {shown_interval(difference)} nats per token, "
        f"Holm-adjusted p {shown_p(difference)}; on validation {validation}."
    )


def _uncompared(findings: Findings, table: DomainTable, row: Row) -> str:
    if table.control is None:
        return ""
    if row.against is None and findings.study.codes_under(row.arm) is not None:
        return "; not compared: no arm rounds a control of its layers and its exact start to such codes"
    if row.against is None and (why := findings.study.arms[row.arm].why_uncompared(table.control)):
        return f"; not compared: {why}"
    return f"; not compared: {row.against} was not tested in the same seeds"
