"""Write csrc/cpu/choice_costs.inl from answers to `paths` and `small_paths`, which are in runs/paths:

    python -m benchmarks.fit_choice [FOLDER]

Instruction sets without an answer in the folder keep their costs.

The model is in csrc/cpu/choice.h: max(reading, work) + call. Its costs are fitted to the measured times for each
product and path, by squared relative errors. Times of a path that is far behind the best one count little. The costs
are then moved if that makes the chosen paths less slow. benchmarks/results/fast-paths.json gets the paths that were
fast. Afterwards build the library again. tests/cpu_kernels/test_cpu_choice.py compares its choice with that file.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mft_kernels.backends.processor import NEEDS

from .bench_paths import BOUND, DTYPES, HOPELESS
from .harness import one_line_an_entry
from .records import RESULTS, ROOT, TIMINGS, machine, read_machines

FILE = ROOT / "csrc" / "cpu" / "choice_costs.inl"
FAST = RESULTS / "fast-paths.json"
SETS = (*NEEDS, "portable")
SMALL = "// and of small layers"
FORMATS = {"fp32": "kFloat32", "bf16": "kBFloat16", "fp16": "kFloat16"}
PRODUCTS = {"forward": "kForward", "d_x": "kGradX", "d_scores": "kGradScores"}
PATHS = {"few": "kFew", "fused": "kFused", "slabs": "kSlabs"}
# Sets that are fitted to another set's cases too: in fp32 a Xeon with AMX does what one with AVX-512 does.
ALSO = {("avx512", "fp32"): ("amx",)}
FEW = 4  # tokens of small layers up to which only calls cost; a set without such cases takes another set's
FOCUS = 4  # a path that takes r times as long as the best one has the weight r ** -FOCUS
READING = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # quantiles of time per byte that are tried as the cost of reading
DOUBT = 0.05  # relative error of a prediction: predictions that are closer than this may turn out in the other order
CLOSE = 1.01  # times the least prediction: rounding the costs to four digits may choose either path
LEVEL = 1.01  # times the best path, at most: nothing more can be gained
TRUTH = 0.5  # weight of the squared error of a predicted time, relative to lost time
WALKS, STEPS, MOVE = 10, 5000, 0.5  # number and length of the random walks over costs, and their first step size

Array = np.ndarray


@dataclass(frozen=True)
class Cells:
    """Cases of one product in one dtype, with the available paths."""

    paths: tuple[str, ...]
    work: Array  # (cases, paths, 4): the work of each path, in millions
    took: Array  # (cases, paths): microseconds; inf if the path was far behind and not measured

    @property
    def behind(self) -> Array:
        """(cases, paths): time / time of the best path."""
        return np.minimum(self.took / self.took.min(1, keepdims=True), HOPELESS)

    def predicted(self, costs: Array) -> Array:
        """Return microseconds (cases, paths) from costs (paths, 6): reading, byte, mask, product, number, call."""
        work = np.maximum(costs[:, 0] * self.work[..., 0], (self.work * costs[:, 1:5]).sum(-1))
        return work + costs[:, 5]

    def slowdowns(self, costs: Array) -> Array:
        """Return (cases,): time of the chosen path / the best time; among close predictions the slowest counts."""
        predicted = self.predicted(costs)
        return np.where(predicted <= CLOSE * predicted.min(1, keepdims=True), self.behind, 0).max(1)


def cells_of(name: str, rows: Sequence[Mapping]) -> Cells:
    """Return the cells of an instruction set's rows."""
    paths = tuple(path for path in PATHS if any(path in row["ms"] for row in rows))
    work, took = [], []
    for row in rows:
        case = (row["product"], str(DTYPES[row["dtype"]]).removeprefix("torch."), row["m"], row["n"], row["k"])
        size = (row["weight_bytes"], row["mask_bytes"])
        told = [torch.ops.mft_cpu.path_work(name, path, *case, *size) for path in paths]
        work.append([[float(term) * 1e-6 for term in terms.split(",")] for terms in told])
        took.append([row["ms"][path]["median"] * 1e3 if path in row["ms"] else np.inf for path in paths])
    return Cells(paths, np.array(work), np.array(took))


def fitted(cells: Cells) -> Array:
    """Return the costs of each path.

    Each candidate for the cost of reading explains some cells. The other costs are fitted to the remaining cells. The
    candidate with the least error is kept.
    """
    costs = np.zeros((len(cells.paths), 6))
    for i in range(len(cells.paths)):
        known = np.isfinite(cells.took[:, i])
        took, work = cells.took[known, i], cells.work[known, i]
        weight = cells.behind[known, i] ** -FOCUS / took
        terms, least = np.column_stack([work, np.ones(len(took))]), np.inf
        for reading in (0.0, *np.quantile(took / work[:, 0], READING)):
            rest = reading * work[:, 0] < 0.97 * took
            if rest.sum() < 5:
                continue
            own = np.array([reading, *_fit_nonnegative((terms * weight[:, None])[rest], (took * weight)[rest])])
            predicted = np.maximum(own[0] * work[:, 0], work @ own[1:5]) + own[5]
            error = np.square((predicted - took) * weight).sum()
            if error < least:
                costs[i], least = own, error
    return costs


def _fit_nonnegative(terms: Array, values: Array) -> Array:
    """Return the least-squares solution without negative coefficients: they are removed, the worst first."""
    used, result = list(range(terms.shape[1])), np.zeros(terms.shape[1])
    while used:
        some = np.linalg.lstsq(terms[:, used], values, rcond=None)[0]
        if some.min() >= 0:
            result[used] = some
            break
        used.pop(int(np.argmin(some * np.linalg.norm(terms[:, used], axis=0))))
    return result


def nearby_costs(costs: Array, cells: Cells) -> Array:
    """Return nearby costs that lose less time, with a safety margin: the best end of several random walks."""
    ratios = cells.behind
    weight = TRUTH * ratios**-FOCUS

    def loss(costs: Array) -> float:
        predicted = cells.predicted(costs)
        chance = np.exp(-np.log(predicted / predicted.min(1, keepdims=True)) / DOUBT)
        expected = (ratios * chance).sum(1) / chance.sum(1)
        late = np.maximum(0, cells.slowdowns(costs) - BOUND)
        errors = np.log(np.where(np.isfinite(cells.took), predicted / cells.took, 1.0))
        return float((expected - 1 + 4 * late + 20 * late**2).sum() + (weight * np.square(errors)).sum())

    if cells.slowdowns(costs).max() <= LEVEL:
        return costs
    return min((_walk(costs, loss, seed) for seed in range(WALKS)), key=loss)


def _walk(costs: Array, loss: Callable[[Array], float], seed: int) -> Array:
    generator, least = np.random.default_rng(seed), loss(costs)
    for step in range(STEPS):
        other, size = costs.copy(), MOVE * (1 - step / STEPS)
        chosen = generator.random(costs.shape) < 2 / costs.size
        other[chosen] *= np.exp(generator.normal(0, size, chosen.sum()))
        now = loss(other)
        if now < least:
            costs, least = other, now
    return costs


def cost_text(cost: float) -> str:
    """Return the cost with four digits."""
    return f"{float(f'{cost:.4g}'):g}"


def small_rows(name: str, records: Mapping[str, Mapping]) -> list[Mapping]:
    """Return the cases of small layers; if a set has none, those of few tokens of the next set that has some."""
    if name in records:
        return records[name]["cases"]
    others = [other for other in SETS[SETS.index(name) + 1 :] if other in records]
    return [row for other in others[:1] for row in records[other]["cases"] if row["m"] <= FEW]


def lines_of(name: str, records: Mapping[str, Mapping], small: Mapping[str, Mapping]) -> Iterator[str]:
    """Yield the lines of one instruction set, and print their quality to stderr."""
    for dtype, product in itertools.product(FORMATS, PRODUCTS):
        sets = [other for other in (name, *ALSO.get((name, dtype), ())) if other in records]
        large = [row for other in sets for row in records[other]["cases"]]
        rows = [
            row
            for row in (*large, *(small_rows(name, small) if large else ()))
            if (row["dtype"], row["product"]) == (dtype, product)
        ]
        if not rows:
            print(f"{name}, {dtype}, {product}: not measured", file=sys.stderr)
            continue
        cells = cells_of(name, rows)
        first = fitted(cells)
        costs = nearby_costs(first, cells)
        late, before = cells.slowdowns(costs), cells.slowdowns(first)
        print(
            f"{name}, {dtype}, {product}: {len(late)} cells, {(late > BOUND).sum()} beyond {BOUND}, "
            f"worst {late.max():.2f} "
            f"({(before > BOUND).sum()} and {before.max():.2f} before costs were moved)",
            file=sys.stderr,
        )
        for path, own in zip(cells.paths, costs):
            place = f'"{name}", Format::{FORMATS[dtype]}, Product::{PRODUCTS[product]}, Path::{PATHS[path]}'
            yield f"{{{place}, {{{', '.join(map(cost_text, own))}}}}},"


def measured_on(records: Mapping[str, Mapping], old: Sequence[str]) -> Iterator[str]:
    """Yield one line per instruction set: machine, set, torch. A set without a record keeps its line among ``old``."""
    for name in SETS:
        if name in records:
            yield f"//   {machine(records[name])}, torch {records[name]['environment']['torch']}"
        else:
            yield from (line for line in old if line.startswith("//   ") and f", {name}, torch " in line)


def fast_paths(rows: Sequence[Mapping]) -> list[dict]:
    """Return an entry per product and shape: by path, the M for which a run found it within BOUND of the best."""
    found: dict[tuple, dict] = {}
    for row in rows:
        case = {key: row[key] for key in ("product", "dtype", "source", "n", "k", "weight_bytes", "mask_bytes")}
        fast = found.setdefault(tuple(case.values()), case | {"fast": {}})["fast"]
        for path, spread in row["times_best"].items():
            if spread["low"] <= BOUND and row["m"] not in fast.setdefault(path, []):
                fast[path].append(row["m"])
    return list(found.values())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_choice", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=TIMINGS, help="of records (runs/paths)")
    folder = parser.parse_args().folder
    records, small = read_machines(folder, "paths"), read_machines(folder, "small_paths")
    if not records:
        parser.error(f'FOLDER must hold answers to paths, got none in {folder}: make bench WHAT="paths small_paths"')
    old = FILE.read_text().splitlines()
    lines = [
        "// What each path costs; see choice.h. Written by `python -m benchmarks.fit_choice` from what was measured on",
        *measured_on(records, old[: old.index(SMALL)]),
        SMALL,
        *measured_on(small, old[old.index(SMALL) :]),
    ]
    for name in SETS:
        kept = [line for line in old if line.startswith(f'{{"{name}",')]
        lines += lines_of(name, records, small) if name in records else kept
    FILE.write_text("\n".join(lines) + "\n")
    rows = {name: [*records[name]["cases"], *small.get(name, {"cases": ()})["cases"]] for name in records}
    fast = json.loads(FAST.read_text()) | {name: fast_paths(own) for name, own in rows.items()}
    FAST.write_text(one_line_an_entry(fast))
    print(f"written to {FILE} and {FAST}")


if __name__ == "__main__":
    main()
