"""Who gains more, and who forgets less: each MFT arm against each rival, by the loss on the domain and on another text.

If arms learned by rewards, wrong answers replace the loss on the domain.

An arm dominates a rival if one of its losses is shown to be lower and the other is shown not to be higher. If the
other may be either, it is better by one. judge.py says what shown means: Holm's correction applies to "lower" only.
Rivals are the tuned arms that are not masks. The correction runs over one family: all differences of every MFT arm from
every rival, in both losses, over all domains and texts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from mft_study.arms.means import Average
from mft_study.config import StudyConfig
from mft_study.outcome import Findings
from mft_study.report.general import Runs, tested_runs, validation_difference, validation_runs
from mft_study.report.judge import few_rates, is_level, is_not, shortage, side
from mft_study.report.statistics import (
    DRAWS,
    Difference,
    Paired,
    adjust_holm,
    deciding_metric,
    differences,
    paired,
)

DOMINATES, DOMINATED, TRADE_OFF, LEVEL_WITH = "dominates", "dominated", "trade-off", "level"
BETTER_BY_ONE, WORSE_BY_ONE, UNDECIDED = "better by one", "worse by one", "undecided"
_Claim = tuple[str, str, str, str | None]  # domain, MFT arm, rival, text; None: by the loss on the domain
_DRAWS_EACH = 200  # per difference of a family: if all draws lie on one side, p times the family's size is 0.01


@dataclass(frozen=True)
class OnLoss:
    """The difference MFT arm - rival in one loss: on test, adjusted for the family, and on validation."""

    difference: Difference
    validation: float | None
    side: int  # -1: the MFT arm is shown to be better, 1: worse, 0: neither


@dataclass(frozen=True)
class Comparison:
    """An MFT arm against a rival, by the loss on the domain and the loss on a text."""

    arm: str
    rival: str
    text: str
    domain: OnLoss
    general: OnLoss
    verdict: str  # of the arm, see verdict()
    lacks: str = ""  # why it is UNDECIDED whatever the losses


def is_mft(study: StudyConfig, arm: str) -> bool:
    """Return whether an arm is MFT or made of its runs."""
    config = study.arms[arm]
    return (config if config.of is None else study.arms[config.of]).is_mft


def rivals_of(study: StudyConfig, arm: str) -> list[str]:
    """Return the tuned arms that are not masks: over codes like the arm, and averages of as many runs."""
    config, over_codes = study.arms[arm], study.codes_under(arm) is not None
    rivals = [
        name
        for name, other in study.arms.items()
        if other.tuned
        and not is_mft(study, name)
        and (over_codes == (other.quantization is not None or study.codes_under(name) is not None))
    ]
    if not isinstance(config, Average):
        return rivals
    averages = {name for name, other in study.arms.items() if isinstance(other, Average) and other.runs == config.runs}
    return [name for name in rivals if name in averages]


def comparisons(findings: Findings) -> dict[str, list[Comparison]]:
    """Return the comparisons by domain, text by text, of arms that were tested with the same seeds."""
    pairs: dict[_Claim, Paired] = {}
    metric, general_of = deciding_metric(findings.study), findings.study.general_of
    for domain, arm, rival in _matches(findings):
        own = paired(findings.test[domain][arm], findings.test[domain].get(rival, {}), metric)
        texts = {text: _pair_on_text(tested_runs, findings, domain, arm, rival, text) for text in general_of(domain)}
        others: dict[_Claim, Paired] = {
            (domain, arm, rival, text): pair for text, pair in texts.items() if pair is not None
        }
        if own is not None and others:
            pairs[domain, arm, rival, None] = own
            pairs.update(others)
    family = adjust_holm(differences(list(pairs.values()), draws=draws_of(len(pairs))))
    found = {}
    for claim, difference in zip(pairs, family, strict=True):
        validation = _validation_estimate(findings, *claim)
        found[claim] = OnLoss(difference, validation, side(difference, validation)[0])
    compared: dict[str, list[Comparison]] = {domain: [] for domain in findings.test}
    for (domain, arm, rival, text), general in found.items():
        if text is not None:
            own_loss = found[domain, arm, rival, None]
            rates = {name: findings.rates(domain, name) for name in (arm, rival)}
            compared[domain].append(make_comparison(rates, text, own_loss, general))
    for domain, listed in compared.items():
        listed.sort(key=lambda one: general_of(domain).index(one.text))  # stable
    return compared


def make_comparison(rates: Mapping[str, int | None], text: str, domain: OnLoss, general: OnLoss) -> Comparison:
    """Return the comparison of an arm with a rival. rates: how many rates each tried, arm first; None: it has none."""
    arm, rival = rates
    lacks = few_rates(rates) or shortage(domain.difference) or shortage(general.difference)
    return Comparison(arm, rival, text, domain, general, UNDECIDED if lacks else verdict(domain, general), lacks)


def draws_of(family: int) -> int:
    """Return how many draws a family of this size needs, so that its smallest p can pass Holm's correction."""
    return max(DRAWS, _DRAWS_EACH * family)


def family_size(compared: Iterable[list[Comparison]]) -> int:
    """Return the number of differences in these: one per pair of arms on each domain, one more on each text."""
    return sum(len({(one.arm, one.rival) for one in listed}) + len(listed) for listed in compared)


def verdict(*losses: OnLoss) -> str:
    """Return the verdict on an arm, from both of its differences.

    BETTER_BY_ONE: the other difference may be either; DOMINATES: it is shown not to be worse; TRADE_OFF: it is worse.
    """
    sides = {loss.side for loss in losses}
    if {-1, 1} <= sides:
        return TRADE_OFF
    for shown, by_both, by_one in ((-1, DOMINATES, BETTER_BY_ONE), (1, DOMINATED, WORSE_BY_ONE)):
        if shown in sides:
            whole = all(loss.side == shown or is_not(loss.difference, -shown) for loss in losses)
            return by_both if whole else by_one
    return LEVEL_WITH if all(is_level(loss.difference) for loss in losses) else UNDECIDED


def _matches(findings: Findings) -> Iterator[tuple[str, str, str]]:
    """Yield (domain, MFT arm, rival)."""
    study = findings.study
    for domain, tested in findings.test.items():
        for arm in study.arms:
            if is_mft(study, arm) and tested.get(arm):
                yield from ((domain, arm, rival) for rival in rivals_of(study, arm))


def _pair_on_text(
    split: Callable[..., Runs], findings: Findings, domain: str, arm: str, rival: str, text: str
) -> Paired | None:
    """Pair an arm with a rival on a text. split: tested_runs or validation_runs."""
    return paired(split(findings, domain, arm, text), split(findings, domain, rival, text))


def _validation_estimate(findings: Findings, domain: str, arm: str, rival: str, text: str | None) -> float | None:
    if text is None:
        return validation_difference(findings, domain, arm, rival)
    pair = _pair_on_text(validation_runs, findings, domain, arm, rival, text)
    return None if pair is None else pair.estimate
