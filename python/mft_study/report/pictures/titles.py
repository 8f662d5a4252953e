"""Titles that say what a study's picture shows, from the numbers that it is drawn from."""

from collections.abc import Mapping, Sequence
from typing import Any

from mft_study.arms.kinds import KINDS
from mft_study.arms.means import Between

Row = Mapping[str, Any]
_SHOWN = 0.05  # a difference is shown if its p is below this
_LARGER = 1.05  # an arm stores no more than a mask if its bytes are below this multiple


def lowest_loss(domain: str, table: Mapping[str, Any], reference: str) -> str:
    """Say which arm has the lowest test loss, or that no arm is below reference."""
    arm, difference = min(
        ((row["arm"], row["minus_full"]["estimate"]) for row in table["rows"] if row["minus_full"] is not None),
        key=lambda found: found[1],
        default=(reference, 0.0),
    )
    if difference >= 0:
        return f"{domain}: no arm has a lower test loss than {reference}"
    return f"{domain}: {arm} has the lowest test loss"


def masks_beside_control(domain: str, table: Mapping[str, Any]) -> str:
    """Say which masks have a lower test loss than their control, after Holm's correction."""
    found = [(row["arm"], row["minus_control"].get("loss")) for row in table["rows"] if row["masked"]]
    ahead = [arm for arm, less in found if less and less["estimate"] < 0 and (less["p_holm"] or less["p"]) < _SHOWN]
    return f"{domain}: {', '.join(ahead) or 'no mask'} {'are' if len(ahead) > 1 else 'is'} ahead of the control"


def rates(domain: str, tried: Mapping[str, set[float]], chosen: Mapping[str, float]) -> str:
    """Say which arms were best at an end of their grid, so that a rate outside it may be better."""
    ends = {arm: (min(rates), max(rates)) for arm, rates in tried.items() if len(rates) > 1}
    at_end = [arm for arm, rate in chosen.items() if rate in ends.get(arm, ())]
    if not at_end:
        return f"{domain}: the best rate of each arm lies inside its grid"
    return f"{domain}: {', '.join(at_end) if len(at_end) < 3 else f'{len(at_end)} arms'} best at an end of the grid"


def equal_bytes_title(domain: str, found: Sequence[Any]) -> str:
    """Say how the best arm of no more bytes compares with the best mask. found: arms with kind, bytes and estimate."""
    masks = [point for point in found if KINDS[point.kind].is_mft]
    if not masks:
        return f"{domain}: test loss by bytes"
    mask = min(masks, key=lambda point: point.estimate)
    others = [p for p in found if not (KINDS[p.kind].is_mft or issubclass(KINDS[p.kind], Between))]
    rivals = [p for p in others if p.bytes <= _LARGER * mask.bytes]
    best = min(rivals, key=lambda point: point.estimate, default=None)
    if best is None:
        return f"{domain}: nothing else is as small as {mask.arm}"
    difference = best.estimate - mask.estimate
    beside = f"{abs(difference):.3f} {'lower' if difference < 0 else 'higher'} than"
    return f"{domain}: {best.arm} is {beside if abs(difference) >= 5e-4 else 'level with'} {mask.arm}\nin no more bytes"


def gains_and_forgets(domain: str, found: Sequence[Any]) -> str:
    """Say which trained arm gains most, and which forgets least."""
    trained = [point for point in found if KINDS[point.kind].near]
    if not trained:
        return f"{domain}: gain and forgetting"
    most = min(trained, key=lambda point: point.gained[1]).arm
    least = min(trained, key=lambda point: point.forgotten[1]).arm
    if most == least:
        return f"{domain}: {most} gains most and forgets least"
    return f"{domain}: {most} gains most,\n{least} forgets least"
