"""Judge stored studies again by today's rules, without running them: python -m benchmarks.verdicts [NAME] ... [--write]

Stored differences, intervals and p values do not change. The conclusions and their wording are made again by the code
of `mft compare`. Prints which verdicts change. With --write the JSON and Markdown files are written again. NAME is part
of a file's name.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mft_study.arms.setting import Setting
from mft_study.report.at_equal_bytes import AtEqualBytes, byte_verdicts
from mft_study.report.dominance import Comparison, OnLoss, family_size, make_comparison
from mft_study.report.equal_budgets import EqualBudget
from mft_study.report.general import OnText
from mft_study.report.judge import side
from mft_study.report.remarks import dominance_remark, p_remark
from mft_study.report.statistics import Difference
from mft_study.report.table import DomainTable, Row
from mft_study.report.verdict import conclusion_of, shown_interval, verdicts_of
from mft_study.report.write import numbers_text, report_text

from .records import RESULTS
from .tables import markdown

Kind = TypeVar("Kind")


def tables_in(numbers: Mapping[str, Any]) -> dict[str, DomainTable]:
    """Return the tables of a table.json by domain, with their comparisons judged again."""
    return {domain: _table(values, numbers["seeds"][0]) for domain, values in numbers["domains"].items()}


def judge_again(numbers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DomainTable], list[list[str]]]:
    """Return (numbers with new verdicts and wording, their tables, [domain, arm, rival, old, new] of each change)."""
    tables, changes = tables_in(numbers), []
    for domain, table in tables.items():
        stored = numbers["domains"][domain]
        for one, entry in zip(table.comparisons, stored.get("comparisons", []), strict=True):
            if entry["verdict"] != one.verdict:
                changes.append([domain, one.arm, f"{one.rival}, {one.text}", entry["verdict"], one.verdict])
            entry |= {"verdict": one.verdict, "lacks": one.lacks}
            entry["domain"]["side"], entry["general"]["side"] = one.domain.side, one.general.side
        for row, entry in zip(table.rows, stored["rows"], strict=True):
            concluded = conclusion_of(table, row)
            if entry.get("conclusion") != concluded:
                changes.append([domain, row.arm, str(row.against), str(entry.get("conclusion")), str(concluded)])
            entry |= {"conclusion": concluded, "rates": row.rates}
    bytes_found = [
        _made(AtEqualBytes, values, difference=_difference(values["difference"]))
        for values in numbers.get("at_equal_bytes", [])
    ]
    verdicts = verdicts_of(tables, lambda table, row: _uncompared(numbers, table, row))
    remarks = [dominance_remark(family_size(table.comparisons for table in tables.values()))]
    numbers["verdicts"] = _renewed(numbers["verdicts"], [*verdicts, *byte_verdicts(bytes_found)])
    numbers["remarks"] = _renewed(numbers["remarks"], [*remarks, p_remark(len(numbers["seeds"]))])
    return numbers, tables, changes


def _renewed(old: Sequence[str], made: Iterable[str]) -> list[str]:
    """Return the paragraphs, with new ones in place of those whose first sentence begins alike. Others stay."""
    new = {paragraph.split(". ")[0]: paragraph for paragraph in made}
    return [new.get(paragraph.split(". ")[0], paragraph) for paragraph in old]


def _uncompared(numbers: Mapping[str, Any], table: DomainTable, row: Row) -> str:
    """Return the stored reason why a row was not compared, because a new one would need the study's declaration."""
    difference = re.escape(f"{row.arm} - {table.full}: {shown_interval(row.minus_full)}")
    found = re.search(f"{difference}([^.]*)\\.", " ".join(numbers["verdicts"]))
    return "" if found is None else found[1]


def _table(values: Mapping[str, Any], first_seed: int) -> DomainTable:
    rates = {row["arm"]: _rates(values, row, first_seed) for row in values["rows"]}
    table = _made(DomainTable, values, rows=[_row(row, rates[row["arm"]]) for row in values["rows"]])
    table.comparisons = [_comparison(one, rates) for one in values.get("comparisons", [])]
    table.equal_budgets = [_budget(one) for one in values.get("equal_budgets", [])]
    return table


def _rates(values: Mapping[str, Any], row: Mapping[str, Any], first_seed: int) -> int | None:
    source = row.get("of") or row["arm"]
    tried = {t["lr"] for t in values["trials"] if (t["arm"], t["seed"]) == (source, first_seed)}
    return len(tried - {None}) or None


def _row(values: Mapping[str, Any], rates: int | None) -> Row:
    row = _made(Row, values, setting=_setting(values["setting"]), minus_full=_difference(values["minus_full"]))
    row.minus_control = {metric: _known(one) for metric, one in values["minus_control"].items()}
    row.general = {
        text: _made(OnText, on, **{name: _difference(on[name]) for name in ("minus_full", "minus_start")})
        for text, on in values.get("general", {}).items()
    }
    row.decides, row.rates = values.get("decides", "loss"), rates
    return row


def _comparison(values: Mapping[str, Any], rates: Mapping[str, int | None]) -> Comparison:
    losses = []
    for name in ("domain", "general"):
        difference, validation = _known(values[name]["difference"]), values[name]["validation"]
        losses.append(OnLoss(difference, validation, side(difference, validation)[0]))
    both = {name: rates[name] for name in (values["arm"], values["rival"])}
    return make_comparison(both, values["text"], *losses)


def _budget(values: Mapping[str, Any]) -> EqualBudget:
    settings = {name: _setting(values[name]) for name in ("setting", "control_setting")}
    return _made(EqualBudget, values, difference=_difference(values["difference"]), **settings)


def _setting(values: Mapping[str, Any] | None) -> Setting | None:
    return None if values is None else Setting(**values)


def _difference(values: Mapping[str, Any] | None) -> Difference | None:
    return None if values is None else _known(values)


def _known(values: Mapping[str, Any]) -> Difference:
    ends = {name: math.nan for name in ("low", "high", "p") if values[name] is None}
    return Difference(**{**values, **ends})


def _made(kind: type[Kind], values: Mapping[str, Any], **others: Any) -> Kind:
    """Build a dataclass from a file's values; fields that an older file lacks are None or have their default."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    required = (dataclasses.MISSING, dataclasses.MISSING)
    absent = {name: None for name, field in fields.items() if (field.default, field.default_factory) == required}
    return kind(**{**absent, **{name: values[name] for name in fields if name in values}, **others})


def main() -> None:
    """Print what changes; write it if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of files")
    parser.add_argument("--write", action="store_true", help="write the files again")
    asked = parser.parse_args()
    paths = [*RESULTS.glob("compare-*.json"), *RESULTS.glob("ablation-*.json")]
    paths = sorted(path for path in paths if not asked.names or any(name in path.name for name in asked.names))
    if not paths:
        sys.exit(f"error: names must be parts of names of studies in {RESULTS}, got {' '.join(asked.names)}")
    rows: list[list[str]] = []
    for path in paths:
        numbers, tables, changes = judge_again(json.loads(path.read_text()))
        rows += [[path.stem, *change] for change in changes]
        if asked.write:
            words = (numbers["verdicts"], numbers["remarks"], numbers["environment"])
            path.write_text(numbers_text(numbers))
            path.with_suffix(".md").write_text(report_text(tables, *words))
    print(markdown(["study", "domain", "arm", "rival", "was", "is"], rows))


if __name__ == "__main__":
    main()
