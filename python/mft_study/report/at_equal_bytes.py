"""Compare each trained mask with the best other arms that store as few bytes besides the same start.

The rivals are all arms from the mask's start that are not masks. The mask is compared with the best rival that stores
no more bytes than it does, and with the best rival that stores about as many. Validation decides which is best. The
difference is in test loss, paired by seed and document as in the tables. Holm's correction runs over these comparisons
in all domains. A mask is ahead or behind by the rules of judge.py; otherwise it is undecided.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mft.files.json_file import finite
from mft_study.config import StudyConfig
from mft_study.outcome import Findings
from mft_study.report.judge import side
from mft_study.report.statistics import Difference, Paired, adjust_holm, differences, paired
from mft_study.report.table import DomainTable, Row
from mft_study.report.verdict import shown_interval, shown_p

AHEAD, BEHIND, UNDECIDED = "ahead", "behind", "undecided"
NO_MORE, ABOUT = "no more", "about as much"
NEAR = 1.25  # about as many bytes: within this factor, which is a rank of LoRA more or less from rank 4 on


@dataclass(frozen=True)
class AtEqualBytes:
    """A mask and its best rival. rival is None if no arm that stores so little was tested with the same seeds."""

    domain: str
    mask: str
    bytes: float
    rivals: int  # how many validation chose from
    rival: str | None = None
    rival_bytes: float | None = None
    difference: Difference | None = None  # test loss, mask - rival
    validation: float | None = None  # the same on validation
    stores: str = NO_MORE  # what rivals may store: NO_MORE than the mask, or ABOUT as much

    @property
    def verdict(self) -> tuple[str, str]:
        """(AHEAD, BEHIND or UNDECIDED, why neither is claimed)."""
        assert self.difference is not None
        shown, why = side(self.difference, self.validation)
        return {-1: AHEAD, 0: UNDECIDED, 1: BEHIND}[shown], why


class _Rival(NamedTuple):
    row: Row
    validation: float  # mask - rival
    pair: Paired  # the same on test


def compare_at_equal_bytes(findings: Findings, tables: Mapping[str, DomainTable]) -> list[AtEqualBytes]:
    """Return two comparisons per domain and trained mask, or one if both rivals are the same arm; [] without rivals."""
    found: list[AtEqualBytes] = []
    pairs: list[Paired] = []
    for domain, table in tables.items():
        for row in table.rows:
            if not findings.study.arms[row.arm].is_mft or row.bytes is None:
                continue
            rivals = list(_rivals(findings, domain, table, row))
            met: list[str | None] = []
            for stores in (NO_MORE, ABOUT):
                allowed = [each for each in rivals if _may_store(stores, each.row, row)]
                best = max(allowed, key=lambda each: each.validation, default=None)
                if (best and best.row.arm) in met:
                    continue
                one = AtEqualBytes(domain, row.arm, row.bytes, len(allowed), stores=stores)
                if best is not None:
                    rival, validation, pair = best
                    one = dataclasses.replace(one, rival=rival.arm, rival_bytes=rival.bytes, validation=validation)
                    pairs.append(pair)
                met.append(one.rival)
                found.append(one)
    family = iter(adjust_holm(differences(pairs)))
    found = [one if one.rival is None else dataclasses.replace(one, difference=next(family)) for one in found]
    return found if pairs else []


def byte_verdicts(found: Sequence[AtEqualBytes]) -> list[str]:
    """Return one paragraph per domain, with a sentence per mask and rival."""
    domains = dict.fromkeys(one.domain for one in found)
    return [
        f"{domain}, at equal bytes. {' '.join(_sentence(one) for one in found if one.domain == domain)}"
        for domain in domains
    ]


def remark_on_bytes(found: Sequence[AtEqualBytes]) -> list[str]:
    """Return how the comparisons were made, if there are any."""
    count = sum(one.rival is not None for one in found)
    about = (
        f"; and among those that store about as much, within a factor of {NEAR:g}, if that is another arm"
        if any(one.stores == ABOUT for one in found)
        else ""
    )
    return [
        "At equal bytes: what an arm must store in addition to the model that it began at, numbers in 16 bits, "
        "masks and positions entropy-coded, means over seeds; the rival is the arm with the lowest validation loss "
        f"among all arms from the same start that are not masks and store no more{about}; Holm's correction runs "
        f"over these {count} comparisons."
    ] * (count > 0)


def bytes_values(found: Sequence[AtEqualBytes]) -> list[dict[str, Any]]:
    """Return the values for table.json; NaN becomes None."""
    return finite(
        [dataclasses.asdict(one) | {"verdict": None if one.rival is None else one.verdict[0]} for one in found]
    )


def _may_store(stores: str, rival: Row, mask: Row) -> bool:
    assert rival.bytes is not None
    assert mask.bytes is not None
    if stores == NO_MORE:
        return rival.bytes <= mask.bytes
    return mask.bytes / NEAR <= rival.bytes <= mask.bytes * NEAR


def _rivals(findings: Findings, domain: str, table: DomainTable, mask: Row) -> Iterator[_Rival]:
    """Yield every rival of a mask, of any size, that was tested with one of its seeds."""
    test, validation = findings.test[domain], findings.validation.get(domain, {})
    for row in table.rows:
        if row.start != mask.start or row.bytes is None or _is_of_a_mask(findings.study, row.arm):
            continue
        pair, before = (paired(split.get(mask.arm, {}), split.get(row.arm, {})) for split in (test, validation))
        if pair is not None and before is not None:
            yield _Rival(row, before.estimate, pair)


def _is_of_a_mask(study: StudyConfig, arm: str) -> bool:
    """Return whether an arm is a mask, trained or not, or made of one."""
    config = study.arms[arm]
    return config.is_mask or (config.of is not None and _is_of_a_mask(study, config.of))


def _sentence(one: AtEqualBytes) -> str:
    mask = f"{one.mask} ({one.bytes:,.0f} bytes)"
    if one.rival is None or one.rival_bytes is None or one.difference is None or one.validation is None:
        return f"{mask} has no rival that stores {'so little' if one.stores == NO_MORE else one.stores}."
    verdict, why = one.verdict
    words = {AHEAD: "is ahead of", BEHIND: "is behind", UNDECIDED: "is neither shown ahead of nor behind"}[verdict]
    share = f"{one.rival_bytes:,.0f} bytes, {100 * one.rival_bytes / one.bytes:.0f} % of its own"
    store = "store no more" if one.stores == NO_MORE else "store about as much"
    best = f"the best on validation of {one.rivals} that {store}" if one.rivals > 1 else f"the only one to {store}"
    return (
        f"{mask} {words} {one.rival} ({share}, {best}){f' ({why})' if why else ''}: "
        f"{shown_interval(one.difference)} nats per token, Holm-adjusted p {shown_p(one.difference)}; "
        f"on validation {one.validation:+.4f}."
    )
