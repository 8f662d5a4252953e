"""Print Markdown tables of stored results by machine: python -m benchmarks.tables [ops | cpu | train_step] ..."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .records import RESULTS, Record, by_machine


def ops_tables(record: Record) -> list[str]:
    """Return one table per op with the ratios of every competitor at every shape and M; then the work once per step."""
    cases, parts = record["cases"], []
    for op in dict.fromkeys(case["op"] for case in cases if case["m"]):
        own = [case for case in cases if case["op"] == op]
        tokens = sorted({case["m"] for case in own})
        keys = dict.fromkeys((c["n"], c["k"], c["competitor"]) for c in own if c["competitor"] != "dense")
        rows = []
        for n, k, name in keys:
            found = {c["m"]: c for c in own if (c["n"], c["k"], c["competitor"]) == (n, k, name)}
            rows.append([f"{n} x {k}", name, *(_ratio_and_share(found.get(m)) for m in tokens)])
        header = ["shape", "time / the dense layer's (% of the roofline)", *(f"M = {m}" for m in tokens)]
        parts.append(f"**{op}**\n\n{markdown(header, rows)}")
    once = [case for case in cases if not case["m"]]
    rows = [
        [c["op"], f"{c['n']} x {c['k']}", c["competitor"], f"{c['ms']['median']:.3g}", _ratio_and_share(c)]
        for c in once
    ]
    parts.append("**once a step**\n\n" + markdown(["op", "shape", "", "ms", "time / the first (% of copy)"], rows))
    ceilings = ", ".join(f"{name} {spread['median']:.4g}" for name, spread in record["ceilings"].items())
    return [*parts, f"Ceilings of the run: {ceilings}."]


def train_step_tables(record: Record) -> list[str]:
    """Return one table per model: tokens/s, peak memory, seconds by kind."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in record["competitors"]):
        own = [row for row in record["competitors"] if row["model"] == model]
        kinds = list(own[0]["ms_by_kind"])
        rows = [
            [
                row["competitor"],
                _with_quartiles(row["tokens_per_s"]),
                f"{row['peak_gb']:.2f}",
                *(f"{row['ms_by_kind'][kind] / 1e3:.2f}" for kind in kinds),
            ]
            for row in own
        ]
        header = [model, "tokens/s [quartiles]", "peak GB", *(f"{kind}, s" for kind in kinds)]
        parts.append(markdown(header, rows))
    return parts


def scaling_tables(record: Record) -> list[str]:
    """Return one table per setting: seconds per step."""
    parts = []
    for axis in dict.fromkeys(point["axis"] for point in record["points"]):
        own = [point for point in record["points"] if point["axis"] == axis]
        values = list(dict.fromkeys(point["value"] for point in own))
        rows = []
        for name in dict.fromkeys(point["competitor"] for point in own):
            times = {p["value"]: p["ms"]["median"] / 1e3 for p in own if p["competitor"] == name}
            rows.append([name, *(f"{times[value]:.3g}" for value in values)])
        parts.append(markdown([f"s a step, {axis} =", *map(str, values)], rows))
    return parts


def many_masks_tables(record: Record) -> list[str]:
    """Return the loss of every task under every mask, nats per token (difference from the base); then the bytes."""
    own = record["losses"]
    masks = list(dict.fromkeys(row["mask"] for row in own))
    losses = []
    for task in dict.fromkeys(row["task"] for row in own):
        found = {row["mask"]: row for row in own if row["task"] == task}
        losses.append([task, *(_loss_and_difference(found[mask]) for mask in masks)])
    sizes = [[name, f"{size:,d}"] for name, size in record["bytes"].items()]
    return [markdown(["held-out loss of", *masks], losses), markdown(["", "bytes"], sizes)]


def cpu_tables(record: Record) -> list[str]:
    """Return goals and whether they are met; cases relative to dense and eager; what is slower than eager; ceilings."""
    cases = record["cases"]
    asked = [case for case in cases if case["target"] is not None]
    rows = [
        [
            case_name(case),
            case["competitor"],
            f"{case['target']:.2f}",
            f"{case['ratio']['median']:.2f}",
            "met" if case["ratio"]["median"] <= case["target"] else "NOT MET",
        ]
        for case in asked
    ]
    header = ["times the dense layer", "", "target", "measured", ""]
    parts = [markdown(header, rows) if asked else "Nothing is asked of this instruction set beside dense."]
    names = list(dict.fromkeys(case["competitor"] for case in cases if case["competitor"] != "dense"))
    rows = []
    for place in dict.fromkeys(map(case_name, cases)):
        own = {case["competitor"]: case for case in cases if case_name(case) == place}
        dense = own["dense"]
        first = f"{dense['ms']['median']:.3g} ({100 * dense['share']:.0f})"
        rows.append([place, first, *(_ratio_and_share(own[name]) for name in names)])
    header = ["", "dense, ms (% of the ceiling)", *(f"{name}, times dense (%)" for name in names)]
    parts.append(markdown(header, rows))
    slower = [f for f in record["findings"] if "/ eager" in f["quantity"] and f["met"] is False]
    told = "; ".join(f"{f['quantity']}: {f['measured']['median']:.2f}" for f in slower)
    parts.append(f"Slower than eager PyTorch by more than 5 %: {told or 'nowhere'}.")
    return [*parts, *map(_ceilings, record["ceilings"])]


def generate_tables(record: Record) -> list[str]:
    """Return tokens/s by dtype."""
    rows = record["competitors"]
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    found = {(row["dtype"], row["competitor"]): row for row in rows}
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = [[name, *(_with_quartiles(found[dtype, name]["tokens_per_s"]) for dtype in dtypes)] for name in names]
    return [markdown(["tokens/s [quartiles]", *dtypes], lines)]


def experts_tables(record: Record) -> list[str]:
    """Return one row per case: ms of grouped_mm, and the others relative to it; bold if ours misses the goal."""
    cases = record["cases"]
    names = [name for name in dict.fromkeys(case["competitor"] for case in cases) if name != "grouped_mm"]
    rows = []
    for place in dict.fromkeys(map(experts_case_name, cases)):
        own = {case["competitor"]: case for case in cases if experts_case_name(case) == place}
        ratios = [_bold_above_target(own[name]) if name in own else "" for name in names]
        rows.append([place, f"{own['grouped_mm']['ms']['median']:.3g}", *ratios])
    return [markdown(["", "grouped_mm, ms", *(f"{name}, times that" for name in names)], rows)]


def experts_case_name(case: Record) -> str:
    """Return a case of `experts` in words."""
    tokens = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
    return f"{case['op']}, {case['dtype']}, {case['experts']} experts, {tokens}"


def launch_tables(record: Record) -> list[str]:
    """Return one table per dtype: us per call, the difference from nn.Linear, and whether that meets the goal."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in record["calls"]):
        rows = []
        for row in (row for row in record["calls"] if row["dtype"] == dtype):
            above, target = row["above"], row["target"]
            rows.append(
                [
                    f"{row['situation']}: {row['competitor']}",
                    _with_quartiles(row["us"]),
                    "" if above is None else _with_quartiles(above),
                    "" if target is None else f"{target:g}",
                    "" if target is None else "met" if above["median"] <= target else "NOT MET",
                ]
            )
        parts.append(markdown([f"us, {dtype}", "a call [quartiles]", "above nn.Linear's", "at most", ""], rows))
    return parts


def case_name(case: Record) -> str:
    """Return a case of `cpu` in words."""
    thread = ", 1 thread" if case["threads"] == 1 else ""
    return f"{case['op']}, {case['dtype']}, {case['n']} x {case['k']}, M = {case['m']}{thread}"


def _ceilings(found: Record) -> str:
    told = [
        f"{dtype} GEMM {by['gemm_gflops']['median']:.4g} GFLOP/s, reading {by['read_gb_per_s']['median']:.3g} GB/s, "
        f"copy {by['copy_gb_per_s']['median']:.3g}"
        for dtype, by in found.items()
        if dtype != "threads"
    ]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return f"Ceilings of the run, {threads}: {'; '.join(told)}."


TABLES: dict[str, Callable[[Record], list[str]]] = {
    "ops": ops_tables,
    "train_step": train_step_tables,
    "scaling": scaling_tables,
    "cpu": cpu_tables,
    "generate": generate_tables,
    "decode": generate_tables,
    "experts": experts_tables,
    "launch": launch_tables,
    "many_masks": many_masks_tables,
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def origin(record: Record) -> str:
    """Return where a record was measured."""
    where = record["environment"]
    dirty = " and changes" if where["tree_is_dirty"] else ""
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    # Records with one backend, and older records, need only that backend's own description.
    named = where.get("backends", {})
    backend = ", ".join(f"{name} = {told}" for name, told in named.items()) if len(named) > 1 else where["backend"]
    return (
        f"{record['title']}. {where['device']}, {threads}, torch {where['torch']}, "
        f"{backend}, commit {where['commit'][:10]}{dirty}, {where['date'][:10]}."
    )


def show(question: str, record: Record) -> None:
    """Print the tables of a record, if its question has any."""
    if question in TABLES:
        print("\n\n".join([origin(record), *TABLES[question](record)]) + "\n")


def main() -> None:
    """Print the tables of the named questions, or of those that have results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("questions", nargs="*", help=f"among {', '.join(TABLES)}; all that are stored unless given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    stored = {question: by_machine(asked.results, question) for question in TABLES}
    for question in asked.questions or [question for question in TABLES if stored[question]]:
        if not stored.get(question):
            parser.error(f"questions must be stored ones among {', '.join(TABLES)}, got {question} ({asked.results})")
        for record in stored[question].values():
            show(question, record)


def _ratio_and_share(case: Record | None) -> str:
    if case is None:
        return ""
    share = f" ({100 * case['share']:.0f})" if "share" in case else ""
    return f"{case['ratio']['median']:.3g}{share}"


def _bold_above_target(case: Record) -> str:
    ratio = case["ratio"]["median"]
    return f"**{ratio:.2f}**" if case["target"] is not None and ratio > case["target"] else f"{ratio:.2f}"


def _loss_and_difference(row: Record) -> str:
    shown = f"{row['loss']:.4f}"
    return f"{shown} ({row['difference']:+.4f} ± {row['error']:.4f})" if row["difference"] else shown


def _with_quartiles(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} [{spread['low']:.3g}, {spread['high']:.3g}]"


if __name__ == "__main__":
    main()
