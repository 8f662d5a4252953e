"""mft estimate: print what each memory mode needs, as a table or as JSON, and which one fits."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection
from typing import Any

from rich import box
from rich.table import Table

from mft.config import layer_ranges
from mft.memory.fit import RESERVE, Choice, choose, gigabytes
from mft.memory.model_config import read_model_config
from mft.memory.shapes import ModelShape, shape_from_config
from mft.memory.sizes import RunSizes
from mft.memory.step_time import SPEEDS
from mft.memory.ways import WAYS
from mft.memory.workload import Workload
from mft.tracking.console import console, say

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
# The seconds of all memory modes assume these speeds, whichever card or machine is named.
ASSUMED = {
    "cuda": f"they assume a card that sustains {SPEEDS['cuda']}, as an RTX 4090 may at its best",
    "cpu": f"they assume a processor that sustains {SPEEDS['cpu']}, more than most have",
}
_OPTIONS = {"micro_batch": "micro-batch", "quantize_masked": "quantize-masked", "batches_at_once": "batches-at-once"}
STEP = ("sequence", "micro_batch", "accumulation")  # the size of a step, for which alone the numbers hold
_KINDS = (
    *("weights", "masks", "dropped", "gradients", "states", "activations"),
    *("logits", "boundaries", "staging", "sums", "gathered", "unsummed", "base", "workspace"),
)


def run_estimate(
    model: str,
    workload: Workload,
    dtype: str,
    *,
    device_bytes: float | None,
    host_bytes: float | None,
    as_json: bool,
    by_default: Collection[str] = (),
) -> bool:
    """Do mft estimate, and return whether a memory mode fits.

    device_bytes, host_bytes: None for this machine's memory, divided among its processes. by_default: the names in STEP
    that the user did not set; the output lists them.
    """
    shape = shape_from_config(read_model_config(model), model, dtype=dtype)
    machine = machine_bytes()
    assumed = device_bytes is None or (workload.device == "cuda" and host_bytes is None)
    device_bytes = machine if device_bytes is None else device_bytes
    if workload.device == "cuda" and host_bytes is None:
        host_bytes = machine
    if workload.device == "cpu":
        device_bytes /= workload.processes
    host_bytes = None if host_bytes is None else host_bytes / workload.processes
    choice = choose(shape, workload, device_bytes, host_bytes)
    if as_json:
        print(json.dumps(as_dictionary(shape, workload, choice, device_bytes, host_bytes), indent=2))
        return choice.way is not None
    say(title(shape, workload))
    if by_default:
        options = (f"{_option(name)} {getattr(workload, name)}" for name in STEP if name in by_default)
        say(f"as mft train by default: {', '.join(options)}")
    console.print(table(shape, workload, choice, device_bytes, host_bytes))
    for line in remarks(shape, workload, choice):
        say(line)
    if assumed:
        option = "--host" if workload.device == "cuda" else "--cpu"
        say(
            f"this machine has {gigabytes(machine)} ({option} for another); mft train counts only the memory that is "
            "free"
        )
    return choice.way is not None


def parse_bytes(text: str, option: str) -> float:
    """Parse a size: "24GB" -> 24e9, "24GiB" -> 24 * 2**30. Raises: ValueError that names the option."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    try:
        size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < float("inf"):
        unit = f": did you mean {text.strip()}GB?" if re.fullmatch(r"\s*[1-9][0-9.]*\s*", text) else ""
        raise ValueError(f"{option} must be a size with its unit, such as 24GB or 24GiB, got {text!r}{unit}")
    return size


def machine_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def title(shape: ModelShape, workload: Workload) -> str:
    layers = "all layers" if workload.layers is None else f"layers {layer_ranges(workload.layers)}"
    where = "on a GPU" if workload.device == "cuda" else "in one memory"
    if workload.processes > 1:
        where += f", each of {workload.processes} processes"
    return f"{shape.name}, {layers}, {workload.micro_batch} x {workload.sequence} tokens, {where}; in GB = 1e9 bytes"


def table(
    shape: ModelShape, workload: Workload, choice: Choice, device_bytes: float, host_bytes: float | None
) -> Table:
    """Return a table of GB by kind, at the peaks of device and host: a column per memory mode, one for the machine."""
    alone = workload.processes == 1 and workload.memory == "auto"
    ways = {name: one for name, one in choice.estimates.items() if not (alone and WAYS[name].spreads)}
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("")
    for way in ways:
        found.add_column(way, justify="right", style="bold" if way == choice.way else None, no_wrap=True)
    found.add_column("there is", justify="right", no_wrap=True)
    for kind in _KINDS:
        if any(kind in one.device for one in ways.values()):
            found.add_row(kind, *(_gb(one.device.get(kind)) for one in ways.values()))
    found.add_row("device peak", *(_gb(one.device_peak) for one in ways.values()), _gb(device_bytes))
    found.add_row("peak in", *(one.phase for one in ways.values()))
    if host_bytes is not None:
        found.add_section()
        for kind in _KINDS:
            if any(kind in one.host for one in ways.values()):
                found.add_row(f"host: {kind}", *(_gb(one.host.get(kind)) for one in ways.values()))
        found.add_row("host, loading", *(_gb(one.loading) for one in ways.values()))
        found.add_row("host peak", *(_gb(one.host_needed) for one in ways.values()), _gb(host_bytes))
    found.add_section()
    found.add_row("fits", *("no" if way in choice.refusals else "yes" for way in ways))
    base, linears = WAYS["quantized"].base(workload.quantization), shape.layers * len(shape.matrices)
    counts = ("all" if one.quantized == linears else str(one.quantized or "none") for one in ways.values())
    found.add_row(f"linears in {base}", *counts, str(linears))
    if any(one.batches_at_once for one in ways.values()):
        found.add_row("batches at once", *(str(one.batches_at_once or "") for one in ways.values()))
    shown = (f"{each.seconds:.0f}" if each.seconds >= 10 else f"{each.seconds:.2g}" for each in ways.values())
    found.add_row("seconds per step", *shown)
    return found


def remarks(shape: ModelShape, workload: Workload, choice: Choice) -> list[str]:
    """Return lines that a reader of the table must know."""
    lines = [f"memory: {choice.way}. {choice.reason}" if choice.way else choice.reason]
    if choice.way is None:
        near = choice.nearest
        lines.append(
            _shortage_line(shape, workload, choice)
            if near is None
            else f"nearest that fits: {difference(workload, near)}"
        )
    quantized = choice.estimates["quantized"]
    if workload.memory == "auto" and workload.quantization is None:
        refusal = choice.refusals.get("quantized")
        would = f"cannot be taken: {refusal}" if refusal else f"would fit in {gigabytes(quantized.device_peak)}"
        lines.append(f"quantized, which auto does not choose because it changes the base, {would}")
    lines += _budget_lines(shape, workload)
    lines += _mixture_lines(shape, choice)
    reserve = RESERVE[workload.device]
    if reserve:
        lines.append(f"{gigabytes(reserve)} of the GPU are set aside for its context and the allocator's fragments")
    if workload.processes > 1:
        way = choice.way or workload.memory  # auto if nothing fits
        spreads = way in WAYS and WAYS[way].spreads
        weights = "a share of all weights" if spreads else "its own weights"
        lines.append(
            f"{workload.processes} processes on one machine: each runs at most {workload.own_accumulation} of a "
            f"step's {workload.accumulation} micro-batches, holds {weights}, and has a share of the machine's "
            "memory; seconds exclude the time for summing gradients"
        )
    lines.append(
        f"seconds, for {workload.own_accumulation} micro-batch{'' if workload.own_accumulation == 1 else 'es'} per "
        f"step, are not measured: {ASSUMED[workload.device]}"
    )
    return lines


def difference(workload: Workload, near: Workload) -> str:
    """Return the options that turn workload into near."""
    changed = []
    for item in dataclasses.fields(Workload):
        value = getattr(near, item.name)
        if value != getattr(workload, item.name):
            option = _option(item.name)
            taken_back = value is False or value is None
            changed.append(f"without {option}" if taken_back else option if value is True else f"{option} {value}")
    return " ".join(changed)


def as_dictionary(
    shape: ModelShape, workload: Workload, choice: Choice, device_bytes: float | None, host_bytes: float | None
) -> dict[str, Any]:
    """Return the table's numbers. On top: the chosen mode's; if none fits, those of the one asked for or layerwise."""
    asked = workload.memory if workload.memory != "auto" else "layerwise"
    shown = choice.estimates[choice.way or asked]
    ways = {
        way: {
            "device_peak_gb": one.device_peak / 1e9,
            "host_peak_gb": one.host_needed / 1e9,
            "device_gb": {kind: size / 1e9 for kind, size in one.device.items()},
            "host_gb": {kind: size / 1e9 for kind, size in one.host.items()},
            "host_loading_gb": one.loading / 1e9,
            "quantized_linears": one.quantized,
            "batches_at_once": one.batches_at_once,
            "peak_in": one.phase,
            "seconds_a_step": one.seconds,
            "fits": way not in choice.refusals,
            "refusal": choice.refusals.get(way),
        }
        for way, one in choice.estimates.items()
    }
    return {
        "model": shape.name,
        "memory": choice.way,
        "device_peak_gb": shown.device_peak / 1e9,
        "host_peak_gb": shown.host_needed / 1e9,
        "seconds_a_step": shown.seconds,
        "seconds_assume": ASSUMED[workload.device],
        "reason": choice.reason,
        "nearest": None if choice.nearest is None else dataclasses.asdict(choice.nearest),
        "device_limit_gb": None if device_bytes is None else device_bytes / 1e9,
        "host_limit_gb": None if host_bytes is None else host_bytes / 1e9,
        "reserve_gb": RESERVE[workload.device] / 1e9,
        "setting": dataclasses.asdict(workload),
        "chosen": None if choice.chosen is None else dataclasses.asdict(choice.chosen),
        "ways": ways,
    }


# ---------------------------------------------------------------------------------------------- private


def _shortage_line(shape: ModelShape, workload: Workload, choice: Choice) -> str:
    """Return a line for the case that no setting fits: what is missing, and what to do."""
    said = "no setting was found that fits"
    if choice.least is not None:
        place, needed = choice.least
        of = " of the GPU" if workload.device == "cuda" else ""
        what = f"all need {gigabytes(needed)}{of} or more"
        said += f": {what if place == 'device' else f'what fits the GPU needs {gigabytes(needed)} of the host or more'}"
    fewer = "mask fewer layers (--layers)"
    if shape.mixture is not None:
        fewer += " or attention alone (--target-modules q_proj,k_proj,v_proj,o_proj)"
    return f"{said}; {fewer}, or take a smaller model"


def _budget_lines(shape: ModelShape, workload: Workload) -> list[str]:
    """Return a line on the size of the mask file under a budget: about the entropy, which the coding nearly reaches."""
    share = workload.budget
    if share is None:
        return []
    weights = RunSizes(shape, WAYS["plain"].adapt(workload)).masked_weights
    bits = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    return [
        f"a budget of {share:g} drops at most {int(share * weights):,d} of {weights:,d} masked weights: a file of "
        f"up to about {bits * weights / 8e6:.2g} MB ({bits:.2g} bits per weight)"
    ]


def _mixture_lines(shape: ModelShape, choice: Choice) -> list[str]:
    """Return lines about a mixture of experts, and about the properties of such models."""
    mixture, lines = shape.mixture, list[str]()
    if mixture is None:
        return lines
    held = shape.layers * (shape.layer_weights - sum(n * k for n, k in shape.linears.values())) * shape.dtype_bytes
    weights = f"{gigabytes(held)} of the {gigabytes(shape.parameters * shape.dtype_bytes)} of weights"
    lines.append(f"{mixture.experts} experts per layer, {mixture.top_k} per token: {weights}, all held in memory")
    if any(one.quantized for one in choice.estimates.values()):
        lines[-1] += "; with a quantised base, each product dequantises the weights of one layer"
    if shape.checkpoint:
        lines.append(
            f"the checkpoint holds weights in {shape.checkpoint}; masks need dequantised weights, so the estimate "
            "counts those"
        )
    if shape.has_sinks:
        lines.append(
            "attention is counted as transformers runs it without further packages, eagerly: T x T per head, so "
            "shorter rows need much less"
        )
    return lines


def _option(name: str) -> str:
    return f"--{_OPTIONS.get(name, name)}"


def _gb(size: float | None) -> str:
    return f"{size / 1e9:.2f}" if size else ""
