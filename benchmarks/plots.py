"""Draw the pictures next to the JSON files that they show.

ops, train_step and scaling have one picture per machine, named as the record. cpu.png shows the machines side by side.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from mft.files.figure import COLOURS as METHODS
from mft.files.figure import PHASES, shade

from .records import Record, by_machine, machine

_MASK = METHODS["mask"]
#: The colour of each method, as in the pictures of studies; our ways of running are shades of the mask's colour.
COLOURS = {
    "dense": METHODS["full fine-tune"],
    "full fine-tune": METHODS["full fine-tune"],
    "LoRA": METHODS["LoRA"],
    "the paper's layer": METHODS["paper's mask"],
    "the paper's MFT": METHODS["paper's mask"],
    "eager": METHODS["eager mask"],
    "compiled": METHODS["compiled mask"],
    "ours, from scores": _MASK,
    "ours, module": shade(_MASK, 1),
    "ours, held mask": shade(_MASK, 2),
    "ours, plain": _MASK,
    "ours, in place": METHODS["mask in place"],
    "in place": METHODS["mask in place"],
    "ours, resident": shade(_MASK, 1),
    "ours, quantized": shade(_MASK, 2),
    "ours, layerwise": shade(_MASK, 3),
}
_OTHER = METHODS["one-shot mask"]
ROOFED = ("dense", "ours, from scores", "ours, module", "ours, held mask")
MARKERS = {"forward": "o", "d_x": "s", "d_scores": "^"}
MATRIX_OPS = ("threshold", "packing", "optimiser")


def draw_ops(record_path: Path) -> None:
    """Draw ratios to dense against M for a small and a large shape, the roofline, and the work once per step."""
    record = json.loads(record_path.read_text())
    cases = record["cases"]
    shapes = list(dict.fromkeys((case["n"], case["k"]) for case in cases))
    wanted = [shape for shape in ((576, 1536), (4096, 4096)) if shape in shapes]
    chosen = [*wanted, *(shape for shape in shapes if shape not in wanted)][:2]
    figure = _figure(16, 13)
    axes = figure.subplots(3, 3)
    for row, shape in zip(axes, chosen):
        for panel, op in zip(row, MARKERS):
            _draw_ratios(panel, [c for c in cases if (c["n"], c["k"]) == shape and c["op"] == op])
            panel.set_title(_held(f"{op}, {shape[0]} x {shape[1]}", cases), fontsize=10)
    axes[0, 0].legend(fontsize=8)
    _draw_roofline(axes[2, 0], cases, record["ceilings"])
    _draw_shares(axes[2, 1], cases)
    _draw_matrix_ops(axes[2, 2], [c for c in cases if (c["n"], c["k"]) == chosen[-1] and c["op"] in MATRIX_OPS])
    axes[2, 2].set_title(f"Once per step, {chosen[-1][0]} x {chosen[-1][1]}")
    _save(figure, record, picture_of(record_path))


def draw_train_step(record_path: Path) -> None:
    """Draw tokens/s, peak memory and where the time goes, one row per model."""
    record = json.loads(record_path.read_text())
    models = list(dict.fromkeys(row["model"] for row in record["competitors"]))
    figure = _figure(16, 4.6 * len(models) + 0.4)
    for panels, model in zip(figure.subplots(len(models), 3, squeeze=False), models):
        rows = [row for row in record["competitors"] if row["model"] == model]
        names = [row["competitor"] for row in rows]
        rates = [row["tokens_per_s"] for row in rows]
        errors = [[r["median"] - r["low"] for r in rates], [r["high"] - r["median"] for r in rates]]
        colours = [_look(name)["color"] for name in names]
        bars = panels[0].barh(names, [r["median"] for r in rates], xerr=errors, color=colours)
        panels[0].bar_label(bars, fmt="%.3g", padding=12)
        panels[0].set_title(_fastest(model, rows))
        panels[0].set_xlabel("tokens/s (higher is better)")
        bars = panels[1].barh(names, [row["peak_gb"] for row in rows], color=colours)
        panels[1].bar_label(bars, fmt="%.2f", padding=3)
        least = min(rows, key=lambda row: row["peak_gb"])
        panels[1].set_title(f"{least['competitor']} needs least memory")
        panels[1].set_xlabel("peak of resident memory, GB of 1e9 bytes (lower is better)")
        _draw_kinds(panels[2], names, [row["ms_by_kind"] for row in rows])
        panels[2].set_title(_longest_phases(rows))
        panels[2].set_xlabel("profiled time per step, s (lower is better)")
        for panel in panels:
            panel.invert_yaxis()
            panel.margins(x=0.15)
        for panel in panels[1:]:
            panel.set_yticklabels([])
    _save(figure, record, picture_of(record_path))


def draw_scaling(record_path: Path) -> None:
    """Draw seconds per step against each setting."""
    record = json.loads(record_path.read_text())
    points = record["points"]
    names = list(dict.fromkeys(point["axis"] for point in points))
    figure = _figure(4 * len(names), 4.6)
    for panel, axis in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        here = [point for point in points if point["axis"] == axis]
        for competitor in dict.fromkeys(point["competitor"] for point in here):
            own = [point for point in here if point["competitor"] == competitor]
            times = [{key: value / 1e3 for key, value in point["ms"].items()} for point in own]
            _line(panel, [point["value"] for point in own], times, competitor)
        _ticks(panel, {point["value"] for point in here})
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.set_ylabel("s per step (lower is better)")
    figure.axes[0].legend()
    _save(figure, record, picture_of(record_path))


def draw_cpu(record_path: Path) -> None:
    """Draw the ratio to dense of every case: one row per dtype, one column per machine with a record in this folder."""
    records = by_machine(record_path.parent, "cpu")
    dtypes = list(dict.fromkeys(case["dtype"] for record in records.values() for case in record["cases"]))
    figure = _figure(9 * len(records), 5 * len(dtypes))
    axes = figure.subplots(len(dtypes), len(records), squeeze=False, sharey=True)
    for column, record in enumerate(records.values()):
        for row, dtype in enumerate(dtypes):
            panel = axes[row, column]
            _draw_beside_dense(panel, [case for case in record["cases"] if case["dtype"] == dtype])
            where = record["environment"]
            panel.set_title(f"{machine(record)}, {dtype}, torch {where['torch']}, commit {where['commit'][:10]}")
    handles = {name: bars for panel in axes.flat for bars, name in zip(*panel.get_legend_handles_labels())}
    axes[0, 0].legend(handles.values(), handles, fontsize=8)
    figure.suptitle(_cpu_title(records.values()))
    figure.savefig(record_path.parent / "cpu.png", dpi=100)


def _held(what: str, cases: list[dict]) -> str:
    """Return a title: the cost of a held mask over all M, compared with the dense layer."""
    op, _, shape = what.partition(", ")
    own = [
        case["ratio"]["median"]
        for case in cases
        if (case["op"], f"{case['n']} x {case['k']}", case["competitor"]) == (op, shape, "ours, held mask")
    ]
    return f"{what}: held mask {min(own):.2f} to {max(own):.2f} x dense" if own else what


def _fastest(model: str, rows: list[dict]) -> str:
    """Return a title: the competitor with most tokens/s, and our best compared with the paper's formulation."""
    rate = {row["competitor"]: row["tokens_per_s"]["median"] for row in rows}
    best = max(rate, key=lambda name: rate[name])
    ours = max((name for name in rate if name.startswith("ours")), key=lambda name: rate[name])
    paper = rate.get("the paper's MFT")
    beside = "" if paper is None else f",\n{ours} is {rate[ours] / paper:.1f} times as fast as the paper's MFT"
    return f"{model}: {best} is fastest{beside}"


def _longest_phases(rows: list[dict]) -> str:
    """Return a title: what takes most of a step of ours, and of the paper's formulation."""
    longest = {row["competitor"]: max(row["ms_by_kind"], key=row["ms_by_kind"].get) for row in rows}
    ours = next(name for name in longest if name.startswith("ours"))
    paper = longest.get("the paper's MFT")
    beside = "" if paper is None else f",\n{paper} in the paper's MFT"
    return f"{longest[ours]} take most of a step{beside}"


def _cpu_title(records: Iterable[Record]) -> str:
    """Return a title: how many cases meet their goal, among those that have one."""
    asked = [case for record in records for case in record["cases"] if case["target"] is not None]
    met = sum(case["ratio"]["median"] <= case["target"] for case in asked)
    return f"{met} of {len(asked)} masked layers meet their target (dashes), as multiples of the dense layer's time"


def _draw_beside_dense(panel, cases: list[dict]) -> None:
    names = [name for name in dict.fromkeys(case["competitor"] for case in cases) if name != "dense"]
    places = list(dict.fromkeys((c["op"], c["n"], c["k"], c["m"], c["threads"]) for c in cases))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        own = [case for case in cases if case["competitor"] == name]
        at = [places.index((c["op"], c["n"], c["k"], c["m"], c["threads"])) + (number - 1) * width for c in own]
        ratios = [case["ratio"] for case in own]
        errors = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        panel.bar(at, [r["median"] for r in ratios], width, yerr=errors, label=name, **_look(name))
        asked = [(x, case["target"]) for x, case in zip(at, own) if case["target"] is not None]
        for x, target in asked:
            panel.plot([x - width / 2, x + width / 2], [target, target], "--", color="k", lw=1.5)
    panel.axhline(1, color=COLOURS["dense"], lw=1)
    panel.set_yscale("log")
    ratios_shown = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    panel.set_yticks(ratios_shown, [f"{ratio:g}" for ratio in ratios_shown])
    panel.minorticks_off()
    labels = [f"{op}\n{n} x {k}\nM = {m}" + ("\n1 thread" if t == 1 else "") for op, n, k, m, t in places]
    panel.set_xticks(range(len(places)), labels, fontsize=7)
    panel.set_ylabel("time / time of the dense layer (lower is better)")


def draw_experts(record_path: Path) -> None:
    """Draw the ratio to grouped_mm of every case, one row per dtype."""
    record = json.loads(record_path.read_text())
    cases = record["cases"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    figure = _figure(12, 4.5 * len(dtypes))
    for panel, dtype in zip(figure.subplots(len(dtypes), 1, squeeze=False)[:, 0], dtypes):
        own = [case for case in cases if case["dtype"] == dtype]
        places = list(dict.fromkeys((c["op"], c["experts"], c["tokens"]) for c in own))
        names = [name for name in dict.fromkeys(case["competitor"] for case in own) if name.startswith("ours")]
        for number, name in enumerate(names):
            shown = [case for case in own if case["competitor"] == name]
            at = [places.index((c["op"], c["experts"], c["tokens"])) + 0.4 * number - 0.2 for c in shown]
            ratios = [case["ratio"] for case in shown]
            errors = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
            bars = panel.bar(at, [r["median"] for r in ratios], 0.4, yerr=errors, color=COLOURS[name], label=name)
            panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
        panel.axhline(own[-1]["target"], ls="--", color="k", lw=1, label="target")
        panel.margins(y=0.15)  # for the numbers above bars
        panel.axhline(1, color=COLOURS["dense"], lw=1)
        panel.set_xticks(range(len(places)), [f"{op}\n{experts} experts\nM = {m}" for op, experts, m in places])
        panel.set_title(dtype)
        panel.set_ylabel("time / time of grouped_mm (lower is better)")
        panel.legend(fontsize=8)
    _save(figure, record, picture_of(record_path))


def picture_of(record_path: Path) -> Path:
    """Return the picture's path next to the record: ops-cpu-amx.json has ops-amx.png."""
    return record_path.with_name(record_path.name.replace("-cpu-", "-")).with_suffix(".png")


def _look(name: str) -> dict[str, str]:
    """Return the look of a competitor's bars. Another backend (side_by_side.py) has the colour of ours, hatched."""
    if name in COLOURS:
        return {"color": COLOURS[name]}
    _, _, what = name.partition(", ")
    alike = COLOURS.get(f"ours, {what}")
    return {"color": _OTHER} if alike is None else {"color": alike, "hatch": "//"}


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, record: dict, path: Path) -> None:
    where = record["environment"]
    figure.suptitle(
        f"{record['title']}\n{machine(record)}, torch {where['torch']}, commit {where['commit'][:10]}", fontsize=11
    )
    figure.savefig(path, dpi=100)


def _line(panel, x: list, spreads: list[dict], name: str) -> None:
    """Draw medians as a line and quartiles as a band. The line of another backend is dashed."""
    look = _look(name)
    colour = look["color"]
    line = "x--" if "hatch" in look else "o-"
    panel.plot(x, [s["median"] for s in spreads], line, color=colour, label=name, markersize=4)
    panel.fill_between(x, [s["low"] for s in spreads], [s["high"] for s in spreads], color=colour, alpha=0.15, lw=0)


def _ticks(panel, values: set) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    panel.minorticks_off()


def _draw_ratios(panel, cases: list[dict]) -> None:
    for name in dict.fromkeys(case["competitor"] for case in cases):
        own = [case for case in cases if case["competitor"] == name]
        _line(panel, [case["m"] for case in own], [case["ratio"] for case in own], name)
    panel.set_yscale("log")
    _ticks(panel, {case["m"] for case in cases})
    ratios = (0.5, 1, 2, 4, 8, 16, 32, 64)
    low, high = panel.get_ylim()
    panel.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
    panel.set_ylim(low, high)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_xlabel("M, tokens")
    panel.set_ylabel("time / time of the dense layer (lower is better)")


def _draw_roofline(panel, cases: list[dict], ceilings: dict) -> None:
    gemm, copy = ceilings["gemm_gflops"]["median"], ceilings["copy_gb_per_s"]["median"]
    for case in cases:
        if case["op"] in MARKERS and case["competitor"] in ROOFED:
            rate = case["flops"] / case["ms"]["median"] / 1e6
            colour = COLOURS[case["competitor"]]
            panel.plot(case["flops"] / case["bytes"], rate, MARKERS[case["op"]], color=colour, markersize=4, alpha=0.6)
    intensities = [0.1, gemm / copy, 5000]
    panel.plot(intensities, [min(gemm, copy * i) for i in intensities], color="k", lw=1)
    panel.set_xscale("log")
    panel.set_yscale("log")
    for op, marker in MARKERS.items():
        panel.plot([], [], marker, color="0.5", label=op)
    for name in ROOFED:
        panel.plot([], [], "-", color=COLOURS[name], label=name)
    panel.legend(fontsize=8)
    panel.set_xlabel("flops / byte that must move")
    panel.set_ylabel("GFLOP/s")
    panel.set_title(f"Roofline: GEMM {gemm:.0f} GFLOP/s, copy {copy:.1f} GB/s", fontsize=10)


def _draw_shares(panel, cases: list[dict]) -> None:
    """Draw the median share over shapes, one line per op and competitor."""
    styles = {"forward": "-", "d_x": "--", "d_scores": ":"}
    tokens = sorted({case["m"] for case in cases if case["m"]})
    for op, style in styles.items():
        for name in ROOFED:
            shares = {
                m: sorted(c["share"] for c in cases if (c["op"], c["competitor"], c["m"]) == (op, name, m))
                for m in tokens
            }
            known = [m for m in tokens if shares[m]]
            middle = [100 * shares[m][len(shares[m]) // 2] for m in known]
            panel.plot(known, middle, style, color=COLOURS[name], label=f"{op}, {name}" if name == "dense" else None)
    _ticks(panel, set(tokens))
    panel.axhline(100, color="k", lw=1)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    panel.set_xlabel("M, tokens")
    panel.set_title("% of the roofline, median over shapes", fontsize=10)


def _draw_matrix_ops(panel, cases: list[dict]) -> None:
    labels = [f"{case['op']}: {case['competitor']}" for case in cases]
    colours = [_MASK if case["competitor"].startswith("ours") else _OTHER for case in cases]
    bars = panel.barh(labels, [case["ms"]["median"] for case in cases], color=colours)
    panel.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    panel.set_xscale("log")
    panel.margins(x=0.2)
    panel.tick_params(axis="y", labelsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("ms (lower is better)")


def _draw_kinds(panel, names: list[str], times: list[dict[str, float]]) -> None:
    left = [0.0] * len(names)
    for number, kind in enumerate(times[0]):
        widths = [spent[kind] / 1e3 for spent in times]
        panel.barh(names, widths, left=left, color=PHASES[number], label=kind)
        left = [a + b for a, b in zip(left, widths)]
    panel.legend(fontsize=8)
