"""What a difference shows: that an arm is better, that it is not worse, that two are level, or nothing at all.

    better      the 95 % interval lies below 0, p stays below 0.05 after Holm's correction over its family, and
                validation's difference has the same sign
    not worse   the 95 % interval, uncorrected, reaches down to 0 and stays below MARGIN
    level       the 95 % interval, uncorrected, lies between -MARGIN and MARGIN

Holm's correction makes it harder to show a difference. It must not touch "not worse" and "level": there it would make
the claim easier, the more arms are compared. With too few documents or seeds none of the three is shown.
"""

import math
from collections.abc import Mapping

from mft_study.config import LEAST_RATES
from mft_study.evidence.power import lacking
from mft_study.report.statistics import LEVEL, Difference

MARGIN = (
    0.01  # nats per token (1 % of the perplexity), or wrong answers per question: smaller differences do not matter
)


def side(difference: Difference, validation: float | None) -> tuple[int, str]:
    """Return where a difference is shown to lie: (-1, "") below 0, (1, "") above; else (0, why neither is shown)."""
    if few := shortage(difference):
        return 0, few
    if difference.low <= 0 <= difference.high:
        return 0, "the interval includes 0"
    if difference.p_holm is None or difference.p_holm >= LEVEL:
        return 0, "not after Holm's correction"
    if validation is None:
        return 0, "there is no validation difference to agree"
    if validation * difference.estimate <= 0:
        return 0, "validation disagrees"
    return (-1 if difference.estimate < 0 else 1), ""


def is_not(difference: Difference, what: int) -> bool:
    """Return whether a difference is shown not to lie above 0 (what = 1, not worse), or below it (-1, not better)."""
    if shortage(difference):
        return False
    near, far = (difference.low, difference.high) if what > 0 else (-difference.high, -difference.low)
    return near <= 0 and far < MARGIN


def is_level(difference: Difference) -> bool:
    """Return whether a difference is shown to be smaller than MARGIN."""
    return not shortage(difference) and difference.low > -MARGIN and difference.high < MARGIN


def shortage(difference: Difference) -> str:
    """Return which documents and seeds are missing for any conclusion; "" if none are."""
    return lacking(difference.documents, difference.seeds)


def few_rates(tried: Mapping[str, int | None]) -> str:
    """Return which arms tried too few rates for a fair choice; "" if none did. tried: None for an arm without rates."""
    few = [f"{arm} tried {n} rate{'s' * (n > 1)}" for arm, n in tried.items() if n is not None and n < LEAST_RATES]
    return f"{' and '.join(few)}, at least {LEAST_RATES} are needed" if few else ""


def too_wide(difference: Difference) -> str:
    """Return why an interval is too wide to tell a difference of MARGIN from none; "" if it is not."""
    half = (difference.high - difference.low) / 2
    if half <= MARGIN:
        return ""
    times = math.ceil((half / MARGIN) ** 2)  # of both seeds and documents
    return (
        f"the interval is ±{half:.4f}, too wide to tell a difference of {MARGIN:g} from none: about {times} times as "
        "many test documents and seeds are needed"
    )
