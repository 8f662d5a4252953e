"""Plot gain against forgetting: every arm's loss on a domain against its loss on a text that no arm was trained on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mft.files.figure import new_figure, save_figure
from mft_study.arms.arm import Arm
from mft_study.arms.full import Base, Full
from mft_study.arms.kinds import KINDS
from mft_study.arms.means import Average, Interpolated
from mft_study.report.pictures import titles
from mft_study.report.pictures.plots import colours_of, ends_of

_OUTLIER = 5  # an arm beyond this many times the trained arms' median distance does not widen the right panel
_MARGIN = 0.07
_UNTRAINED = ("x", "+", "1", "2", "3", "4", "v", "^")  # markers that tell arms of one colour apart

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """An arm on test minus the full fine-tune: loss on the text and on the domain, each (low, estimate, high)."""

    arm: str
    kind: str
    forgotten: tuple[float, float, float]
    gained: tuple[float, float, float]


@dataclass(frozen=True)
class Curve:
    """An interpolated arm on validation with the first seed: (loss on the text, loss on the domain) by alpha.

    The losses are minus the full fine-tune's. The curve goes from its source's start over the alphas to its source's
    end.
    """

    arm: str
    of: str
    by_alpha: dict[float, tuple[float, float]]


def points(table: Table, text: str) -> list[Point]:
    """Return the points of all arms that were tested on both the text and the domain."""
    found = []
    for row in table["rows"]:
        on = row["general"].get(text)
        both = None if on is None else (on["minus_full"], row["minus_full"])
        if row["arm"] == table["full"]:
            found.append(Point(row["arm"], row["kind"], (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)))
        elif both is not None and None not in both:
            ends = [(low, less["estimate"], high) for less in both for low, high in [ends_of(less)]]
            found.append(Point(row["arm"], row["kind"], *ends))
    return found


def curves(table: Table, text: str, first_seed: int) -> list[Curve]:
    """Return the curves of all interpolated arms."""
    seen = _Seen(table, text, first_seed)
    origin = seen.chosen(table["full"])
    found = []
    for row in table["rows"]:
        if KINDS[row["kind"]] is not Interpolated or origin is None:
            continue
        along = {0.0: seen.chosen(row["start"])} | seen.by_alpha(row["arm"])
        along.setdefault(1.0, seen.chosen(row["of"]))
        losses = {alpha: both for alpha, both in sorted(along.items()) if both is not None}
        less = {alpha: (general - origin[0], own - origin[1]) for alpha, (general, own) in losses.items()}
        found.append(Curve(row["arm"], row["of"], less))
    return found


def plot_forgetting(numbers: Mapping[str, Any], path: Path) -> None:
    """Plot a row per domain and text: all arms, and those near the full fine-tune. Raises: ValueError if none."""
    panels = [(name, text, t) for name, t in numbers["domains"].items() for text in t.get("general", [])]
    if not panels:
        raise ValueError(
            "a study must have a general text for its forgetting to be drawn, got none: name one in its file, such as "
            "general: {stdlib: {source: stdlib}}"
        )
    most = max(len(points(table, text)) for _, text, table in panels)
    figure = new_figure(13.5, max(4.6, 1 + 0.22 * most) * len(panels))  # as high as the legend
    for (left, right), (domain, text, table) in zip(figure.subplots(len(panels), 2, squeeze=False), panels):
        found, lines = points(table, text), curves(table, text, numbers["seeds"][0])
        shown = [p for p in found if _is_shown(KINDS[p.kind])]
        ends = [both for line in lines for both in line.by_alpha.values()]
        _draw(left, table, found, lines, _box(shown, ends))
        _draw(right, table, found, lines, _box(_near(shown), []))
        left.set_title(titles.gains_and_forgets(domain, found), loc="left")
        right.set_title(f"the same arms near {table['full']}", loc="left")
        for axes in (left, right):
            axes.set_xlabel(f"test loss on {text} - loss of {table['full']}\nnats per token (left: forgets less)")
        left.set_ylabel(f"test loss on {domain} - loss of {table['full']}\nnats per token (down: gains more)")
        handles, labels = left.get_legend_handles_labels()
        right.legend(handles, labels, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save_figure(figure, path, dpi=100)


# ---------------------------------------------------------------------------------------------- private

_Both = tuple[float, float]  # losses on the text and on the domain
_Limits = tuple[_Both, _Both]  # of x and of y


class _Seen:
    """What validation saw with the first seed: both losses of each run."""

    def __init__(self, table: Table, text: str, first_seed: int) -> None:
        self._settings = {row["arm"]: row["setting"] for row in table["rows"]}
        self._runs: list[tuple[Mapping[str, Any], _Both]] = [
            (trial, (general, trial["validation_loss"]))
            for trial in table["trials"]
            if (trial["seed"], trial["part"]) == (first_seed, 0)
            and (general := trial["general"].get(text)) is not None
            and trial["validation_loss"] is not None
        ]

    def chosen(self, arm: str | None) -> _Both | None:
        setting = self._settings.get(arm)
        if setting is None:
            return None
        own = (both for trial, both in self._runs if trial["arm"] == arm and setting.items() <= trial.items())
        return next(own, None)

    def by_alpha(self, arm: str) -> dict[float, _Both | None]:
        return {trial["alpha"]: both for trial, both in self._runs if trial["arm"] == arm}


def _near(found: Sequence[Point]) -> list[Point]:
    """Return the trained arms that do not lie much farther from the full fine-tune than most."""
    trained = [point for point in found if KINDS[point.kind].near]
    for name in ("forgotten", "gained"):
        far = _OUTLIER * median([abs(getattr(point, name)[1]) for point in trained] or [0.0])
        trained = [point for point in trained if abs(getattr(point, name)[1]) <= far] or trained
    return trained


def _box(found: Sequence[Point], ends: Sequence[_Both]) -> _Limits:
    """Return limits around these points, their intervals and the full fine-tune."""

    def limits(axis: int) -> _Both:
        values = [0.0, *(both[axis] for both in ends)]
        values += [end for point in found for end in (point.forgotten, point.gained)[axis]]
        margin = _MARGIN * ((max(values) - min(values)) or 1e-4)
        return min(values) - margin, max(values) + margin

    return limits(0), limits(1)


def _draw(axes, table: Table, found: Sequence[Point], lines: Sequence[Curve], limits: _Limits) -> None:
    """Draw what lies within limits. Of the rest, draw only the untrained arms, at the edge."""
    colours, masked = colours_of(table), {row["arm"] for row in table["rows"] if row["masked"]}
    axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    for line in lines:
        xs, ys = zip(*line.by_alpha.values()) if line.by_alpha else ((), ())
        axes.plot(xs, ys, ".-", color=colours[line.arm], linewidth=1, markersize=4, alpha=0.6)
    for point, marker in _marked(found, masked):
        kind, (x, y), colour = KINDS[point.kind], (point.forgotten[1], point.gained[1]), colours[point.arm]
        (left, right), (bottom, top) = limits
        inside = left <= x <= right and bottom <= y <= top
        if inside:
            errors = [[[v[1] - v[0]], [v[2] - v[1]]] for v in (point.forgotten, point.gained)]
            axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.8)
        elif _is_shown(kind):
            continue  # the left panel shows it
        place = min(max(x, left), right), min(max(y, bottom), top)
        label = point.arm if inside else f"{point.arm} (farther)"
        axes.plot(
            *place,
            marker,
            color=colour,
            markersize=8,
            markerfacecolor="white" if kind is Interpolated else colour,
            markeredgewidth=1.5,
            markeredgecolor="black" if kind is Average else colour,
            label=label,
            clip_on=False,
            zorder=3,
        )
    if lines:
        axes.plot([], [], ".-", color="0.5", linewidth=1, markersize=4, label="from start to end, on validation")
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    axes.grid(color="0.93")
    axes.set_axisbelow(True)


def _is_shown(kind: type[Arm]) -> bool:
    """Return whether the left panel is made wide enough for an arm of this kind."""
    return kind in (Base, Full) or kind.near


def _marked(found: Sequence[Point], masked: set[str]) -> Iterator[tuple[Point, str]]:
    untrained = iter(_UNTRAINED * math.ceil(len(found) / len(_UNTRAINED)))
    for point in found:
        kind = KINDS[point.kind]
        if kind is Base:
            yield point, "s"
        elif _is_shown(kind):
            yield point, "D" if kind is Interpolated else "o" if point.arm in masked else "P"
        else:
            yield point, next(untrained)
