"""The Markdown of a run, from its JSON alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..harness import Spread
from .cases import AUTO, COMPILED, CUDA, DENSE, EAGER, FUSED, KEPT, PACKED, PAPER, PASS, PRODUCTS, SHAPES
from .journal import NOT_MEASURED

Document = dict[str, Any]

_COLUMNS = (DENSE, CUDA, FUSED, PACKED, AUTO, PASS, KEPT, COMPILED, EAGER, PAPER)
_OPENING = """# Measured on a GPU

Written by `make gpu`; the same numbers, with every round, are in gpu-*.json beside this file.
Times are medians [quartiles] of rounds in which the competitors take turns, of CUDA graphs over inputs that rotate
through more copies than L2 holds. (q) marks what was queued behind a spin instead.
"""
_TITLES = {
    "correctness": "Correctness",
    "step": "A whole step: forward, d_x and d_scores",
    "forward": "Forward",
    "d_x": "d_x",
    "d_scores": "d_scores",
    "accumulate": "d_scores, added to an fp32 buffer",
    "memory": "Peak memory of a step",
    "threshold": "The threshold and the packed mask",
    "updates": "An optimiser step beside the products",
    "codes": "Products over codes",
    "experts": "Products over experts",
    "host": "What a caller waits for at few tokens",
    "train": "Whole optimiser steps",
    "sweep": "Tiles: the plan's choice beside the best of all",
}
_DRY = """
**A dry run: kernels emulated on a CPU. No figure below was measured on a GPU, and none says anything of one.**
"""


def markdown(documents: Sequence[Document]) -> str:
    """All of them: where, goals, then a section each."""
    dry = any(document["environment"].get("dry_run") for document in documents)
    parts = [_OPENING + _DRY * dry, _where(documents), _goals(documents)]
    for document in documents:
        parts.append(f"## {_TITLES[document['what']]}\n")
        if document["what"] in PRODUCTS:
            parts += _product(document)
        else:
            parts.append(
                {
                    "correctness": _checks,
                    "memory": _memory,
                    "threshold": _threshold,
                    "updates": _updates,
                    "codes": _updates,
                    "experts": _updates,
                    "host": _host,
                    "train": _train,
                    "sweep": _sweep,
                }[document["what"]](document)
            )
        parts.append(_remarks(document))
    return "\n".join(part for part in parts if part)


def _where(documents: Sequence[Document]) -> str:
    """A row a run: what one command measured has one environment, its date included."""
    keys = (
        "device",
        "driver",
        "torch",
        "triton",
        "cuda_library",
        "python",
        "commit",
        "tree_is_dirty",
        "sources",
        "date",
    )
    runs: dict[tuple[str, ...], list[str]] = {}
    for d in documents:
        values = [str(d["environment"].get(key, "")) for key in keys]
        values[keys.index("commit")] = values[keys.index("commit")][:12]
        runs.setdefault((*values, *_ceilings(d)), []).append(d["what"])
    header = ["measured", *keys, "copy, TB/s", "cuBLAS, TFLOP/s"]
    return _table(header, [[", ".join(whats), *values] for values, whats in runs.items()])


def _ceilings(document: Document) -> list[str]:
    ceilings = document["ceilings"]
    if not ceilings:
        return ["", ""]
    return [f"{ceilings['bytes_per_second'] / 1e12:.2f}", f"{ceilings['flops_per_second'] / 1e12:.0f}"]


def _goals(documents: Sequence[Document]) -> str:
    rows = []
    for goal in (goal for document in documents for goal in document["goals"]):
        measured = f"{Spread(**goal['measured'])} {goal['unit']}".strip() if goal["measured"] else ""
        rows.append([goal["quantity"], measured, f"{goal['rule']} {goal['bound']:g}", goal["state"]])
    return "## Goals\n\n" + _table(["", "median [quartiles]", "goal", ""], rows) if rows else ""


def _checks(document: Document) -> str:
    rows = []
    for case in document["cases"]:
        if "failed" in case:
            cut = "" if case.get("complete", True) else ", cut short"
            cut += f", {case['warnings']} warnings" if case.get("warnings") else ""
            rows.append([case["detail"], str(case["passed"]), str(case["failed"]), str(case["skipped"]) + cut])
        else:
            rows.append([case["detail"], f"{case['status']}: {case.get('reason', '')}", "", ""])
    return _table(["", "passed", "failed", "skipped"], rows)


def _product(document: Document) -> Iterable[str]:
    known = [shape for shapes in SHAPES.values() for shape in shapes]
    shapes = dict.fromkeys((case["n"], case["k"]) for case in document["cases"])
    for n, k in sorted(shapes, key=lambda shape: (shape not in known, known.index(shape) if shape in known else shape)):
        cases = [case for case in document["cases"] if (case["n"], case["k"]) == (n, k)]
        cases.sort(key=lambda case: case["m"])
        found = {name for case in cases for name in case.get("samples", {})}
        columns = [name for name in _COLUMNS if name in found]
        yield f"### {document['what']}, N = {n}, K = {k}\n"
        if not columns:
            yield "not measured\n"
            continue
        yield "ms, and % of cuBLAS\n"
        yield _table(["M", *columns], [[str(case["m"]), *(_time(case, name) for name in columns)] for case in cases])
        yield "% of the floor that bytes set / that operations set\n"
        yield _table(["M", *columns], [[str(case["m"]), *(_floor(case, name) for name in columns)] for case in cases])


def _time(case: dict[str, Any], name: str) -> str:
    if case["status"] == NOT_MEASURED:
        return "not measured"
    if name in case.get("failures", {}):
        return "FAILED"
    sample = case.get("samples", {}).get(name)
    if sample is None:
        return ""
    share = f", {sample['percent_of_cublas']['median']:.0f} %" if "percent_of_cublas" in sample else ""
    return f"{_ms(sample)}{share}"


def _ms(sample: dict[str, Any]) -> str:
    median, low, high = (f"{sample['ms'][key]:.4g}" for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]" + (" (q)" if sample["method"] == "queued" else "")


def _floor(case: dict[str, Any], name: str) -> str:
    sample = case.get("samples", {}).get(name)
    return f"{sample['percent_of_byte_floor']:.0f} / {sample['percent_of_flop_floor']:.0f}" if sample else ""


def _memory(document: Document) -> str:
    rows = []
    for case in document["cases"]:
        place = f"{case['n']} x {case['k']}, M = {case['m']}"
        weight = case.get("weight_bytes", 0)
        for name, sample in case.get("samples", {}).items():
            peak, results = (f"{sample[key] / 1e6:.1f}" for key in ("peak_bytes", "result_bytes"))
            rows.append([place, name, peak, results, f"{100 * sample['beyond_results_of_weight']:.0f}",
                         f"{weight / 1e6:.1f}"])  # fmt: skip
        if not case.get("samples"):
            rows.append([place, case["status"], "", "", "", ""])
    header = ["", "", "peak, MB", "results, MB", "beyond them, % of the weight", "weight, MB"]
    return _table(header, rows)


def _threshold(document: Document) -> str:
    rows = []
    for case in document["cases"]:
        place = f"{case['n'] * case['k'] / 1e6:.1f}M {case['detail']}"
        for name, sample in case.get("samples", {}).items():
            faster = f"{sample['times_faster_than_sort']:.1f}" if "times_faster_than_sort" in sample else ""
            rows.append([place, name, _ms(sample), faster, f"{sample['percent_of_byte_floor']:.0f}"])
        if not case.get("samples"):
            rows.append([place, case["status"], "", "", ""])
    return _table(["scores", "", "ms", "times faster than sort", "% of the byte floor"], rows)


def _updates(document: Document) -> str:
    rows = []
    for case in document["cases"]:
        place = f"{case['detail']}, {case['n']} x {case['k']}" + (f", M = {case['m']}" if case["m"] else "")
        for name, sample in case.get("samples", {}).items():
            rows.append([place, name, _time(case, name), f"{sample['percent_of_byte_floor']:.0f}"])
        if not case.get("samples"):
            rows.append([place, case["status"], "", ""])
    return _table(["", "", "ms, and % of cuBLAS where it takes part", "% of the byte floor"], rows)


def _host(document: Document) -> str:
    names = list(dict.fromkeys(name for case in document["cases"] for name in case.get("samples", {})))
    rows = []
    for case in document["cases"]:
        times = [_ms(samples[n]) if n in (samples := case.get("samples", {})) else "" for n in names]
        rows.append([f"{case['n']} x {case['k']}", str(case["m"]), *(times or [case["status"]])])
    return "ms a call\n\n" + _table(["", "M", *(names or [""])], rows)


def _train(document: Document) -> str:
    rows = []
    for case in document["cases"]:
        model, way = case["detail"].rsplit(", ", 1)
        if "seconds_of_a_step" not in case:
            rows.append([model, way, case["status"], "", "", ""])
            continue
        seconds = Spread(**case["seconds_of_a_step"])
        row = [str(seconds), f"{case['estimate']['seconds']:.3f}", f"{case['peak_bytes'] / 1e9:.3f}"]
        rows.append([model, way, *row, f"{case['estimate']['device_peak'] / 1e9:.3f}"])
    header = ["", "", "s", "estimated, of a card as in memory.md", "allocator's peak, GB", "estimated, GB"]
    return _table(header, rows)


def _sweep(document: Document) -> str:
    rows = []
    for case in document["cases"]:
        place = f"{case['detail']}, {case['n']} x {case['k']}, M = {case['m']}"
        found, judged = case.get("configurations"), case.get("judged", {})
        if not found:
            rows.append([place, case["status"], *[""] * 5])
            continue
        shares = ["" if judged[key] is None else f"{100 * judged[key]:.1f}" for key in ("regret", "error")]
        tiles = [_tiles(judged[key]) for key in ("choice", "best")]
        rows.append([place, f"{len(found)} of {case['legal']}", f"{found[0]['ms']:.4g}", *shares, *tiles])
    header = ["", "timed", "best, ms", "regret of the choice, %", "error of the model, %", "choice", "best"]
    return _table(header, rows)


def _tiles(tiles: dict[str, int]) -> str:
    sizes = f"{tiles['rows']} x {tiles['columns']} x {tiles['inner']}"
    return (
        f"{sizes}, {tiles['warps']} warps, {tiles['stages']} stages, {tiles['blocks']} blocks, {tiles['splits']} splits"
    )


def _remarks(document: Document) -> str:
    """Everything that is not in the tables, once each with its places."""
    places: dict[str, list[str]] = {}
    for case in document["cases"]:
        place = f"{case['n']} x {case['k']}, M = {case['m']}" if case["m"] else f"{case['n']} x {case['k']}"
        place = case["detail"] if not case["n"] else f"{place} {case['detail']}".strip()
        if case["status"] == NOT_MEASURED:
            places.setdefault(f"not measured: {case.get('reason', '')}", []).append(place)
        elif "reason" in case:
            places.setdefault(f"{case['status']}: {case['reason']}", []).append(place)
        for name, why in case.get("failures", {}).items():
            places.setdefault(f"{name} FAILED: {why}", []).append(place)
        for name, why in case.get("left_out", {}).items():
            places.setdefault(f"{name}: {why}", [])
        for why in case.get("complaints", []):
            places.setdefault(why, []).append(place)
        for name, sample in case.get("samples", {}).items():
            if sample.get("note") and sample["method"] == "queued":
                places.setdefault(f"{name} was not captured: {sample['note']}", [])
    lines = [f"- {text}{' (' + '; '.join(where) + ')' if where else ''}" for text, where in places.items()]
    return "\n".join(lines) + "\n" if lines else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
