"""Plot test loss against the bytes that an arm must store besides its start, from a study's table.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mft.files.figure import new_figure, save_figure
from mft_study.arms.kinds import KINDS
from mft_study.report.pictures import titles
from mft_study.report.pictures.labels import Label, place_labels
from mft_study.report.pictures.plots import ends_of

_FEW = 64  # bytes: an arm that stores fewer, such as a temperature, lies on the left edge and does not widen the axis
_REACH = 1.6  # a panel's height, in multiples of how far most arms lie above the lowest interval; arrows are farther


@dataclass(frozen=True)
class Point:
    """An arm on test: its bytes, and its loss minus the full fine-tune's."""

    arm: str
    kind: str
    bytes: float
    low: float
    estimate: float
    high: float
    teacher: str | None = None  # the arm that taught it; None: it learned from the text


def plot_bytes(numbers: Mapping[str, Any], path: Path) -> None:
    """Plot a row per domain, and a panel per arm at which a mask started, or else for the full fine-tune.

    A line joins the arms of a kind, or those that another arm taught. numbers: of a table.json.
    Raises: ValueError if no domain has such an arm whose bytes are known.
    """
    rows = {domain: of for domain, table in numbers["domains"].items() if (of := _panels(table))}
    if not rows:
        raise ValueError(
            "a plot by bytes must have a domain with arms that began at the full fine-tune and whose bytes are known, "
            "got none: run mft compare again if its table.json is older than that"
        )
    kinds = list(dict.fromkeys(p.kind for panels in rows.values() for found in panels.values() for p in found))
    across = max(map(len, rows.values()))
    figure = new_figure(1.5 + 6 * across, 5.2 * len(rows))
    grid = figure.subplots(len(rows), across, squeeze=False)
    labels: list[tuple[Any, list[Label]]] = []
    for line, (domain, panels) in zip(grid, rows.items()):
        table = numbers["domains"][domain]
        for axes, (start, found) in zip(line, panels.items()):
            labels.append((axes, _draw(axes, found, _level(table, start))))
            axes.set_title(titles.equal_bytes_title(domain, found), loc="left", fontsize="medium")
            axes.set_xlabel(f"bytes to store, {'the full fine-tune' if start == table['full'] else start} not counted")
            axes.set_ylabel(f"test loss - loss of {table['full']}\nnats per token with 95 % interval (lower is better)")
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    last = grid[0][-1]
    for kind in kinds:
        last.plot([], [], "o", color=KINDS[kind].colour, label=kind.replace("_", " "))
    last.plot([], [], "-", color="0.6", linewidth=3, alpha=0.5, label="frontier")
    last.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.draw_without_rendering()  # gives the axes their places
    for axes, written in labels:
        place_labels(axes, written)
    save_figure(figure, path, dpi=100)


def points(table: Mapping[str, Any], start: str) -> list[Point]:
    """Return the points of arms that started at ``start`` and store something besides it, sorted by bytes."""
    found = []
    for row in table["rows"]:
        difference = row["minus_full"]
        if difference is None or not row.get("bytes") or row.get("start") != start:
            continue
        low, high = ends_of(difference)
        estimate = difference["estimate"]
        found.append(Point(row["arm"], row["kind"], row["bytes"], low, estimate, high, row.get("teacher")))
    return sorted(found, key=lambda point: (point.bytes, point.estimate))


def frontier(found: Sequence[Point], level: float = 0.0) -> list[Point]:
    """Return the points below every arm with as few bytes, and below level: their start, which needs no bytes."""
    best, kept = level, []
    for point in found:
        if point.estimate < best:
            best = point.estimate
            kept.append(point)
    return kept


def _panels(table: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Return the points to draw, by the arm at which they started."""
    starts = dict.fromkeys([table["full"], *(row["start"] for row in table["rows"] if row.get("start"))])
    found = {start: of for start in starts if (of := points(table, start))}
    masked = {start: of for start, of in found.items() if any(KINDS[point.kind].is_mft for point in of)}
    return masked or {start: of for start, of in found.items() if start == table["full"]}


def _level(table: Mapping[str, Any], start: str) -> float:
    """Return the loss of a start minus the full fine-tune's."""
    (row,) = (row for row in table["rows"] if row["arm"] == start)
    return 0.0 if row["minus_full"] is None else row["minus_full"]["estimate"]


def _draw(axes, found: Sequence[Point], level: float) -> list[Label]:
    """Draw a panel. Returns: its labels, to be placed when the figure has its layout."""
    floor = min(level, *(point.low for point in found))
    reach = max(level - floor, median(point.estimate for point in found) - floor, 1e-4)
    top = min(max(level, *(point.high for point in found)), floor + _REACH * reach)
    left = min((point.bytes for point in found if point.bytes >= _FEW), default=found[-1].bytes) / 3
    right = found[-1].bytes * 4
    axes.axhline(level, color="0.25", linestyle="--", linewidth=1)
    labels: list[Label] = []
    for kind, teacher in dict.fromkeys((point.kind, point.teacher) for point in found):
        colour, joined = KINDS[kind].colour, KINDS[kind].joined
        of_kind = [point for point in found if (point.kind, point.teacher) == (kind, teacher)]
        lowest = min(of_kind, key=lambda point: point.estimate)
        for point in of_kind:  # a line's colour names its other arms: all names would overlap
            named = not joined or point is lowest or point.bytes < left or point.estimate > top
            labels += _draw_point(axes, point, colour, left, top)[: int(named)]
        if len(of_kind) > 1 and joined:
            ends = [min(point.estimate, top) for point in of_kind]
            axes.plot([max(point.bytes, left) for point in of_kind], ends, "-", color=colour, linewidth=1, alpha=0.6)
    if best := frontier(found, level):
        steps = [
            (left, level),
            *((max(point.bytes, left), point.estimate) for point in best),
            (right, best[-1].estimate),
        ]
        axes.step(*zip(*steps), where="post", color="0.6", linewidth=3, alpha=0.5, zorder=0)
    margin = 0.06 * (top - floor)
    axes.set_ylim(floor - margin, top + margin)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return labels


def _draw_point(axes, point: Point, colour: str, left: float, top: float) -> list[Label]:
    """Draw a point, on the left or top edge if it lies beyond. Returns: its label."""
    x, y, label = max(point.bytes, left), min(point.estimate, top), point.arm
    if x > point.bytes:
        label += f" ({point.bytes:,.0f} bytes)"
    if y < point.estimate:
        label += f" {point.estimate:+.3f}"
        axes.plot(x, y, "^", color=colour, markersize=7, clip_on=False)
    else:
        axes.plot([x, x], [point.low, point.high], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(x, y, "o" if x == point.bytes else "<", color=colour, markersize=6, clip_on=False)
    return [(x, y, label, colour)]
