"""The tables of stored results, machines side by side: python -m benchmarks.tables [ops | cpu | train_step] ...

measured.py writes some of them into docs/reference/measured.md.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .records import RESULTS, Record, machine, read_machines

SQUARE = (4096, 4096)
STEPS = {
    "ours, from scores": "ours, from bf16 scores",
    "ours, module": "`MaskedLinear`, fp32 scores, mask memoised",
    "ours, held mask": "ours, held mask of 1 bit a weight, accumulating",
    "eager": "eager PyTorch from a given threshold, keeps the masked weight",
    "compiled": "the same under `torch.compile`",
    "LoRA": "LoRA of rank 16 (peft)",
    "the paper's layer": "the paper's layer (a sort in every forward)",
}
ONCE = {
    ("threshold", "ours"): "`kept_threshold`",
    ("threshold", "sort"): "`torch.sort`",
    ("threshold", "kthvalue"): "`kthvalue`",
    ("threshold", "copy"): "a copy of the scores",
    ("packing", "ours"): "`pack_mask`",
    ("optimiser", "ours, int16 and 8 bits"): "`score_step`, int16 scores and 8-bit moments, with the next mask",
    ("optimiser", "ours, fp32"): "`score_step`, fp32, with the next mask",
    ("optimiser", "torch AdamW, fused"): "torch's fused AdamW from finished gradients, without a mask",
    ("optimiser", "compiled"): "the same mathematics under `torch.compile`, fp32, without a mask",
}
#: Records of one question, by machine.
Records = Mapping[str, Record]
Table = Callable[[Records], str]
#: Cells by the head of their column and the name of their row.
Columns = dict[str, dict[str, str]]


def step_table(records: Records) -> str:
    """Return from `ops` the whole step of the square layer, in units of dense; one group of rows per machine."""
    found = {
        name: [c for c in r["cases"] if c["op"] == "step" and (c["n"], c["k"]) == SQUARE] for name, r in records.items()
    }
    tokens = sorted({case["m"] for cases in found.values() for case in cases} - {8})
    rows = []
    for name, cases in found.items():
        rows.append([f"*{machine(records[name])}*", *("" for _ in tokens)])
        shown = {(case["competitor"], case["m"]): _ratio(case["ratio"]["median"]) for case in cases}
        rows += [[label, *(shown.get((own, m), "") for m in tokens)] for own, label in STEPS.items()]
    return markdown(["", *(f"M = {m}" for m in tokens)], rows)


def once_table(records: Records) -> str:
    """Return from `ops` the work on 4096 x 4096 scores once per step, in ms; one column per machine."""
    columns = {}
    for record in records.values():
        own = [case for case in record["cases"] if not case["m"] and (case["n"], case["k"]) == SQUARE]
        known = {(case["op"], case["competitor"]): case["ms"]["median"] for case in own}
        columns[machine(record)] = {label: _three(known[key]) for key, label in ONCE.items() if key in known}
    return side_by_side("ms", columns, ONCE.values())


def train_step_table(records: Records) -> str:
    """Return from `train_step` tokens/s and peak memory of each model; one group of rows per machine."""
    models = list(dict.fromkeys(row["model"] for r in records.values() for row in r["competitors"]))
    rows = []
    for record in records.values():
        rows.append([f"*{machine(record)}*", *("" for _ in range(2 * len(models)))])
        own = {(row["model"], row["competitor"]): row for row in record["competitors"]}
        for name in dict.fromkeys(row["competitor"] for row in record["competitors"]):
            shown = [own[model, name] for model in models]
            rows.append(
                [name, *(t for row in shown for t in (f"{row['tokens_per_s']['median']:.0f}", f"{row['peak_gb']:.2f}"))]
            )
    return markdown(["", *(head for model in models for head in (f"{model}: tokens/s", "peak GB"))], rows)


def memory_table(records: Records) -> str:
    """Return from `memory` the % of the weight's bytes beyond the gradients; one column per machine."""
    columns = {
        machine(record): {found["quantity"]: f"{found['measured']['median']:.0f}" for found in record["findings"]}
        for record in records.values()
    }
    return side_by_side("% of the weight", columns)


def cpu_table(records: Records) -> str:
    """Return from `cpu` the times in units of dense, with the goal in brackets; one group of columns per machine."""
    columns: Columns = {}
    for record in records.values():
        for case in record["cases"]:
            if case["competitor"] != "dense":
                shown = _target_cell(_ratio, case["ratio"]["median"], case["target"], ".2f")
                columns.setdefault(f"{machine(record)}: {case['competitor']}", {})[case_name(case)] = shown
    return side_by_side("times dense (asked)", columns)


def shares_table(records: Records) -> str:
    """Return from `cpu` the % of the machine's ceilings that ours and dense reach; one group of columns per machine."""
    columns = {
        f"{machine(record)}: {own}": {
            case_name(case): f"{100 * case['share']:.0f}" for case in record["cases"] if case["competitor"] == own
        }
        for record in records.values()
        for own in ("dense", "ours, from scores", "ours, held mask")
    }
    return side_by_side("% of the ceiling", columns)


def generate_table(records: Records) -> str:
    """Return from `generate` tokens/s; one column per machine and dtype."""
    columns: Columns = {}
    for record in records.values():
        for row in record["competitors"]:
            column = columns.setdefault(f"{machine(record)}, {row['dtype']}", {})
            column[row["competitor"]] = f"{row['tokens_per_s']['median']:.3g}"
    return side_by_side("tokens/s", columns)


def launch_table(records: Records) -> str:
    """Return from `launch` us per call of nn.Linear, and our difference from it; one column per machine and dtype."""
    columns: Columns = {}
    for record in records.values():
        for row in record["calls"]:
            label, shown = f"{row['situation']}: {row['competitor']}", _three(row["us"]["median"])
            if row["above"] is not None:
                shown = _target_cell(_three, row["above"]["median"], row["target"], "g")
                label = f"{label} - nn.Linear"
            columns.setdefault(f"{machine(record)}, {row['dtype']}", {})[label] = shown
    return side_by_side("us (asked)", columns)


def _table_per_machine(tables: Callable[[Record], list[str]]) -> Table:
    """Return a table that shows each machine by itself."""

    def every(records: Records) -> str:
        return "\n\n".join(f"{machine(record)}:\n\n" + "\n\n".join(tables(record)) for record in records.values())

    return every


def _ops_of(record: Record) -> list[str]:
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


def _scaling_of(record: Record) -> list[str]:
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


def _many_masks_of(record: Record) -> list[str]:
    """Return the loss of every task under every mask, nats per token (difference from the base); then the bytes."""
    own = record["losses"]
    masks = list(dict.fromkeys(row["mask"] for row in own))
    losses = []
    for task in dict.fromkeys(row["task"] for row in own):
        found = {row["mask"]: row for row in own if row["task"] == task}
        losses.append([task, *(_loss_and_difference(found[mask]) for mask in masks)])
    sizes = [[name, f"{size:,d}"] for name, size in record["bytes"].items()]
    return [markdown(["held-out loss of", *masks], losses), markdown(["", "bytes"], sizes)]


def _experts_of(record: Record) -> list[str]:
    """Return one row per case: ms of grouped_mm, and the others relative to it; bold if ours misses the goal."""
    cases = record["cases"]
    names = [name for name in dict.fromkeys(case["competitor"] for case in cases) if name != "grouped_mm"]
    rows = []
    for place in dict.fromkeys(map(experts_case_name, cases)):
        own = {case["competitor"]: case for case in cases if experts_case_name(case) == place}
        ratios = [_bold_above_target(own[name]) if name in own else "" for name in names]
        rows.append([place, f"{own['grouped_mm']['ms']['median']:.3g}", *ratios])
    return [markdown(["", "grouped_mm, ms", *(f"{name}, times that" for name in names)], rows)]


def _serve_of(record: Record) -> list[str]:
    """Return a row per number of requests and of tasks; then what a long prompt delays; both with the memory."""
    rows = []
    for case in record["cases"]:
        own = [_rate_and_share(case[name]) for name in ("ours, engine", "ours, over HTTP")]
        times = [f"{case[what]['p50_ms'] / 1e3:.2f} / {case[what]['p99_ms'] / 1e3:.2f}" for what in ("first", "answer")]
        generated = f"{case['generate of the base']['median']:.3g}"
        rows.append([str(case["rows"]), str(case["tasks"]), generated, *own, *times, f"{case['peak_mb']:.0f}"])
    heads = ["requests", "tasks", "`generate`", "engine (x `generate`)", "over HTTP (x `generate`)"]
    heads += ["first token, s", "answer, s", "peak MB"]
    reading, memory = record["reading"], record["memory"]
    step, steps = reading["step_ms"]["median"], reading["steps"]["median"]
    beside = f"{reading['first_ms']['median'] / 1e3:.2f} s, {steps:.1f} steps of {step / 1e3:.2f} s"
    parts = [
        ["first token of a short prompt", beside],
        ["peak memory", f"{memory['peak_mb']:.0f} MB"],
        ["base and masks, before any request", f"{memory['loaded_mb']:.0f} MB"],
        ["`--cache`", f"{memory['cache_mb']} MB"],
    ]
    long = f"{reading['running']} answers run, and a prompt of {reading['long']:,} tokens is read"
    return [markdown(heads, rows), markdown([long, ""], parts)]


ops_table, experts_table = _table_per_machine(_ops_of), _table_per_machine(_experts_of)
serve_table = _table_per_machine(_serve_of)
#: What is printed of a question.
TABLES: dict[str, tuple[Table, ...]] = {
    "ops": (ops_table,),
    "train_step": (train_step_table,),
    "scaling": (_table_per_machine(_scaling_of),),
    "cpu": (cpu_table, shares_table),
    "generate": (generate_table,),
    "serve": (serve_table,),
    "experts": (experts_table,),
    "launch": (launch_table,),
    "many_masks": (_table_per_machine(_many_masks_of),),
    "memory": (memory_table,),
}


def experts_case_name(case: Record) -> str:
    """Return a case of `experts` in words."""
    tokens = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
    return f"{case['op']}, {case['dtype']}, {case['experts']} experts, {tokens}"


def case_name(case: Record) -> str:
    """Return a case of `cpu` in words."""
    thread = ", 1 thread" if case["threads"] == 1 else ""
    return f"{case['op']}, {case['dtype']}, {case['n']} x {case['k']}, M = {case['m']}{thread}"


def side_by_side(corner: str, columns: Columns, names: Iterable[str] | None = None) -> str:
    """Return a table of columns by head; its rows have these names, or those that the columns have, in their order."""
    names = dict.fromkeys(name for column in columns.values() for name in column) if names is None else names
    return markdown([corner, *columns], [[name, *(own.get(name, "") for own in columns.values())] for name in names])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def origins(question: str, records: Records) -> str:
    """Return the command that measures, and where each record was measured."""
    told = []
    for record in records.values():
        where = record["environment"]
        threads = f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}"
        named = where.get("backends", {})
        others = [f"{name} = {described}" for name, described in named.items()] if len(named) > 1 else []
        parts = [threads, f"torch {where['torch']}", *others, f"commit {where['commit'][:10]}", where["date"][:10]]
        told.append(f"{machine(record)}: {', '.join(parts)}")
    return f"`make bench WHAT={question}`. {'; '.join(told)}."


def show(question: str, records: Records) -> None:
    """Print the tables of a question, if it has any."""
    if question in TABLES:
        print("\n\n".join([*(table(records) for table in TABLES[question]), origins(question, records)]) + "\n")


def main() -> None:
    """Print the tables of the named questions, or of those that have results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("questions", nargs="*", help=f"among {', '.join(TABLES)}; all that are stored unless given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    stored = {question: read_machines(asked.results, question) for question in TABLES}
    for question in asked.questions or [question for question in TABLES if stored[question]]:
        if not stored.get(question):
            parser.error(f"questions must be stored ones among {', '.join(TABLES)}, got {question} ({asked.results})")
        show(question, stored[question])


def _ratio_and_share(case: Record | None) -> str:
    if case is None:
        return ""
    share = f" ({100 * case['share']:.0f})" if "share" in case else ""
    return f"{case['ratio']['median']:.3g}{share}"


def _rate_and_share(own: Record) -> str:
    """Return tokens/s and its multiple of the baseline's, bold if it missed the target."""
    shown = f"{own['tokens_per_s']['median']:.3g} ({1 / own['ratio']['median']:.2f})"
    return f"**{shown}**" if own["target"] is not None and own["ratio"]["median"] > own["target"] else shown


def _bold_above_target(case: Record) -> str:
    ratio = case["ratio"]["median"]
    return f"**{ratio:.2f}**" if case["target"] is not None and ratio > case["target"] else f"{ratio:.2f}"


def _loss_and_difference(row: Record) -> str:
    shown = f"{row['loss']:.4f}"
    return f"{shown} ({row['difference']:+.4f} ± {row['error']:.4f})" if row["difference"] else shown


def _target_cell(shown: Callable[[float], str], value: float, target: float | None, form: str) -> str:
    """Return the cell of a value with its target, bold if it was missed."""
    if target is None:
        return shown(value)
    return f"{shown(value)} ({target:{form}})" if value <= target else f"**{shown(value)}** ({target:{form}})"


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


if __name__ == "__main__":
    main()
