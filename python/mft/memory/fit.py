"""Choose the fastest memory mode that fits; if none does, find the nearest setting that would fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mft.memory.estimate import Estimate, estimate
from mft.memory.shapes import ModelShape
from mft.memory.ways import WAYS, ways_over
from mft.memory.workload import Workload
from mft.number_formats import AUTO, MOMENT_FORMATS, SCORE_FORMATS, formats_no_wider
from mft.quantizers import DEFAULT

# Bytes of the device on top of the allocated ones: a CUDA context (about 0.4 GB), cuBLAS's workspace (up to 32 MiB) and
# the allocator's fragmentation. Not measured.
RESERVE = {"cuda": 600_000_000, "cpu": 0}
# Formats of (scores, moments) that "auto" tries, the widest first. int16 flips fewer bits wrongly than bfloat16
# (docs/how-to/memory.md). bfloat16 scores work with autograd and with fixed thresholds.
_FORMATS = (("float32", "float32"), ("float32", "8bit"), ("int16", "8bit"), ("bfloat16", "8bit"))
_SHORTEST = 512  # tokens; the search for a setting goes no lower
# The cost of changing a setting. Smaller micro-batches change no result; another base changes it most.
_COSTS = {"memory": 4, "micro_batch": 1, "moments": 2, "scores": 3, "accumulation": 4, "sequence": 5, "quantization": 9}
_COSTS |= {"batches_at_once": 1}


@dataclass(frozen=True)
class Choice:
    """The result of choose.

    estimates: Estimates of all memory modes. refusals: why a mode cannot be used, or that it does not fit.
    chosen: the workload as it will run; None if nothing fits. reason: for the choice, in a sentence.
    nearest: if nothing fits, the fitting setting that is closest to the requested one, or None.
    least: if there is no such setting, the memory that is too small in every setting ("device" or "host"), and the
        fewest bytes that a setting needs: of the device in any setting, or of the host in those that fit the device.
    """

    estimates: dict[str, Estimate]
    refusals: dict[str, str]
    chosen: Workload | None
    reason: str
    nearest: Workload | None = None
    least: tuple[str, int] | None = None

    @property
    def way(self) -> str | None:
        return None if self.chosen is None else self.chosen.memory


def choose(
    shape: ModelShape, workload: Workload, device_bytes: float | None, host_bytes: float | None = None
) -> Choice:
    """Choose the mode that workload.memory names, if it fits; for "auto", the fastest mode that fits.

    If the format of scores or moments is "auto", it becomes the widest with which one of these modes fits.
    The mode quantized changes the base, so auto takes it only if workload.quantization asks for a quantised base.
    device_bytes: of the device, or of a machine without a GPU. None: no limit. Raises: ValueError as estimate does.
    """
    widest, *narrower = _formats(workload)
    choice = first = _choose_way(shape, widest, device_bytes, host_bytes)
    last = _candidates(workload)[-1]
    if all(WAYS[name].obstacle(widest, first.estimates[name].quantized) for name in _candidates(workload)):
        narrower = []  # memory is not the reason
    for formats in narrower:
        if choice.chosen is not None:
            break
        choice = _choose_way(shape, formats, device_bytes, host_bytes)
        said = f"scores in {formats.scores} and moments in {formats.moments}"
        said += f": with wider ones {last} {first.refusals[last]}" if choice.chosen else ", the narrowest"
        choice = replace(choice, reason=f"{choice.reason}; {said}")
    if choice.chosen is not None:
        return choice
    nearest, least = _nearest(shape, workload, device_bytes, host_bytes)
    return replace(choice, nearest=nearest, least=least)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


# ---------------------------------------------------------------------------------------------- private


def _formats(workload: Workload) -> list[Workload]:
    """Return the workload with each format of scores and moments that is "auto" filled in, the widest first."""
    found = [
        replace(
            workload,
            scores=scores if workload.scores == AUTO else workload.scores,
            moments=moments if workload.moments == AUTO else workload.moments,
        )
        for scores, moments in _FORMATS
    ]
    return list(dict.fromkeys(found))


def _choose_way(shape: ModelShape, workload: Workload, device_bytes: float | None, host_bytes: float | None) -> Choice:
    """Choose the memory mode for a workload whose formats are set."""
    fitted = {name: _fit_batches(shape, way.adapt(workload), device_bytes, host_bytes) for name, way in WAYS.items()}
    estimates = {name: found for name, (_, found) in fitted.items()}
    refusals = {}
    for name, found in estimates.items():
        obstacle = WAYS[name].obstacle(workload, found.quantized)
        obstacle = obstacle or _shortage(found, workload.device, device_bytes, host_bytes)
        if obstacle is not None:
            refusals[name] = obstacle
    asked = _candidates(workload)
    way = next((way for way in asked if way not in refusals), None)
    if way is None:
        reason = "; ".join(f"{way}: {refusals[way]}" for way in asked)
        return Choice(estimates, refusals, None, f"nothing fits: {reason}")
    chosen, _ = fitted[way]
    reasons = ["it was asked for, and fits"]
    if workload.memory == "auto":
        reasons = ["it is the fastest way that fits"]
        reasons += [f"{other} cannot be taken: {refusals[other]}" for other in asked[: asked.index(way)]]
    if chosen.batches_at_once != workload.batches_at_once:
        reasons.append(
            f"{chosen.batches_at_once} of a step's {chosen.own_accumulation} batches at once: the hidden states of "
            "more do not fit"
        )
    return Choice(estimates, refusals, chosen, "; ".join(reasons))


def _candidates(workload: Workload) -> list[str]:
    if workload.memory != "auto":
        return [workload.memory]
    return [way.name for way in ways_over(workload.quantization, workload.device)]


def _fit_batches(
    shape: ModelShape, workload: Workload, device_bytes: float | None, host_bytes: float | None
) -> tuple[Workload, Estimate]:
    """Set batches_at_once, if it is None, to the most that fit; if none fit, to the value that needs the least."""

    def needed(at_once: int | None) -> tuple[Workload, Estimate]:
        changed = replace(workload, batches_at_once=at_once)
        return changed, estimate(shape, changed)

    def fits(found: Estimate) -> bool:
        return _shortage(found, workload.device, device_bytes, host_bytes) is None

    whole = needed(workload.batches_at_once)
    is_open = workload.batches_at_once is None and WAYS[workload.memory].holds_all_rows
    fewer = _halvings(workload.own_accumulation, 1)[1:]
    # If the device has its own memory, fewer batches at once do not reduce its use.
    lacks_device = workload.device == "cuda" and _shortage(whole[1], "cuda", device_bytes, None) is not None
    if fits(whole[1]) or not is_open or not fewer or lacks_device:
        return whole
    least = needed(fewer[-1])
    if not fits(least[1]):
        return min(whole, least, key=lambda one: one[1].device_peak + one[1].host_needed)
    return next(one for one in (*map(needed, fewer[:-1]), least) if fits(one[1]))


def _shortage(found: Estimate, device: str, device_bytes: float | None, host_bytes: float | None) -> str | None:
    needed = found.device_peak + RESERVE[device]
    if device_bytes is not None and needed > device_bytes:
        with_reserve = f" (and {gigabytes(RESERVE[device])} for the context)" if RESERVE[device] else ""
        sizes = f"{gigabytes(found.device_peak)}{with_reserve} of {gigabytes(device_bytes)}"
        return f"needs {sizes}, {gigabytes(needed - device_bytes)} missing, in {found.phase}"
    if host_bytes is not None and found.host_needed > host_bytes:
        when = "" if found.host_peak > host_bytes else ", while the weights are loaded"
        return f"needs {gigabytes(found.host_needed)} of the host's {gigabytes(host_bytes)}{when}"
    return None


def _nearest(
    shape: ModelShape, workload: Workload, device_bytes: float | None, host_bytes: float | None
) -> tuple[Workload | None, tuple[str, int] | None]:
    """Return the cheapest combination of changes that fits, or Choice.least if none fits."""
    workloads = sorted(_variants(workload), key=lambda pair: pair[0])
    needed: list[tuple[int, int]] = []
    for _, changed in workloads:
        _, found = _fit_batches(shape, changed, device_bytes, host_bytes)
        if WAYS[changed.memory].obstacle(changed, found.quantized):
            continue
        if _shortage(found, workload.device, device_bytes, host_bytes) is None:
            scores = AUTO if workload.scores == AUTO else changed.scores
            return replace(changed, scores=scores, moments=AUTO if workload.moments == AUTO else changed.moments), None
        needed.append((found.device_peak + RESERVE[workload.device], found.host_needed))
    hosts = [host for device, host in needed if device_bytes is None or device <= device_bytes]
    if hosts:
        return None, ("host", min(hosts))
    return None, ("device", min(device for device, _ in needed)) if needed else None


def _variants(workload: Workload) -> Iterator[tuple[int, Workload]]:
    """Yield (cost, workload) for every combination of changes and every memory mode."""
    moments = ["8bit"] if workload.moments == AUTO else formats_no_wider(workload.moments, MOMENT_FORMATS)
    scores = ["int16", "bfloat16"] if workload.scores == AUTO else formats_no_wider(workload.scores, SCORE_FORMATS)
    bases = [(workload.quantization, workload.quantize_masked and workload.quantization is not None)]
    bases += [base for base in ((DEFAULT, False), (DEFAULT, True)) if base not in bases]
    rows = _halvings(workload.micro_batch, 1)
    accumulations = _halvings(workload.accumulation, workload.processes)
    lengths = _halvings(workload.sequence, min(_SHORTEST, workload.sequence))
    at_onces = dict.fromkeys((workload.batches_at_once, None))
    for row, kind, score, (base, masked), shorter, length, at_once in product(
        range(len(rows)), moments, scores, bases, range(len(accumulations)), range(len(lengths)), at_onces
    ):
        cost = _COSTS["micro_batch"] * row + _COSTS["sequence"] * length + _COSTS["accumulation"] * shorter
        cost += _COSTS["moments"] * (kind != workload.moments != AUTO)
        cost += _COSTS["scores"] * (score != workload.scores != AUTO)
        cost += _COSTS["quantization"] * (base != workload.quantization) + (masked != workload.quantize_masked)
        cost += _COSTS["batches_at_once"] * (at_once != workload.batches_at_once)
        # A smaller micro-batch means more of them, so the step keeps its rows.
        steps = max(workload.processes, workload.accumulation * workload.micro_batch // rows[row] >> shorter)
        ways = [way.name for way in ways_over(base, workload.device) if way.holds_all_rows or not shorter]
        for place, way in enumerate(ways):
            changed = replace(
                workload,
                memory=way,
                micro_batch=rows[row],
                accumulation=steps,
                batches_at_once=at_once,
                sequence=lengths[length],
                moments=kind,
                scores=score,
                quantization=base,
                quantize_masked=masked,
            )
            yield 10 * (cost + _COSTS["memory"] * (way not in _candidates(workload))) + place, changed


def _halvings(value: int, least: int) -> list[int]:
    """Return value, value / 2, ... down to least."""
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found
