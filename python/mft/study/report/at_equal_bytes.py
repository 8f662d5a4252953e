"""Each trained mask against what else can be kept in as few bytes beside the same start.

Of all arms from its start that are no masks and store no more than it does, the mask is held against that of least
validation loss. The difference is one of test losses, paired by seed and document as in the tables; Holm's correction
runs over these comparisons in all domains. Ahead or behind is said by the rules of verdict.py, else that neither shows.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mft.study.config import StudyConfig
from mft.study.outcome import Findings
from mft.study.report.judge import side
from mft.study.report.statistics import Difference, Paired, differences, paired, with_holm
from mft.study.report.table import DomainTable, Row, finite
from mft.study.report.verdict import shown_interval, shown_p

AHEAD, BEHIND, UNDECIDED = "ahead", "behind", "undecided"


@dataclass(frozen=True)
class AtEqualBytes:
    """A mask and its best rival; None where no arm that stores so little was tested in the same seeds."""

    domain: str
    mask: str
    bytes: float
    rivals: int  # among which validation chose
    rival: str | None = None
    rival_bytes: float | None = None
    difference: Difference | None = None  # test loss, mask - rival
    validation: float | None = None  # the same on validation

    @property
    def verdict(self) -> tuple[str, str]:
        """(AHEAD, BEHIND or UNDECIDED, why neither is claimed)."""
        assert self.difference is not None
        shown, why = side(self.difference, self.validation)
        return {-1: AHEAD, 0: UNDECIDED, 1: BEHIND}[shown], why


def at_equal_bytes(findings: Findings, tables: Mapping[str, DomainTable]) -> list[AtEqualBytes]:
    """One a domain and trained mask, in their order; none at all where no mask has a rival."""
    found: list[AtEqualBytes] = []
    pairs: list[Paired] = []
    for domain, table in tables.items():
        for row in table.rows:
            if not findings.study.arms[row.arm].is_mft or row.bytes is None:
                continue
            rivals = list(_rivals(findings, domain, table, row))
            best = max(rivals, key=lambda each: each[1], default=None)
            one = AtEqualBytes(domain, row.arm, row.bytes, len(rivals))
            if best is not None:
                rival, validation, pair = best
                one = dataclasses.replace(one, rival=rival.arm, rival_bytes=rival.bytes, validation=validation)
                pairs.append(pair)
            found.append(one)
    family = iter(with_holm(differences(pairs)))
    found = [one if one.rival is None else dataclasses.replace(one, difference=next(family)) for one in found]
    return found if pairs else []


def said_of_bytes(found: Sequence[AtEqualBytes]) -> list[str]:
    """One paragraph a domain, a sentence a mask."""
    domains = dict.fromkeys(one.domain for one in found)
    return [
        f"{domain}, at equal bytes. {' '.join(_sentence(one) for one in found if one.domain == domain)}"
        for domain in domains
    ]


def remark_on_bytes(found: Sequence[AtEqualBytes]) -> list[str]:
    """How the comparisons were made, if there are any."""
    count = sum(one.rival is not None for one in found)
    return [
        "At equal bytes: what an arm must keep beside the model that it began at, numbers in 16 bits, masks and "
        "positions entropy-coded, means over seeds; the rival is that with the least validation loss of all arms from "
        f"the same start that are no masks and take no more; Holm's correction runs over these {count} comparisons."
    ] * (count > 0)


def bytes_values(found: Sequence[AtEqualBytes]) -> list[dict[str, Any]]:
    """For table.json; NaN becomes None."""
    return finite(
        [dataclasses.asdict(one) | {"verdict": None if one.rival is None else one.verdict[0]} for one in found]
    )


def _rivals(findings: Findings, domain: str, table: DomainTable, mask: Row) -> Iterator[tuple[Row, float, Paired]]:
    """(rival, mask - rival on validation, the pair on test) where both were tested in some seed."""
    test, validation = findings.test[domain], findings.validation.get(domain, {})
    for row in table.rows:
        if row.start != mask.start or _is_of_a_mask(findings.study, row.arm):
            continue
        if row.bytes is None or mask.bytes is None or row.bytes > mask.bytes:
            continue
        pair, before = (paired(split.get(mask.arm, {}), split.get(row.arm, {})) for split in (test, validation))
        if pair is not None and before is not None:
            yield row, before.estimate, pair


def _is_of_a_mask(study: StudyConfig, arm: str) -> bool:
    """Whether an arm is a mask, trained or not, or made of one."""
    config = study.arms[arm]
    return config.is_mask or (config.of is not None and _is_of_a_mask(study, config.of))


def _sentence(one: AtEqualBytes) -> str:
    mask = f"{one.mask} ({one.bytes:,.0f} bytes)"
    if one.rival is None or one.difference is None or one.validation is None:
        return f"{mask} has no rival that stores so little."
    verdict, why = one.verdict
    words = {AHEAD: "is ahead of", BEHIND: "is behind", UNDECIDED: "is neither shown ahead of nor behind"}[verdict]
    best = f"the best on validation of {one.rivals} that store no more" if one.rivals > 1 else "the only one"
    return (
        f"{mask} {words} {one.rival} ({one.rival_bytes:,.0f} bytes, {best}){f' ({why})' if why else ''}: "
        f"{shown_interval(one.difference)} nats a token, Holm-adjusted p {shown_p(one.difference)}; "
        f"on validation {one.validation:+.4f}."
    )
