"""mft estimate: what each way of training needs, as a table or as JSON, and which one fits."""

import dataclasses
import json
import os
import re
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mft.choice import RESERVE, Choice, choose, gigabytes
from mft.estimate import Estimate
from mft.model_config import read_model_config
from mft.setting import Setting
from mft.shapes import ModelShape, shape_from_config

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_OPTIONS = {"micro_batch": "micro-batch", "quantize_masked": "quantize-masked"}
_KINDS = (
    *("weights", "masks", "gradients", "states", "activations", "logits", "boundaries", "staging", "workspace"),
    *("device peak", "host peak", "seconds a step", "fits"),
)


def run_estimate(
    model: str, setting: Setting, dtype: str, *, device_bytes: float | None, host_bytes: float | None, as_json: bool
) -> bool:
    """mft estimate; returns whether something fits."""
    shape = shape_from_config(read_model_config(model), model, dtype=dtype)
    choice = choose(shape, setting, device_bytes, host_bytes)
    if as_json:
        print(json.dumps(as_dictionary(shape, setting, choice, device_bytes, host_bytes), indent=2))
        return choice.way is not None
    console = Console()
    console.print(title(shape, setting), highlight=False, soft_wrap=True)
    console.print(table(setting, choice))
    for line in remarks(setting, choice):
        console.print(line, highlight=False, soft_wrap=True)
    return choice.way is not None


def parse_bytes(text: str, option: str) -> float:
    """ "24GB" -> 24e9, "24GiB" -> 24 * 2**30, "24e9" -> 24e9. Raises: ValueError naming the option."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    try:
        size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"{option} must be a size such as 24GB, 24GiB or 24e9, got {text!r}")
    return size


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def title(shape: ModelShape, setting: Setting) -> str:
    layers = "all layers" if setting.layers is None else f"layers {_ranges(setting.layers)}"
    where = "on a GPU" if setting.device == "cuda" else "in one memory"
    return f"{shape.name}, {layers}, {setting.micro_batch} x {setting.sequence} tokens, {where}; in GB = 1e9 bytes"


def table(setting: Setting, choice: Choice) -> Table:
    """GB by kind when the device holds the most; a column a way."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("")
    for way in choice.estimates:
        kind = setting.quantization or "nf4"
        base = f"\n{kind}" if way == "quantized" or (way == "layerwise" and setting.quantization) else ""
        found.add_column(f"{way}{base}", justify="right", style="bold" if way == choice.way else None, no_wrap=True)
    for kind in _KINDS:
        cells = [_cell(kind, way, one, choice) for way, one in choice.estimates.items()]
        if any(cells) and not (kind == "host peak" and setting.device == "cpu"):
            if kind in ("device peak", "seconds a step"):
                found.add_section()
            found.add_row(kind, *cells)
    found.add_row("peak in", *(one.phase for one in choice.estimates.values()))
    return found


def remarks(setting: Setting, choice: Choice) -> list[str]:
    """What a reader of the table must know."""
    lines = [f"memory: {choice.way}. {choice.reason}" if choice.way else choice.reason]
    if choice.way is None:
        near = choice.nearest
        lines.append(
            "no setting found that fits" if near is None else f"nearest that fits: {difference(setting, near)}"
        )
    quantized = choice.estimates["quantized"]
    if setting.memory == "auto" and setting.quantization is None:
        refusal = choice.refusals.get("quantized")
        would = f"would not fit: it {refusal}" if refusal else f"would fit in {gigabytes(quantized.device_peak)}"
        lines.append(f"quantized {would}; auto leaves it alone, since it changes the base (--memory quantized)")
    reserve = RESERVE[setting.device]
    if reserve:
        lines.append(f"{gigabytes(reserve)} of the GPU are set aside for its context and the allocator's fragments")
    lines.append(f"seconds are a rough estimate for {setting.accumulation} micro-batches a step, not measured")
    return lines


def difference(setting: Setting, near: Setting) -> str:
    """The options that turn one setting into the other."""
    changed = []
    for item in dataclasses.fields(Setting):
        value = getattr(near, item.name)
        if value != getattr(setting, item.name):
            option = f"--{_OPTIONS.get(item.name, item.name)}"
            changed.append(option if value is True else f"{option} {value}")
    return " ".join(changed)


def as_dictionary(
    shape: ModelShape, setting: Setting, choice: Choice, device_bytes: float | None, host_bytes: float | None
) -> dict[str, Any]:
    """The table's numbers, those of the chosen way at the top (of the way asked for, or the smallest, if none fits)."""
    asked = setting.memory if setting.memory != "auto" else "layerwise"
    shown = choice.estimates[choice.way or asked]
    ways = {
        way: {
            "device_peak_gb": one.device_peak / 1e9,
            "host_peak_gb": one.host_peak / 1e9,
            "device_gb": {kind: size / 1e9 for kind, size in one.device.items()},
            "host_gb": {kind: size / 1e9 for kind, size in one.host.items()},
            "peak_in": one.phase,
            "seconds_a_step": one.seconds,
            "refusal": choice.refusals.get(way),
        }
        for way, one in choice.estimates.items()
    }
    return {
        "model": shape.name,
        "memory": choice.way,
        "device_peak_gb": shown.device_peak / 1e9,
        "host_peak_gb": shown.host_peak / 1e9,
        "seconds_a_step": shown.seconds,
        "reason": choice.reason,
        "nearest": None if choice.nearest is None else dataclasses.asdict(choice.nearest),
        "device_limit_gb": None if device_bytes is None else device_bytes / 1e9,
        "host_limit_gb": None if host_bytes is None else host_bytes / 1e9,
        "reserve_gb": RESERVE[setting.device] / 1e9,
        "setting": dataclasses.asdict(setting),
        "ways": ways,
    }


# ---------------------------------------------------------------------------------------------- private


def _cell(kind: str, way: str, one: Estimate, choice: Choice) -> str:
    if kind == "device peak":
        return f"{one.device_peak / 1e9:.2f}"
    if kind == "host peak":
        return f"{one.host_peak / 1e9:.2f}"
    if kind == "seconds a step":
        return f"{one.seconds:.0f}"
    if kind == "fits":
        return "no" if way in choice.refusals else "yes"
    return f"{one.device[kind] / 1e9:.2f}" if kind in one.device else ""


def _ranges(layers: tuple[int, ...]) -> str:
    """(4, 5, 6, 9) -> "4-6,9"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
