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
_LABELLED_BELOW = (SPARSE_DELTA, CONTROL)  # which lie close to ternary and bitdelta
_APART = (INTERPOLATED, AVERAGE)  # kinds whose arms are made of different ones: no line joins them
_FEW = 64  # bytes: what stores fewer, such as a temperature, lies on the left edge and does not widen the axis
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
    kinds = list(dict.fromkeys(point.kind for found in panels.values() for point in found))
    figure = new_figure(1.5 + 6 * len(panels), 5.2)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (domain, found) in zip(row, panels.items()):
        _draw(axes, found)
        axes.set_title(f"{domain}, test: loss - {numbers['domains'][domain]['full']}", loc="left")
        axes.set_xlabel("bytes beside the full fine-tune")
        axes.set_ylabel("nats a token, 95 % interval")
    for kind in kinds:
        row[-1].plot([], [], "o", color=_COLOURS.get(kind, _OTHER), label=kind.replace("_", " "))
    row[-1].plot([], [], "-", color="0.6", linewidth=3, alpha=0.5, label="frontier")
    row[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
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
    left = min((point.bytes for point in found if point.bytes >= _FEW), default=found[-1].bytes) / 3
    right = found[-1].bytes * 4
    axes.axhline(0, color="0.25", linestyle="--", linewidth=1)
    for kind in dict.fromkeys(point.kind for point in found):
        colour, of_kind = _COLOURS.get(kind, _OTHER), [point for point in found if point.kind == kind]
        lowest = min(of_kind, key=lambda point: point.estimate)
        for point in of_kind:  # the others of a line are known by its colour: names of all would lie on each other
            named = kind in _APART or point is lowest or point.bytes < left or point.estimate > top
            _draw_point(axes, point, colour, left, top, named=named)
        if len(of_kind) > 1 and kind not in _APART:
            ends = [min(point.estimate, top) for point in of_kind]
            axes.plot([max(point.bytes, left) for point in of_kind], ends, "-", color=colour, linewidth=1, alpha=0.6)
    if best := frontier(found):
        steps = [(left, 0.0), *((max(point.bytes, left), point.estimate) for point in best), (right, best[-1].estimate)]
        axes.step(*zip(*steps), where="post", color="0.6", linewidth=3, alpha=0.5, zorder=0)
    margin = 0.06 * (top - floor)
    axes.set_ylim(floor - margin, top + margin)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _draw_point(axes, point: Point, colour: str, left: float, top: float, *, named: bool) -> None:
    """left, top: the edges on which what lies beyond them is drawn."""
    x, y, label = max(point.bytes, left), min(point.estimate, top), point.arm
    if x > point.bytes:
        label += f" ({point.bytes:,.0f} bytes)"
    if y < point.estimate:
        label += f" {point.estimate:+.3f}"
        axes.plot(x, y, "^", color=colour, markersize=7, clip_on=False)
    else:
        axes.plot([x, x], [point.low, point.high], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(x, y, "o" if x == point.bytes else "<", color=colour, markersize=6, clip_on=False)
    if not named:
        return
    axes.annotate(
        label,
        (x, y),
        xytext=(6, -9 if point.kind in _LABELLED_BELOW else 4),
        textcoords="offset points",
        fontsize="x-small",
        color=colour,
    )
