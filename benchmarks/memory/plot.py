"""Draw benchmarks/results/memory.png: bytes by kind, stacked, one bar per memory mode; measured peaks as marks."""

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from mft.files.figure import PHASES
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload

from ..records import Record, by_machine, machine

KINDS = ("weights", "masks", "gradients", "states", "activations", "logits", "boundaries", "staging", "workspace")
COLOURS = dict(zip(KINDS, PHASES))
LOCAL = (4, 5, 6, 7)


def draw(results: Path) -> None:
    """Draw from the JSON files in ``results``; the panels of LLaMA2-7B are estimates and need none."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    cards = _findings(results / "memory_cards-cpu.json")
    for place, (layers, title) in enumerate(((LOCAL, "4 of 32 layers masked"), (None, "all layers masked"))):
        bars = _draw_card(axes[place], layers, cards)
        axes[place].set_title(f"LLaMA2-7B, {title}, on a GPU (estimated):\n{_least(bars)}")
    _draw_blocks(axes[2], by_machine(results, "memory_blocks"))
    handles = {kind: axes[0].bar([0], [0], color=COLOURS[kind]) for kind in KINDS}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(KINDS))
    figure.savefig(results / "memory.png", dpi=110)


def _draw_card(axes, layers: tuple[int, ...] | None, cards: dict[str, float]) -> dict[str, dict[str, int]]:
    """Draw the panel of one card. Returns: bytes on the device by way and kind."""
    shape = shape_from_config(known_config("llama2-7b"))
    bars = {}
    for way in ("plain", "resident", "quantized", "layerwise"):
        kind = "nf4" if way == "quantized" else None
        masked = way == "quantized" and layers is None
        workload = Workload(way, layers, quantization=kind, quantize_masked=masked)
        bars[way] = estimate(shape, workload).device
    _stack(axes, bars)
    for rival in ("paper", "eager"):
        name = f"llama2-7b, {rival}, {'all layers' if layers is None else '4 layers'}: simulated"
        if name in cards:
            axes.axhline(cards[name], color="0.3", linestyle="--" if rival == "paper" else ":", linewidth=1)
            label = {"paper": "the paper's formulation", "eager": "careful eager PyTorch"}[rival]
            axes.annotate(
                f"{label}, simulated: {cards[name]:.1f}", (3.45, cards[name]), ha="right", va="bottom", fontsize=8
            )
    return bars


def _least(bars: Mapping[str, Mapping[str, int]]) -> str:
    totals = {way: sum(sizes.values()) / 1e9 for way, sizes in bars.items()}
    way = min(totals, key=lambda way: totals[way])
    return f"{way} needs {totals[way]:.1f} GB, plain {totals['plain']:.1f} GB"


def _draw_blocks(axes, records: dict[str, Record]) -> None:
    """Draw the estimate as one stack, and each machine's measurements."""
    axes.set_title("2 layers of LLaMA2-7B's shape on a CPU")
    if not records:
        axes.annotate("not measured yet", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    first = next(iter(records.values()))
    names = list(_measured(first))
    _stack(axes, {name: first["estimated_bytes"].get(name, {}) for name in names}, totals=False)
    for marker, record in zip("_x+", records.values()):
        peaks = list(_measured(record).values())
        axes.plot(range(len(names)), peaks, f"k{marker}", markersize=22 if marker == "_" else 8, label=machine(record))
    for place, value in enumerate(_measured(first).values()):
        axes.annotate(f"{value:.2f}", (place, value), xytext=(0, 12), textcoords="offset points", ha="center")
    axes.legend(loc="upper left", title="measured, resident memory")
    axes.margins(y=0.15)
    axes.tick_params(axis="x", rotation=30)


def _measured(record: Record) -> dict[str, float]:
    found = {f["quantity"]: f["measured"]["median"] for f in record["findings"]}
    return {name.removesuffix(": measured"): peak for name, peak in found.items() if name.endswith(": measured")}


def _stack(axes, bars: dict[str, dict[str, float]], *, totals: bool = True) -> None:
    for place, sizes in enumerate(bars.values()):
        height = 0.0
        for kind in KINDS:
            size = sizes.get(kind, 0) / 1e9
            axes.bar(place, size, bottom=height, color=COLOURS[kind], width=0.7)
            height += size
        if height and totals:
            axes.annotate(f"{height:.1f}", (place, height), xytext=(0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("GB of 1e9 bytes (lower is better)")


def _findings(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    return {f["quantity"]: f["measured"]["median"] for f in json.loads(path.read_text())["findings"]}
