"""The report of a study: tables for Markdown and the terminal, all numbers as JSON, the plots."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from mft.files.atomic import write_whole
from mft.tracking.curves import PLOT
from mft.training.run_directory import TABLE_JSON, TABLE_MARKDOWN
from mft_study.config import REWARDS
from mft_study.evidence.sums import FILE as SUMS
from mft_study.evidence.sums import write_sums
from mft_study.outcome import Findings
from mft_study.report.at_equal_bytes import (
    AtEqualBytes,
    byte_verdicts,
    bytes_values,
    compare_at_equal_bytes,
    remark_on_bytes,
)
from mft_study.report.equal_budgets import budget_sentences
from mft_study.report.general import OnText
from mft_study.report.over_codes import verdicts_over_codes
from mft_study.report.pictures.by_bytes import plot_bytes
from mft_study.report.pictures.forgetting import plot_forgetting
from mft_study.report.pictures.plots import plot_study
from mft_study.report.remarks import remarks
from mft_study.report.reward_curves import REWARDS_PLOT, plot_rewards, reward_curves
from mft_study.report.sums import sums_of
from mft_study.report.table import DomainTable, Row, study_numbers, study_tables
from mft_study.report.verdict import conclusion_of, results_of, shown_interval, shown_p, study_verdicts
from mft_study.store import BYTES, FORGETTING

WIDTH = 100  # of the terminal's tables
_PLAIN_LIST = re.compile(r"\[\n([^][{}\"]*)\]")  # no string of JSON has a line break in it
_PERCENT = 100
_REFERENCE, _NO_SEED, _NO_CONTROL = "reference", "no seed in common", "no control like it"
_MEGA = 1e6


def write_study_report(findings: Findings, directory: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write table.md, table.json, sums.npz, plot.png and the pictures that have something to show to directory.

    extra: where the numbers come from (commit, versions, device, command); it goes into both tables.
    """
    tables, extra = study_tables(findings), dict(extra or {})
    said, known, by_bytes = _words_of(findings, tables)
    write_whole(directory / TABLE_MARKDOWN, report_text(tables, said, known, extra))
    numbers = study_numbers(findings, tables)
    for domain, table in tables.items():
        for row, entry in zip(table.rows, numbers["domains"][domain]["rows"]):
            entry["conclusion"] = conclusion_of(table, row)
        numbers["domains"][domain]["by_rewards"] = reward_curves(findings, domain)
    numbers |= {"verdicts": said, "remarks": known, "environment": extra}
    numbers |= {"at_equal_bytes": bytes_values(by_bytes)}
    write_whole(directory / TABLE_JSON, numbers_text(numbers))
    write_sums(sums_of(findings, tables), directory / SUMS)
    plot_study(numbers, directory / PLOT)
    if findings.study.objective == REWARDS:
        plot_rewards(numbers, directory / REWARDS_PLOT)
    if by_bytes:
        plot_bytes(numbers, directory / BYTES)
    if any(table.general for table in tables.values()):
        plot_forgetting(numbers, directory / FORGETTING)


def report_text(
    tables: Mapping[str, DomainTable],
    said: Iterable[str],
    known: Iterable[str],
    extra: Mapping[str, Any],
) -> str:
    """Return table.md from tables, verdicts, remarks and where the numbers come from."""
    lines = [
        *(f"{result}\n" for result in results_of(tables)),
        "# Verdict",
        "",
        *(f"{paragraph}\n" for paragraph in said),
    ]
    for domain, table in tables.items():
        lines += [f"# {domain}: {_counts(table)}", "", *_markdown(table), ""]
        for text in table.general:
            lines += [f"# {domain} and {text}: MFT arms against their rivals", "", *_matches(domain, text, table), ""]
    if budgets := _budgets(tables):
        lines += ["# At equal budgets, validation, first seed", "", *(f"- {sentence}" for sentence in budgets), ""]
    lines += ["# How", "", *(f"- {note}" for note in known)]
    lines += [f"- {name}: {_words(value)}" for name, value in extra.items()]
    return "\n".join(lines) + "\n"


def numbers_text(numbers: Mapping[str, Any]) -> str:
    """Return table.json, with each list of plain values on one line."""
    text = json.dumps(numbers, indent=2, allow_nan=False)
    return _PLAIN_LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def console_report(findings: Findings) -> list[RenderableType]:
    """Return results, tables of at most six columns, verdicts and remarks for a terminal of 100 columns."""
    tables = study_tables(findings)
    parts: list[RenderableType] = [_fitted(Text(result, style="bold")) for result in results_of(tables)]
    for domain, table in tables.items():
        parts.append(_fitted(Text(f"{domain}: {_counts(table)}", style="bold")))
        groups = _drop_empty(table, [(*_LOSS, _SIZE), _EXACT, *map(_text_columns, table.general)])
        parts += [_console_table(table, columns) for columns in groups]
        if alone := [row.arm for row in table.rows if _why_uncompared(row, table) == _NO_CONTROL]:
            parts.append(_fitted(Text(f"{_NO_CONTROL}: {', '.join(alone)}; no control has the same layers and start.")))
        if chosen := [f"{row.arm} {row.setting}" for row in table.rows if str(row.setting or "")]:
            parts.append(_fitted(Text(f"chosen on validation: {'; '.join(chosen)}")))
        parts += [_fitted(Text(f"without a result: {why}")) for why in table.without_result.values()]
    said, known, _ = _words_of(findings, tables)
    parts += [_fitted(Text(paragraph, style="bold")) for paragraph in said]
    parts += [_fitted(Text(f"- {sentence}")) for sentence in _budgets(tables)]
    return parts + [_fitted(Text(f"- {note}")) for note in known]


def _words_of(findings: Findings, tables: Mapping[str, DomainTable]) -> tuple[list[str], list[str], list[AtEqualBytes]]:
    """Return (verdicts, remarks, comparisons at equal bytes)."""
    by_bytes = compare_at_equal_bytes(findings, tables)
    said = [*study_verdicts(findings, tables), *verdicts_over_codes(findings, tables), *byte_verdicts(by_bytes)]
    return said, [*remarks(findings, tables), *remark_on_bytes(by_bytes)], by_bytes


@dataclass(frozen=True)
class _Column:
    heading: str  # {full}: the full fine-tune's name
    cell: Callable[[Row], str]


def _minus_control(metric: str, scale: float = 1, digits: int = 4) -> Callable[[Row], str]:
    return lambda row: shown_interval(row.minus_control.get(metric), scale, digits)


_CHOSEN = _Column("chosen", lambda row: str(row.setting or "") or "-")
_LOSS = (
    _Column("loss", lambda row: f"{row.loss:.4f}"),
    _Column("loss - {full}", lambda row: shown_interval(row.minus_full)),
    _Column("loss - control", _minus_control("loss")),
)
_EXACT = (
    _Column("exact %", lambda row: "-" if row.exact is None else f"{_PERCENT * row.exact:.1f}"),
    _Column("exact % - control", _minus_control("answers", _PERCENT, 1)),
)
_SIZE = _Column("kB", lambda row: "-" if row.bytes is None else f"{row.bytes / 1000:,.1f}")  # on the terminal
# Side by side in Markdown; a column without an entry is left out.
_GROUPS = (
    _LOSS,
    (
        _Column("p (Holm)", lambda row: shown_p(row.minus_control.get(row.decides))),
        _Column("tempered loss - control", _minus_control("tempered")),
        _Column("acc %", lambda row: f"{_PERCENT * row.accuracy:.2f}"),
        _Column("acc % - control", _minus_control("accuracy", _PERCENT, 2)),
    ),
    _EXACT,
    (
        _CHOSEN,
        _Column("validation - control", lambda row: "-" if row.validation is None else f"{row.validation:+.4f}"),
        _Column("tried", lambda row: f"{row.tried or '-'}"),
        _Column("steps", lambda row: f"{row.steps:.0f}" if row.steps else "-"),
        _Column("s per run", lambda row: "-" if not row.seconds else f"{row.seconds:.1f}"),
        _Column("MB in training", lambda row: "-" if row.memory is None else f"{row.memory / _MEGA:.1f}"),
        _Column("recovered %", lambda row: "-" if row.recovered is None else f"{_PERCENT * row.recovered:.0f}"),
        _Column("bytes", lambda row: "-" if row.bytes is None else f"{row.bytes:,.0f}"),
        _Column("resident bytes", lambda row: "-" if row.resident is None else f"{row.resident:,.0f}"),
    ),
)


def _text_columns(text: str) -> tuple[_Column, ...]:
    """Return the columns for a text that no arm was trained on."""

    def of(row: Row, shown: Callable[[OnText], str]) -> str:
        return shown(row.general[text]) if text in row.general else "-"

    return (
        _Column(text, lambda row: of(row, lambda on: f"{on.loss:.4f}")),
        _Column(f"{text} - {{full}}", lambda row: of(row, lambda on: shown_interval(on.minus_full))),
        _Column(f"{text} - start", lambda row: of(row, lambda on: shown_interval(on.minus_start))),
        _Column("KL to start", lambda row: of(row, lambda on: f"{on.kl:.4f}")),
    )


def _drop_empty(table: DomainTable, groups: Iterable[tuple[_Column, ...]]) -> list[list[_Column]]:
    shown = [[c for c in group if any(c.cell(row) != "-" for row in table.rows)] for group in groups]
    return [group for group in shown if group]


def _markdown(table: DomainTable) -> list[str]:
    groups = (*_GROUPS[:-1], *map(_text_columns, table.general), _GROUPS[-1])
    columns = [column for group in _drop_empty(table, groups) for column in group]
    columns.sort(key=lambda column: column is not _CHOSEN)  # the chosen setting comes first
    headings = [column.heading.format(full=table.full) for column in columns]
    lines = [f"| arm | {' | '.join(headings)} |", f"|---|{'---:|' * len(columns)}"]
    for row in table.rows:
        arm = f"**{row.arm}**" if row.masked else row.arm
        lines.append(f"| {' | '.join((arm, *(column.cell(row) for column in columns)))} |")
    for arm, why in table.without_result.items():
        words = re.sub(r"\s*[|\n]\s*", " ", why)
        lines.append(f"| {' | '.join((arm, f'no result: {words}', *(len(columns) - 1) * ['-']))} |")
    return lines


def _matches(domain: str, text: str, table: DomainTable) -> Iterator[str]:
    """Yield the lines of a table of every MFT arm minus every rival."""
    yield f"| MFT arm | rival | {domain}: loss - rival | p (Holm) | {text}: loss - rival | p (Holm) | verdict |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for one in table.comparisons:
        if one.text == text:
            losses = (one.domain.difference, one.general.difference)
            cells = (cell for loss in losses for cell in (shown_interval(loss), shown_p(loss)))
            yield f"| {one.arm} | {one.rival} | {' | '.join(cells)} | {one.verdict} |"


def _console_table(table: DomainTable, columns: list[_Column]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("arm", max_width=20, overflow="fold")
    for column in columns:
        heading = column.heading.format(full=table.full).replace(" - ", " -\n", 1)
        drawn.add_column(heading, justify="right", max_width=30)
    for row in table.rows:
        cells = (Text(_cell_or_why(column, row, table)) for column in columns)
        drawn.add_row(Text(row.arm), *cells, style="bold" if row.masked else None)
    return drawn


def _cell_or_why(column: _Column, row: Row, table: DomainTable) -> str:
    """Return a cell of the terminal's tables; if it has no value, the reason."""
    if (cell := column.cell(row)) != "-":
        return cell
    if column.heading.endswith("- {full}"):
        return _REFERENCE if row.arm == table.full else _NO_SEED
    if column.heading.endswith("- control"):
        return _why_uncompared(row, table)
    return "no start" if column.heading.endswith("- start") else "not measured"


def _why_uncompared(row: Row, table: DomainTable) -> str:
    """Return why an arm has no difference from a control; "" if it has one, or if there is no control."""
    if row.decides in row.minus_control or table.control is None:
        return ""
    if any(other.against == row.arm for other in table.rows):
        return _REFERENCE
    return _NO_CONTROL if row.against is None else _NO_SEED


def _budgets(tables: Mapping[str, DomainTable]) -> list[str]:
    return [line for domain, table in tables.items() for line in budget_sentences(domain, table.equal_budgets)]


def _fitted(text: Text) -> RenderableType:
    return Constrain(text, WIDTH)


def _words(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, Mapping) else str(value)


def _counts(table: DomainTable) -> str:
    questions = f", {table.questions} questions" if table.questions else ""
    seeds = "1 seed" if table.seeds == 1 else f"{table.seeds} seeds"
    if table.leaders:
        seeds += f" ({table.leaders[0].seeds} of {', '.join(row.arm for row in table.leaders)})"
    return f"test split, {table.documents} documents, {table.tokens} tokens{questions}, {seeds}"
