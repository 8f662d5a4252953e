"""Writes csrc/cpu/choice_costs.inl from the stored answers to `paths` and `small_paths`:

    python -m benchmarks.fit_choice [FOLDER]

The model is in csrc/cpu/choice.h: max(reading, work) + call. Its costs are fitted product by product and path by
path to the measured times, relative errors squared, those of a path that is far behind counting little; then they are
moved where that makes what is taken less slow. Afterwards build the library again: the test of the
stored records (tests/cpu_kernels/test_cpu_choice.py) says how good the choice is.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mft_kernels.backends.processor import NEEDS

from .bench_paths import BOUND, DTYPES, HOPELESS
from .records import RESULTS, ROOT, by_machine, machine

FILE = ROOT / "csrc" / "cpu" / "choice_costs.inl"
FORMATS = {"fp32": "kFloat32", "bf16": "kBFloat16", "fp16": "kFloat16"}
PRODUCTS = {"forward": "kForward", "d_x": "kGradX", "d_scores": "kGradScores"}
PATHS = {"few": "kFew", "fused": "kFused", "slabs": "kSlabs"}
# In fp32 a Xeon with AMX does what one with AVX-512 does: a set that is fitted to another's cases too.
ALSO = {("avx512", "fp32"): ("amx",)}
FEW = 4  # tokens of small layers up to which calls are all: for a set without such cases, those of another stand in
FOCUS = 4  # a path that takes r times as long as the best one weighs r ** -FOCUS
READING = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # quantiles of time a byte that are tried as the cost of reading
DOUBT = 0.05  # of a prediction, relative: what is predicted as close as that may turn out the other way
CLOSE = 1.01  # times the least prediction: rounding of costs, to four digits, may turn it out either way
LEVEL = 1.01  # times the best path, at most: nothing to be gained
TRUTH = 0.5  # what an error of a predicted time counts, squared, beside time that is lost
WALKS, STEPS, MOVE = 10, 5000, 0.5  # of costs, and the size of a step at first

Array = np.ndarray


@dataclass(frozen=True)
class Cells:
    """Cases of one product in one dtype, by the paths that there are."""

    paths: tuple[str, ...]
    work: Array  # (cases, paths, 4): what each has to do, in millions
    took: Array  # (cases, paths): microseconds; inf where it was far behind, and not measured

    @property
    def behind(self) -> Array:
        """(cases, paths): in units of the best path."""
        return np.minimum(self.took / self.took.min(1, keepdims=True), HOPELESS)

    def predicted(self, costs: Array) -> Array:
        """Microseconds (cases, paths), from costs (paths, 6): reading, byte, mask, product, number, call."""
        work = np.maximum(costs[:, 0] * self.work[..., 0], (self.work * costs[:, 1:5]).sum(-1))
        return work + costs[:, 5]

    def taken(self, costs: Array) -> Array:
        """(cases,): time of the path that these costs take, in units of the best one; of close ones, of the worst."""
        predicted = self.predicted(costs)
        return np.where(predicted <= CLOSE * predicted.min(1, keepdims=True), self.behind, 0).max(1)


def cells_of(name: str, rows: Sequence[Mapping]) -> Cells:
    """Of rows of an instruction set's records."""
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
    """Costs, path by path: for each cost of reading, the best of the others to the cells that it does not explain."""
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
            own = np.array([reading, *_not_negative((terms * weight[:, None])[rest], (took * weight)[rest])])
            predicted = np.maximum(own[0] * work[:, 0], work @ own[1:5]) + own[5]
            error = np.square((predicted - took) * weight).sum()
            if error < least:
                costs[i], least = own, error
    return costs


def _not_negative(terms: Array, values: Array) -> Array:
    """The least squares among coefficients that are not negative: those that would be are left out, the worst first."""
    used, result = list(range(terms.shape[1])), np.zeros(terms.shape[1])
    while used:
        some = np.linalg.lstsq(terms[:, used], values, rcond=None)[0]
        if some.min() >= 0:
            result[used] = some
            break
        used.pop(int(np.argmin(some * np.linalg.norm(terms[:, used], axis=0))))
    return result


def moved(costs: Array, cells: Cells) -> Array:
    """Costs near these by which less time is lost, and by a safe distance: the best end of several random walks."""
    ratios = cells.behind
    weight = TRUTH * ratios**-FOCUS

    def lost(costs: Array) -> float:
        predicted = cells.predicted(costs)
        chance = np.exp(-np.log(predicted / predicted.min(1, keepdims=True)) / DOUBT)
        expected = (ratios * chance).sum(1) / chance.sum(1)
        late = np.maximum(0, cells.taken(costs) - BOUND)
        errors = np.log(np.where(np.isfinite(cells.took), predicted / cells.took, 1.0))
        return float((expected - 1 + 4 * late + 20 * late**2).sum() + (weight * np.square(errors)).sum())

    if cells.taken(costs).max() <= LEVEL:
        return costs
    return min((_walk(costs, lost, seed) for seed in range(WALKS)), key=lost)


def _walk(costs: Array, lost: Callable[[Array], float], seed: int) -> Array:
    generator, least = np.random.default_rng(seed), lost(costs)
    for step in range(STEPS):
        other, size = costs.copy(), MOVE * (1 - step / STEPS)
        chosen = generator.random(costs.shape) < 2 / costs.size
        other[chosen] *= np.exp(generator.normal(0, size, chosen.sum()))
        now = lost(other)
        if now < least:
            costs, least = other, now
    return costs


def written(cost: float) -> str:
    """Four digits."""
    return f"{float(f'{cost:.4g}'):g}"


def small_rows(name: str, records: Mapping[str, Mapping]) -> list[Mapping]:
    """Cases of small layers; of a set that has none those of few tokens of the next that has."""
    if name in records:
        return records[name]["cases"]
    sets = (*NEEDS, "portable")
    others = [other for other in sets[sets.index(name) + 1 :] if other in records]
    return [row for other in others[:1] for row in records[other]["cases"] if row["m"] <= FEW]


def lines_of(name: str, records: Mapping[str, Mapping], small: Mapping[str, Mapping]) -> Iterator[str]:
    """The lines of one instruction set; how good they are goes to stderr."""
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
        costs = moved(first, cells)
        late = cells.taken(costs)
        print(
            f"{name}, {dtype}, {product}: {len(late)} cells, {(late > BOUND).sum()} beyond {BOUND}, "
            f"worst {late.max():.2f} "
            f"({(cells.taken(first) > BOUND).sum()} and {cells.taken(first).max():.2f} before costs were moved)",
            file=sys.stderr,
        )
        for path, own in zip(cells.paths, costs):
            place = f'"{name}", Format::{FORMATS[dtype]}, Product::{PRODUCTS[product]}, Path::{PATHS[path]}'
            yield f"{{{place}, {{{', '.join(map(written, own))}}}}},"


def measured_on(records: Mapping[str, Mapping]) -> list[str]:
    """A line a record: machine, instruction set, torch."""
    return [f"//   {machine(record)}, torch {record['environment']['torch']}" for record in records.values()]


def main() -> None:
    """Print the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_choice", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of the records (benchmarks/results)")
    folder = parser.parse_args().folder
    records, small = by_machine(folder, "paths"), by_machine(folder, "small_paths")
    lines = [
        "// What each path costs; see choice.h. Written by `python -m benchmarks.fit_choice` from what was measured on",
        *measured_on(records),
        "// and of small layers",
        *measured_on(small),
    ]
    for name in (*NEEDS, "portable"):
        lines += lines_of(name, records, small)
    FILE.write_text("\n".join(lines) + "\n")
    print(f"written to {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
