"""Write gpu.md and gpu-faster.json from the gpu-*.json in a folder: failures first, then all figures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mft_kernels.backends.triton.cards import L2_RATE

from ..tables import markdown
from .cases import (
    AUTO,
    AUTO_PACKED,
    CUDA,
    CUDA_PACKED,
    DENSE,
    EAGER,
    FUSED,
    HELD,
    LAYER,
    PACKED,
    PASS,
    PLACE,
    Case,
)  # fmt: skip
from .faster_table import FASTER, is_wrong, table
from .results import (
    FAILED,
    MEASURED,
    NOT_MEASURED,
    REPORTED,
    SLOW,
    WAITING,
    Document,
    Record,
    figures,
    read,
    write_whole,
)

_COLUMNS = (
    FUSED, PLACE, DENSE, PASS, CUDA, CUDA_PACKED, PACKED, AUTO, AUTO_PACKED, LAYER, HELD, EAGER,
)  # fmt: skip
#: Prefix of a line about something missing that does not change the exit code.
WARNING = "WARNING"
_OPENING = """# Measured on a GPU

Written by `make gpu`. The gpu-*.json files in this folder hold the same numbers with every round.
"""
_DRY = """
**A dry run: kernels emulated on a CPU. No figure below was measured on a GPU, and none says anything of one.**
"""
_TIMED = """Times are ms, medians [quartiles] of rounds in which the competitors take turns, of CUDA graphs over inputs
that rotate through more copies than L2 holds; (q) marks what was queued behind a spin instead, (c) what was taken by
the clock. After it: % of cuBLAS; % of the floor that the bytes set / that the operations set; peak memory.
"""
_TITLES = {
    "correctness": "Correctness",
    "step": "A whole step: forward, d_x and d_scores",
    "forward": "Forward",
    "update": "A whole step with the optimiser",
    "d_x": "d_x",
    "d_scores": "d_scores",
    "accumulate": "d_scores, added to an fp32 buffer",
    "threshold": "The threshold and the packed mask",
    "accumulate_product": "grad.T @ x, added to an fp32 buffer",
    "score_step": "score_step",
    "codes": "Products over codes",
    "many": "A mask for each row",
    "experts": "Products over experts",
    "host": "What a caller waits for at few tokens",
    "train": "Whole optimiser steps",
}
_WHERE = (
    "device",
    "driver",
    "torch",
    "triton",
    "triton_kernels",
    "cuda_library",
    "python",
    "commit",
    "tree_is_dirty",
    "sources",
    "date",
)


def write(out: Path) -> list[Document]:
    """Write both files if there are any results, and return the documents that they were made from."""
    documents = read(out)
    if not documents:
        return []
    if found := table(documents):
        write_whole(out / FASTER, found)
    elif is_wrong(documents):
        (out / FASTER).unlink(missing_ok=True)
    (out / "gpu.md").write_text(text(documents))
    return documents


def text(documents: Sequence[Document]) -> str:
    """Return the Markdown of all documents."""
    parts = [_OPENING, top(documents), choices(documents), f"## Where\n\n{_where(documents)}\n", _TIMED]
    for document in documents:
        parts.append(f"## {_TITLES[document['what']]}\n")
        parts += [_checks(document)] if document["what"] == "correctness" else _timed(document)
        parts.append(_remarks(document))
    return "\n".join(part for part in parts if part)


def top(documents: Sequence[Document]) -> str:
    """Return what a reader must know: failures, and what was not checked."""
    failed = [f"- {line}" for line in failures(documents)] or ["Nothing."]
    states = [record["status"] for _, record in _records(documents)]
    counts = f"{states.count(MEASURED)} of {len(states)} cases were measured, {states.count(FAILED)} failed."
    dry = any(document["environment"].get("dry_run") for document in documents)
    lines = ["## What failed", "", *failed, "", *(f"- {line}" for line in gaps(documents)), "", counts, _DRY * dry]
    return "\n".join(lines)


def failures(documents: Iterable[Document]) -> list[str]:
    """Return failures in words, one per line; those of correctness come first, in the order of the documents."""
    lines = []
    for case, record in _records(documents):
        lines += [f"{case}: {name}: {why}" for name, why in record.get("failures", {}).items()]
        if record["status"] != FAILED:
            continue
        if record.get("reason"):
            lines.append(f"{case}: {record['reason']}")
        if "failed" in record:
            cut = "" if record.get("complete", True) else ", and it was cut short"
            total = record["passed"] + record["failed"]
            lines.append(f"{case}: {record['failed']} of {total} checks failed{cut}")
            lines += [f"{case}: {complaint}" for complaint in record.get("complaints", [])]
    return lines


def gaps(documents: Sequence[Document]) -> list[str]:
    """Return what was not checked, although nothing says that it is wrong."""
    lines = []
    for environment in [document["environment"] for document in documents][:1]:
        library = environment.get("cuda_library", "")
        if library.startswith("none: "):
            lines.append(f"{WARNING}: the CUDA kernels were left out: {library.removeprefix('none: ')}")
        lines += [
            f"LACKING: this card's own {why}; the general kernels were measured in their place"
            for why in environment.get("cuda_lacks", [])
        ]
    for case, record in _records(documents):
        lines += [f"SLOW: {case}: {name}: {why}" for name, why in record.get("slow", {}).items()]
        if record["status"] == SLOW:
            lines.append(f"SLOW: {case}: {record['reason']}")
        if record["status"] == REPORTED:
            lines.append(f"THE SANITIZER SAYS: {case}: {record['reports']} errors, and no result was wrong")
            lines += [f"{case}: {complaint}" for complaint in record["complaints"]]
        if record.get("unproven"):
            lines.append(f"UNPROVEN: {record['detail']}: {record['reason']}")
    return lines


def _records(documents: Iterable[Document]) -> Iterable[tuple[Case, Record]]:
    return ((Case.of(record), record) for document in documents for record in document["cases"])


def choices(documents: Sequence[Document]) -> str:
    """Return one row per case and decision: the way that ran, the model's, the fastest, the regret, and the goals."""
    rows = []
    for case, record in _records(documents):
        goals = [
            f"{name}: {goal['ratio']:.2f}, {'met' if goal['met'] else 'not met'} ({goal['goal']:.2f})"
            for name, goal in record.get("goals", {}).items()
        ]
        for what, found in record.get("choice", {}).items():
            if what != "ran":
                ran = record["choice"]["ran"] if what == "an op" else PLACE
                regret = f"{100 * found['regret']:.0f} %"
                rows.append([str(case), what, ran, found["model"], found["fastest"], regret, "; ".join(goals)])
    if not rows:
        return ""
    rates = {document["ceilings"].get("l2_rate", 0) for document in documents if document["ceilings"]}
    measured = ", ".join(f"{rate:.1f}" for rate in sorted(rates))
    rate = f"Bytes per cycle and multiprocessor from L2: {measured}; in cards.py {L2_RATE}."
    heads = ["", "for", "ran", "model", "fastest", "regret", "relative to cuBLAS, with the model's goal"]
    return f"## Choices\n\n{rate} The model takes the measured one.\n\n{markdown(heads, rows)}\n"


def _where(documents: Sequence[Document]) -> str:
    """Return one row per run: what one command measured has one environment, including its date."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for document in documents:
        environment, ceilings = document["environment"], document["ceilings"]
        values = [str(environment.get(key, ""))[: 12 if key == "commit" else None] for key in _WHERE]
        if ceilings:
            rates = ceilings["bytes_per_second"] / 1e12, ceilings["flops_per_second"] / 1e12
            values += [f"{rates[0]:.2f}", f"{rates[1]:.0f}"]
        runs.setdefault(tuple(values), []).append(document["what"])
    rows = [[", ".join(whats), *values] for values, whats in runs.items()]
    return markdown(["measured", *_WHERE, "copy, TB/s", "cuBLAS, TFLOP/s"], rows)


def _checks(document: Document) -> str:
    rows = []
    for record in document["cases"]:
        counts = [str(record.get(key, "")) for key in ("passed", "failed", "skipped")]
        cut = "" if record.get("complete", True) else ", cut short"
        warnings = f", {record['warnings']} warnings" if record.get("warnings") else ""
        rows.append([record["detail"], record["status"] + cut + warnings, *counts])
    return markdown(["", "", "passed", "failed", "skipped"], rows) + "\n"


def _timed(document: Document) -> Iterable[str]:
    """Yield a table for each shape and detail: one row per number of tokens, one column per competitor."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in document["cases"]:
        if record.get("reason") == WAITING:
            continue
        # For training, the ways are rows; other details are separate tables.
        detail = "" if document["what"] == "train" else record["detail"]
        groups.setdefault((detail, record["n"], record["k"]), []).append(record)
    for key, records in groups.items():
        found = dict.fromkeys(
            name for record in records for kind in ("samples", "failures", "slow") for name in record.get(kind, {})
        )
        names = sorted(found, key=lambda name: _COLUMNS.index(name) if name in _COLUMNS else len(_COLUMNS))
        detail, n, k = key
        yield f"### {Case(document['what'], n, k, 0, detail)}\n"
        if not names:
            yield "Not measured.\n"
            continue
        rows = []
        for record in sorted(records, key=lambda record: record["m"]):
            first = Case.of(record | {"n": 0, "k": 0, "detail": "" if detail else record["detail"]}).place
            cells = [_cell(record, name) for name in names]
            rows.append([first, *cells])
        yield markdown(["", *names], rows) + "\n"


def _cell(record: Record, name: str) -> str:
    if name in record.get("failures", {}):
        return "FAILED"
    if name in record.get("slow", {}):
        return SLOW
    if name in record.get("samples", {}):
        return figures(record["samples"][name])
    return record["status"] if not record.get("samples") else ""


def _remarks(document: Document) -> str:
    """Return why something is not in the tables, each reason once with its places."""
    places: dict[str, list[str]] = {}
    waiting = 0
    for case, record in _records([document]):
        if record.get("reason") == WAITING:
            waiting += 1
        elif record["status"] == NOT_MEASURED and not record.get("unproven"):
            places.setdefault(f"not measured: {record['reason']}", []).append(case.place)
        for name, why in record.get("left_out", {}).items():
            places.setdefault(f"{name}: {why}", [])
        for name, sample in record.get("samples", {}).items():
            if "note" in sample:
                places.setdefault(f"{name} was not captured: {sample['note']}", [])
        if record["status"] not in (FAILED, REPORTED):
            for remark in record.get("complaints", []):
                places.setdefault(remark, []).append(case.place)
    lines = [f"- {remark}" + (f" ({'; '.join(at)})" if at else "") for remark, at in places.items()]
    lines += [f"- {waiting} cases were not measured: {WAITING}"] if waiting else []
    return "\n".join(lines) + "\n" if lines else ""
