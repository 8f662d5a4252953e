"""Describe arms over codes: what rounding cost, which share of it each arm took back, and masks against QLoRA.

A mask is ahead or behind by the rules of judge.py, over all such pairs in all domains.
"""

from collections.abc import Mapping

from mft_study.arms.adapters import Adapters
from mft_study.outcome import Findings
from mft_study.report.general import validation_difference
from mft_study.report.judge import side
from mft_study.report.statistics import Difference, Paired, adjust_holm, differences, paired
from mft_study.report.table import DomainTable, Row, exact_start
from mft_study.report.verdict import shown_interval, shown_p

Pair = tuple[str, str, str]  # domain, arm, the arm that it is compared with


def verdicts_over_codes(findings: Findings, tables: Mapping[str, DomainTable]) -> list[str]:
    """Return one paragraph per domain and quantized arm at which others start; [] in other studies."""
    study = findings.study
    rounded = [name for name, arm in study.arms.items() if arm.quantization is not None]
    costs = [(domain, name, exact_start(study, name)) for domain in tables for name in rounded]
    rivals = {place: _rivals(findings, tables[place[0]], place) for place in ((d, r) for d in tables for r in rounded)}
    cost = _differences(findings, costs)
    held = _differences(findings, [pair for pairs in rivals.values() for pair in pairs])
    held = dict(zip(held, adjust_holm(list(held.values()))))
    lines = []
    for place in costs:
        (domain, name, exact), table = place, tables[place[0]]
        rows = [row for row in table.rows if study.codes_under(row.arm) == name]
        if not rows or place not in cost:
            continue
        sentences = [f"Rounding costs {shown_interval(cost[place])} nats per token ({name} - {exact})."]
        shares = [f"{row.arm} {100 * row.recovered:.0f} %" for row in rows if row.recovered is not None]
        sentences += [f"Taken back of it: {', '.join(shares)}."] if shares else []
        sentences += [
            _comparison_words(findings, table, pair, held[pair]) for pair in rivals[domain, name] if pair in held
        ]
        lines.append(f"{domain}, over {name}. {' '.join(sentences)}")
    return lines


def _rivals(findings: Findings, table: DomainTable, place: tuple[str, str]) -> list[Pair]:
    """Return each pair of a trained mask and adapters from one quantized start; those in codes only with each other."""
    domain, name = place
    study = findings.study
    rows = [row for row in table.rows if study.codes_under(row.arm) == name]
    in_codes = {row.arm: study.arms[row.arm].needs_codes for row in rows}
    made_of = {arm: study.arms[str(study.arms[arm].of) if in_codes[arm] else arm] for arm in in_codes}
    adapters = [arm for arm, source in made_of.items() if isinstance(source, Adapters)]
    masks = [row.arm for row in rows if row.masked]
    return [(domain, mask, lora) for mask in masks for lora in adapters if in_codes[mask] == in_codes[lora]]


def _differences(findings: Findings, pairs: list[Pair]) -> dict[Pair, Difference]:
    """Return the differences on test, of the pairs that were measured with the same seeds."""
    known: dict[Pair, Paired] = {}
    for domain, arm, other in pairs:
        test = findings.test[domain]
        pair = paired(test.get(arm, {}), test.get(other, {}))
        if pair is not None:
            known[domain, arm, other] = pair
    return dict(zip(known, differences(list(known.values()))))


def _comparison_words(findings: Findings, table: DomainTable, pair: Pair, difference: Difference) -> str:
    domain, mask, lora = pair
    validation = validation_difference(findings, domain, mask, lora)
    shown, why = side(difference, validation)
    verdict = {-1: "ahead", 0: f"not shown to differ ({why})", 1: "behind"}[shown]
    on_validation = "none" if validation is None else f"{validation:+.4f}"
    own, other = (_costs(table.row(arm)) for arm in (mask, lora))
    return (
        f"{mask} against {lora}: {verdict}. {shown_interval(difference)} nats per token, Holm-adjusted p "
        f"{shown_p(difference)}; on validation {on_validation}; {own} against {other}."
    )


def _costs(row: Row | None) -> str:
    """Return what the chosen run stores besides its start, and needs in training without activations, in words."""
    assert row is not None
    kilobytes = "unknown bytes" if row.bytes is None else f"{row.bytes / 1000:.1f} kB"
    return kilobytes if row.memory is None else f"{kilobytes} and {row.memory / 1e6:.1f} MB in training"
