"""What a reader of the verdicts must know: warnings, how differences were judged, what was tried."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mft_study.arms.full import Control
from mft_study.arms.means import Average
from mft_study.config import REWARDS, VARY_BASE, VARY_DATA
from mft_study.evidence.power import LEAST_DOCUMENTS
from mft_study.grid import OpenEnd
from mft_study.outcome import Findings
from mft_study.report.dominance import draws_of, family_size
from mft_study.report.judge import MARGIN
from mft_study.report.reward_curves import rewards_remark
from mft_study.report.statistics import CONFIDENCE, DRAWS, LEVEL, smallest_p
from mft_study.report.table import DomainTable

_VARIES = {VARY_BASE: "base model, trained from scratch", VARY_DATA: "documents to train on"}


def remarks(findings: Findings, tables: Mapping[str, DomainTable]) -> list[str]:
    """Return what a reader of the verdicts must know; warnings first."""
    return [*_warnings(findings, tables), *_method(findings, tables), *findings.notes]


def dominance_remark(family: int) -> str:
    """Return what the verdicts of dominance mean. family: the number of differences."""
    return (
        "An MFT arm dominates a rival if it is better by one of two losses, on the domain and on a text that no arm "
        "was trained for, and not worse by the other; it is dominated in the reverse case. Better by one and worse "
        "by the other is a trade-off; better (or worse) by one alone leaves the other open. Better and worse mean "
        f"that the interval excludes 0, p stays below 0.05 after Holm's correction over these {family} differences "
        f"({draws_of(family)} draws; between every MFT arm and every rival, by both losses, over all domains and "
        "texts), and validation has the same sign. Not worse means that the interval, uncorrected, reaches down to "
        f"0 and stays below {MARGIN:g} (nats per token, or wrong answers per question). Level means that both "
        f"intervals, uncorrected, lie within ±{MARGIN:g}; the rest is undecided. Rivals are the tuned arms that are "
        "not masks, including the full fine-tune; the rivals of an average of runs are averages of as many runs."
    )


def unsettled_remark(ends: Sequence[OpenEnd]) -> str:
    """Return which arms' best settings lie at an end of their grid, and with which overrides to go on."""
    arms: dict[str, list[str]] = {}
    remedies: dict[str, float] = {}
    for end in ends:
        words = f"{'largest' if end.above else 'smallest'} {end.what} {end.value:g}"
        arms.setdefault(f"{end.domain}, {end.arm}", []).append(words)
        for key, value in (remedy.split("=") for remedy in end.remedy.split()):
            remedies[key] = max(float(value), remedies.get(key, 0.0))
    overrides = " ".join(f"{key}={value:g}" for key, value in remedies.items())
    return (
        "Unsettled, the best setting lies at an end of its grid: "
        f"{'; '.join(arm + ': ' + ', '.join(words) for arm, words in arms.items())}. Run the same command with "
        f"{overrides} to go on."
    )


def p_remark(seeds: int) -> str:
    """Return how small a p this number of seeds can tell."""
    least = smallest_p(seeds)
    return (
        f"{'1 seed' if seeds == 1 else f'{seeds} seeds'} cannot tell a p below {least:g} from {least:g}. Holm's "
        f"correction over more than {LEVEL / least:.0f} differences asks for smaller ones: a claim that barely passes "
        "it is optimistic."
    )


# ---------------------------------------------------------------------------------------------- private


def _places(findings: Findings) -> Iterable[str]:
    """Yield a warning if units ran on different kinds of processor or with different packages."""
    places = [*(one.where for one in findings.outcomes), *(one.where for one in findings.tested)]
    hosts = [host for host in places if host is not None]
    kinds, versions = (
        Counter(host.kind for host in hosts),
        Counter(", ".join(f"{name} {version}" for name, version in host.versions.items()) for host in hosts),
    )
    for what, counts in (("kinds of processor", kinds), ("sets of packages", versions)):
        if len(counts) > 1:
            shares = "; ".join(f"{name}: {count}" for name, count in counts.most_common())
            yield (
                f"Warning: runs and tests were made on {len(counts)} {what} ({shares}), which round sums differently: "
                "a part of each difference between arms may come from that."
            )


def _warnings(findings: Findings, tables: Mapping[str, DomainTable]) -> Iterable[str]:
    study = findings.study
    if findings.open_ends:
        yield unsettled_remark(findings.open_ends)
    yield from _places(findings)
    if findings.test_openings > 1:
        yield (
            f"Warning: the test split was opened {findings.test_openings} times, each time with other arms or "
            "settings: the p-values are optimistic."
        )
    if len(findings.reserve_openings) > 1:
        studies = ", ".join(dict.fromkeys(findings.reserve_openings))
        yield (
            f"Warning: the reserve was opened {len(findings.reserve_openings)} times, by {studies}: what was learned "
            "there may have led to what is tested here."
        )
    for domain, table in tables.items():
        if table.documents < LEAST_DOCUMENTS:
            yield (
                f"Warning: {domain} has {table.documents} test documents, fewer than {LEAST_DOCUMENTS}: "
                "its intervals are rough, and nothing can be concluded."
            )
        if missing := [arm for arm in study.arms if table.row(arm) is None and arm not in table.without_result]:
            yield f"Warning: {domain} was not tested for {', '.join(missing)}."
        for row in table.rows:
            difference = row.minus_control.get(row.decides, row.minus_full)
            if difference is not None and difference.seeds < table.seeds:
                yield (
                    f"Warning: {domain}, {row.arm}: compared in {difference.seeds} of {table.seeds} seeds: those "
                    "that both it and its reference have."
                )


def _method(findings: Findings, tables: Mapping[str, DomainTable]) -> Iterable[str]:
    study, stage, seeds = findings.study, findings.study.stage, len(findings.study.seeds)
    yield (
        f"Test losses in nats per token, means of {seeds} {'seed' if seeds == 1 else 'seeds'}; differences are paired "
        f"by seed and document; {100 * CONFIDENCE:.0f} % intervals from {DRAWS} draws of seeds and documents at once, "
        "widened for how few there are; accuracy is that of the next token."
    )
    if study.first_of_kind(Control) is not None:
        claims = [
            row for table in tables.values() for row in table.rows if row.masked and row.decides in row.minus_control
        ]
        yield (
            f"p is two-sided against the control; Holm's correction runs over the {len(claims)} comparisons of MFT "
            "with it in all domains, and separately over those of the other arms, on which no verdict rests."
        )
    if family := family_size(table.comparisons for table in tables.values()):
        yield dominance_remark(family)
    yield p_remark(seeds)
    if study.vary:
        drawn = [_VARIES[what] for what in study.vary]
        yield f"Each seed has its own {' and its own '.join(drawn)}: intervals over seeds know of these too."
    if study.leaders is not None:
        limits = ", ".join(f"{most:,}" for most in study.leaders.max_bytes)
        yield (
            f"What led on validation ran with {study.leaders.seeds} seeds, as the headings say: the first "
            f"{study.leaders.arms} of the tuned arms that train no whole model"
            f"{f' within each of {limits} bytes' if limits else ''}, the best mask, and what they need. A difference "
            f"is of the seeds that both arms have; {study.leaders.seeds} seeds cannot tell a p below "
            f"{smallest_p(study.leaders.seeds):g}."
        )
    for domain, table in tables.items():
        tried = [f"{row.arm} {row.tried}" for row in table.rows if not isinstance(study.arms[row.arm], Average)]
        total = sum(row.tried for row in table.rows)
        means = [name for name, arm in study.arms.items() if arm.of is not None]  # part 0 of these is not a run
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
            f"Budget of every trained arm after the fine-tune: {stage.batch_size * stage.accumulation} rows per "
            f"step, {stage.schedule} schedule, as many epochs as validation chose from its grid; the best of "
            f"{study.checkpoints} checkpoints on validation is kept."
        )
    if findings.reserve_openings:
        yield "Test is the reserve, documents that no study before its first opening has read."
    elif findings.test_openings == 1:
        yield "The test split was opened once, after every choice."
