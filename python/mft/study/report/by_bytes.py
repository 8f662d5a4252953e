"""Test loss against the bytes that an arm must keep beside the full fine-tune, drawn from a study's table.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mft.files.figure import new_figure, save_figure
from mft.study.config import AVERAGE, BITDELTA, CONTINUED, CONTROL, INTERPOLATED, LORA, MASK, SPARSE_DELTA, TERNARY

_COLOURS = {
    **{MASK: "#c1121f", CONTROL: "#e69f00", CONTINUED: "#56b4e9", LORA: "#0072b2"},
    **{BITDELTA: "#009e73", TERNARY: "#7a5195", SPARSE_DELTA: "#8c564b"},
}
_OTHER = "0.5"
_APART = (INTERPOLATED, AVERAGE)  # kinds whose arms are made of different ones: no line joins them
_REACH = 1.6  # a panel ends so many times as far above its lowest interval as most arms lie; arrows are farther


@dataclass(frozen=True)
class Point:
    """An arm on test: its bytes, and its loss less the full fine-tune's."""

    arm: str
    kind: str
    bytes: float
    low: float
    estimate: float
    high: float


def plot_bytes(numbers: Mapping[str, Any], path: Path) -> None:
    """A panel a domain: arms that began at the full fine-tune, those of a kind joined, and the frontier of all.

    numbers: of table.json. Raises: ValueError if no domain has such an arm whose bytes are known.
    """
    panels = {domain: found for domain, table in numbers["domains"].items() if (found := points(table))}
    if not panels:
        raise ValueError(
            "a plot by bytes must have a domain with arms that began at the full fine-tune and whose bytes are known, "
            "got none: run mft compare again if its table.json is older than that"
        )
    figure = new_figure(max(7.5, 6.5 * len(panels)), 5.2)
    for axes, (domain, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        _draw(axes, found)
        axes.set_title(f"{domain}, test: loss - {numbers['domains'][domain]['full']}", loc="left")
        axes.set_xlabel("bytes beside the full fine-tune")
        axes.set_ylabel("nats a token, 95 % interval")
    save_figure(figure, path, dpi=100)


def points(table: Mapping[str, Any]) -> list[Point]:
    """Of the arms that store something beside the full fine-tune, by bytes."""
    found = []
    for row in table["rows"]:
        difference = row["minus_full"]
        if difference is None or not row.get("bytes") or row.get("start") != table["full"]:
            continue
        estimate = difference["estimate"]
        low, high = (estimate if difference[end] is None else difference[end] for end in ("low", "high"))
        found.append(Point(row["arm"], row["kind"], row["bytes"], low, estimate, high))
    return sorted(found, key=lambda point: (point.bytes, point.estimate))


def frontier(found: Sequence[Point]) -> list[Point]:
    """Those that no arm of as few bytes reaches, nor the full fine-tune, which needs none."""
    best, kept = 0.0, []
    for point in found:
        if point.estimate < best:
            best = point.estimate
            kept.append(point)
    return kept


def _draw(axes, found: Sequence[Point]) -> None:
    floor = min(0.0, *(point.low for point in found))
    reach = max(-floor, median(point.estimate for point in found) - floor, 1e-4)
    top = min(max(0.0, *(point.high for point in found)), floor + _REACH * reach)
    axes.axhline(0, color="0.25", linestyle="--", linewidth=1)
    for kind in dict.fromkeys(point.kind for point in found):
        colour, of_kind = _COLOURS.get(kind, _OTHER), [point for point in found if point.kind == kind]
        for point in of_kind:
            _draw_point(axes, point, colour, top)
        if len(of_kind) > 1 and kind not in _APART:
            ends = [min(point.estimate, top) for point in of_kind]
            axes.plot([point.bytes for point in of_kind], ends, "-", color=colour, linewidth=1, alpha=0.6)
        axes.plot([], [], "o", color=colour, label=kind.replace("_", " "))
    left, right = found[0].bytes / 2, found[-1].bytes * 4
    if best := frontier(found):
        steps = [(left, 0.0), *((point.bytes, point.estimate) for point in best), (right, best[-1].estimate)]
        axes.step(*zip(*steps), where="post", color="0.6", linewidth=3, alpha=0.5, zorder=0, label="frontier")
    margin = 0.06 * (top - floor)
    axes.set_ylim(floor - margin, top + margin)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_point(axes, point: Point, colour: str, top: float) -> None:
    place = min(point.estimate, top)
    if place < point.estimate:
        axes.plot(point.bytes, top, "^", color=colour, markersize=7, clip_on=False)
    else:
        axes.plot([point.bytes] * 2, [point.low, point.high], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(point.bytes, point.estimate, "o", color=colour, markersize=6)
    label = point.arm if place == point.estimate else f"{point.arm} {point.estimate:+.3f}"
    axes.annotate(
        label, (point.bytes, place), xytext=(6, 4), textcoords="offset points", fontsize="x-small", color=colour
    )
