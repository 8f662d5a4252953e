"""A study's plots, drawn from the numbers of its table.json."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.files.figure import COLOURS, new_figure, save_figure, shade
from mft_study.arms.full import Control
from mft_study.arms.kinds import KINDS
from mft_study.arms.means import Average, Interpolated
from mft_study.report.pictures import titles

_FULL, _CONTROL, _PLAIN = COLOURS["full fine-tune"], COLOURS["control"], COLOURS["one-shot mask"]
_REACH = 2.5  # axes cover at most this many times the span of the trained arms; what lies farther becomes an arrow


def plot_study(numbers: Mapping[str, Any], path: Path) -> None:
    """Plot a row per domain: test differences from the full fine-tune, and validation loss by rate."""
    domains = numbers["domains"]
    rows = max(len(table["rows"]) for table in domains.values())
    figure = new_figure(12.5, max(3.6, 0.36 * rows + 1.6) * len(domains))
    axes = figure.subplots(len(domains), 2, squeeze=False, width_ratios=(1.25, 1))
    for (left, right), (domain, table) in zip(axes, domains.items()):
        _draw_differences(left, table, "minus_full")
        left.axvline(0, color=_FULL, linestyle="--", linewidth=1)
        shown = f"loss - loss of {table['full']}"
        control = next((row for row in table["rows"] if row["arm"] == table["control"]), None)
        if control is not None and control["minus_full"] is not None:
            left.axvline(control["minus_full"]["estimate"], color=_CONTROL, linestyle=":", zorder=0)
            shown += f" (dotted line: {control['arm']})"
        left.set_title(titles.lowest_loss(domain, table, table["full"]), loc="left")
        left.set_xlabel(f"test {shown}\nnats per token with 95 % interval (lower is better)")
        _draw_rates(right, table, numbers["seeds"][0])
        right.set_title(_rates_title(domain, table, numbers["seeds"][0]), loc="left")
    save_figure(figure, path, dpi=100)


def plot_summary(numbers: Mapping[str, Any], path: Path) -> None:
    """Plot test differences from the control, a panel per domain. numbers: of a table.json."""
    domains = {name: table for name, table in numbers["domains"].items() if table["control"] is not None}
    if not domains:
        raise ValueError("a summary must have a domain with a control arm to be drawn, got none: see plot.png instead")
    rows = max(len(_compared_rows(table, "minus_control")) for table in domains.values())
    figure = new_figure(12, 0.34 * rows + 1.3)
    named: list[str] = []
    for axes, (domain, table) in zip(figure.subplots(1, len(domains), squeeze=False)[0], domains.items()):
        _draw_differences(axes, table, "minus_control")
        names = [label.get_text() for label in axes.get_yticklabels()]
        if names == named:  # once is enough
            axes.tick_params(labelleft=False)
        named = names
        axes.axvline(0, color=_CONTROL, linestyle="--", linewidth=1)
        axes.set_title(titles.masks_beside_control(domain, table), loc="left")
        axes.set_xlabel(f"test loss - loss of {table['control']}\nnats per token with 95 % interval (lower is better)")
    save_figure(figure, path, dpi=100)


def ends_of(difference: Mapping[str, Any]) -> tuple[float, float]:
    """Return the ends of a difference's interval; its estimate for ends that are not known."""
    low, high = (difference["estimate"] if difference[end] is None else difference[end] for end in ("low", "high"))
    return low, high


def _compared_rows(table: Mapping[str, Any], reference: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (row, its loss difference) for each row that has one."""
    found = []
    for row in table["rows"]:
        difference = row["minus_full"] if reference == "minus_full" else row["minus_control"].get("loss")
        if difference is not None:
            found.append((row, difference))
    return found


def _draw_differences(axes, table: Mapping[str, Any], reference: str) -> None:
    compared, colours = _compared_rows(table, reference), colours_of(table)
    low, high = _limits(compared)
    for place, (row, difference) in enumerate(compared):
        estimate, colour = difference["estimate"], colours[row["arm"]]
        if low <= estimate <= high:
            axes.plot(ends_of(difference), [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(estimate, place, "o", color=colour, markersize=6)
        else:
            edge = high if estimate > high else low
            axes.plot(edge, place, ">" if estimate > high else "<", color=colour, markersize=7, clip_on=False)
        weight = "bold" if row["masked"] else "normal"
        axes.annotate(
            f"{estimate:+.4f}",
            (1.03, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize="small",
            weight=weight,
        )
    names = [row["arm"] for row, _ in compared]
    if reference == "minus_control":  # averages have a control of their own
        names = [
            name if row["against"] == table["control"] else f"{name} - {row['against']}"
            for name, (row, _) in zip(names, compared)
        ]
    labels = axes.set_yticks(range(len(compared)), names)
    for tick, (row, _) in zip(labels, compared):
        tick.label1.set_fontweight("bold" if row["masked"] else "normal")
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xlim(low, high)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=7)


def _limits(compared) -> tuple[float, float]:
    """Return axis limits around 0, the intervals of trained arms, and what lies within _REACH times their span."""
    near = [d for row, d in compared if KINDS[row["kind"]].near] or [d for _, d in compared]
    values = [0.0] + [d[end] for d in near for end in ("low", "estimate", "high") if d[end] is not None]
    span = (max(values) - min(values)) or 1e-4
    floor, ceiling = max(values) - _REACH * span, min(values) + _REACH * span
    values += [
        d[end] for _, d in compared for end in ("low", "high") if d[end] is not None and d["estimate"] <= ceiling
    ]
    values = [min(max(value, floor), ceiling) for value in values]
    margin = 0.06 * (max(values) - min(values))
    return min(values) - margin, max(values) + margin


def _draw_rates(axes, table: Mapping[str, Any], first_seed: int) -> None:
    """Draw the best loss at each rate over the other choices, as a line, and each configuration faintly."""
    colours, rows, trials = colours_of(table), _rows_by_arm(table), _trials(table, first_seed)
    best = [min((_loss(trial) for trial in tried), default=float("inf")) for tried in trials.values()]
    best = [loss for loss in best if loss < float("inf")]
    if not best:
        axes.set_axis_off()
        return
    span = (max(best) - min(best)) or 0.01 * abs(max(best))
    top = max(best) + span  # every chosen one is visible; farther ones lie on the upper edge
    for arm, tried in trials.items():
        _draw_arm(axes, arm, tried, rows[arm]["setting"], colours[arm], top)
    shown = [trial for tried in trials.values() for trial in tried]
    if any(trial["diverged"] is not None for trial in shown):
        axes.plot([], [], "x", color=_PLAIN, label="diverged (at the top)")
    if any(trial["diverged"] is None and _loss(trial) > top for trial in shown):
        axes.plot([], [], "^", color=_PLAIN, label="worse than shown")
    axes.set_ylim(min(best) - 0.12 * span, top + 0.04 * (top - min(best)))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (the chosen one is circled)")
    axes.set_ylabel("validation loss, nats per token (lower is better)")
    axes.grid(color="0.92")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _rates_title(domain: str, table: Mapping[str, Any], first_seed: int) -> str:
    trials, rows = _trials(table, first_seed), _rows_by_arm(table)
    tried = {arm: {trial["lr"] for trial in of} for arm, of in trials.items()}
    chosen = {arm: setting["lr"] for arm in tried if (setting := rows[arm]["setting"]) is not None}
    return titles.rates(domain, tried, chosen)


def _rows_by_arm(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {row["arm"]: row for row in table["rows"]}


def _trials(table: Mapping[str, Any], first_seed: int) -> dict[str, list[Mapping[str, Any]]]:
    """Return each setting that the first seed tried, by arm. Averages have none: they are made of other arms' runs."""
    rows, found = _rows_by_arm(table), dict[str, list[Mapping[str, Any]]]()
    for trial in table["trials"]:
        row = rows.get(trial["arm"])
        if row is None or trial["lr"] is None or trial["seed"] != first_seed:
            continue
        if KINDS[row["kind"]] is not Average:
            found.setdefault(trial["arm"], []).append(trial)
    return found


def _draw_arm(axes, arm: str, tried: list[Mapping[str, Any]], chosen, colour: str, top: float) -> None:
    lowest: dict[float, float] = {}
    for trial in tried:
        loss = _loss(trial)
        lowest[trial["lr"]] = min(loss, lowest.get(trial["lr"], float("inf")))
        marker = "x" if trial["diverged"] is not None else "^" if loss > top else "."
        axes.plot(trial["lr"], min(loss, top), marker, color=colour, alpha=0.7, markersize=6, clip_on=False)
        if chosen is not None and all(trial[name] == value for name, value in chosen.items()):
            axes.plot(
                trial["lr"], min(loss, top), "o", color=colour, markersize=12, fillstyle="none", markeredgewidth=2
            )
    rates = sorted(rate for rate, loss in lowest.items() if loss < float("inf"))
    axes.plot(rates, [lowest[rate] for rate in rates], "-", color=colour, linewidth=1.5, label=arm)


def _loss(trial: Mapping[str, Any]) -> float:
    loss = trial["validation_loss"]
    return float("inf") if loss is None else loss


def colours_of(table: Mapping[str, Any]) -> dict[str, str]:
    """Return each arm's colour: its method's, in shades if several arms share it. Interpolated: its source's."""
    colours, of_colour = dict[str, str](), Counter[str]()
    controls = {row["against"] for row in table["rows"] if row["masked"]}  # averages of the control too
    for row in table["rows"]:
        kind = KINDS[row["kind"]]
        if kind is Interpolated:
            continue
        if row["masked"]:
            colour = COLOURS["mask"]
        elif kind is Control or row["arm"] in controls:
            colour = _CONTROL
        else:
            colour = kind.colour
        shaded = kind.near and colour != _CONTROL
        colours[row["arm"]] = shade(colour, of_colour[colour]) if shaded else colour
        of_colour[colour] += 1
    made = [row for row in table["rows"] if KINDS[row["kind"]] is Interpolated]
    return colours | {row["arm"]: colours.get(row["of"], _PLAIN) for row in made}
