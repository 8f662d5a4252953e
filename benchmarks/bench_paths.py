"""Find the fastest path of each product, and check if the library's model takes it.

`paths` measures large layers. `small_paths` measures layers so small that a call costs more than the work.

Every path that can serve is timed side by side: the kernels for few tokens, the mask fused into a GEMM, and slabs
through torch's GEMM. Weights are cold, as in a model of many layers: calls rotate over COLD_BYTES of layers.

To measure a lower instruction set, hold torch back to it too. Otherwise its slabs would use torch's best GEMM:

    env $(python tests/lower_capability.py avx2) python -m benchmarks paths
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mft_kernels.backends.cpu.choice import grad_bytes, mask_bytes, weight_bytes
from mft_kernels.testing import random_inputs
from mft_kernels.timing import Samples, time_within

from .harness import Finding, Spread, instruction_set, report

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
HELD_BACK = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
COLD_BYTES = 256 << 20
BOUND = 1.05  # times the best path, at most
HOPELESS = 2.0  # times the best path: not measured
LONG = 1.0  # seconds: a single call suffices for a path that takes this long and HOPELESS times another path
SETTLED = 16  # tokens from which a path can be hopeless: times at one token say little about many
MANY = 2048  # tokens from which two rounds are enough
KEEP = 0.9

# (product, source of mask or sign). Without a source, d_scores is added to a buffer, as while a mask is held.
PRODUCTS = (*itertools.product(("forward", "d_x", "d_scores"), ("words", "scores")), ("d_scores", ""))
Shapes = Mapping[tuple[int, int], tuple[int, ...]]  # (N, K): tokens
SMALL = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
STORED: Shapes = {
    (4096, 4096): (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096),
    (2048, 2048): SMALL,
    (576, 1536): SMALL,
    (1536, 576): SMALL,
}
# Instruction sets on which torch's 16-bit GEMM is slow, down to a plain loop, or on which ours has no vectors.
SLOW: Shapes = {(2048, 2048): (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512), (576, 1536): (1, 4, 16, 64, 256, 1024)}
QUICK: Shapes = {(576, 1536): (1, 16, 64, 512)}
# Layers for which a call costs more than the work. Without these cases the fit cannot determine the cost of a call.
SMALL_LAYERS: Shapes = {(256, 256): (1, 4, 16, 64, 512), (64, 64): (1, 4, 16, 64, 512)}
QUICK_SMALL: Shapes = {(64, 64): (1, 64)}


@dataclass(frozen=True)
class Case:
    """A product on a shape, in a dtype."""

    product: str
    dtype: str
    source: str
    n: int
    k: int
    m: int

    def __str__(self) -> str:
        source = f"from {self.source}" if self.source else "accumulated"
        return f"{self.product} {source}, {self.dtype}, {self.n} x {self.k}, M = {self.m}"


class Weights:
    """Enough layers of one shape that the called one has left the caches."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, source: str) -> None:
        # Scores have the weight's dtype; fp16 models come with bf16 scores.
        scores_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        first = random_inputs(1, n, k, dtype, scores_dtype)
        self.threshold = torch.ops.mft_cpu.kept_thresholds(first.scores.view(1, -1), int(KEEP * n * k), True).squeeze(0)
        packed = torch.ops.mft_cpu.pack_mask(first.scores, self.threshold, True)
        masks = {"words": packed, "scores": first.scores}
        mask = masks.get(source)
        each = first.weight.nbytes + (0 if mask is None else mask.nbytes)
        count = max(2, -(-COLD_BYTES // each))
        self.source = source
        self.layers = [(first.weight.clone(), None if mask is None else mask.clone()) for _ in range(count)]

    def call(self, case: Case, path: str) -> Callable[[], object]:
        """Return a function that runs the product by that path, on the next layer each time."""
        dtype = DTYPES[case.dtype]
        x, grad = torch.randn(case.m, case.k).to(dtype), torch.randn(case.m, case.n).to(dtype)
        layers = itertools.cycle(self.layers)
        ops, scores = torch.ops.mft_cpu, self.source == "scores"

        def mask_of(mask: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            return (mask, self.threshold, None) if scores else (None, None, mask)

        def forward() -> Tensor:
            weight, mask = next(layers)
            return ops.masked_linear(x, weight, *mask_of(mask), None, scores, path)

        def d_x() -> Tensor:
            weight, mask = next(layers)
            return ops.grad_x(grad, weight, *mask_of(mask), scores, path)

        def d_scores() -> Tensor:
            weight, sign = next(layers)
            if sign is None:
                ops.grad_scores_(weight, grad, x, None, None, None, True, path)  # any buffer of that dtype
                return weight
            out = torch.empty_like(weight)
            ops.grad_scores_(out, grad, x, weight, *((sign, None) if scores else (None, sign)), False, path)
            return out

        return {"forward": forward, "d_x": d_x, "d_scores": d_scores}[case.product]

    def bytes_an_element(self, case: Case) -> tuple[float, float]:
        """Return the bytes per element of the weight and of its mask, as the library's model counts them."""
        weight, mask = self.layers[0]
        if case.product != "d_scores":
            return weight_bytes(weight, mask), mask_bytes(mask)
        size = grad_bytes(weight, None if mask is None else weight, mask, accumulate=mask is None)
        return size, mask_bytes(mask)


def paths_of(case: Case, bytes_an_element: tuple[float, float], capability: str) -> list[str]:
    """Return the paths that can serve, the model's choice first."""
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    sizes = (case.m, case.n, case.k, *bytes_an_element)
    return torch.ops.mft_cpu.paths(capability, case.product, dtype, *sizes).split(",")


def measured(dtype: str, shapes: Shapes, seconds: float, products=PRODUCTS) -> Iterator[dict]:
    """Yield one row per case: milliseconds of each path, and its ratio to the best path."""
    for (n, k), tokens in shapes.items():
        for product, source in products:
            weights, last = Weights(n, k, DTYPES[dtype], source), {}
            for m in tokens:
                case = Case(product, dtype, source, n, k, m)
                size = weights.bytes_an_element(case)
                found = paths_of(case, size, instruction_set())
                asked = [path for path in found if m <= SETTLED or not _hopeless(path, m, last)]
                calls = {path: weights.call(case, path) for path in asked}
                long = _long(calls)
                last |= {path: (m, took) for path, took in long.items()}
                calls = {path: call for path, call in calls.items() if path not in long}
                samples = time_within(calls, seconds, least=3 if m < MANY else 2, most=9)
                last |= {path: (m, Spread.of(values).median) for path, values in samples.items()}
                yield _row(case, size, found[0], samples)


def _hopeless(path: str, m: int, last: Mapping[str, tuple[int, float]]) -> bool:
    """Return whether a path must take HOPELESS times as long as another one.

    Time grows with M, and no faster than M. The time of the kernels for few tokens grows in proportion to M from 64
    tokens on, their largest pass.
    """
    if path not in last:
        return False
    before, took = last[path]
    if path == "few" and before >= 64:
        took *= m / before
    others = [took * m / before for other, (before, took) in last.items() if other != path]
    return took > HOPELESS * min(others, default=took)


def _long(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return milliseconds of the paths that one call shows to be hopeless: torch's product in fp16 may take 22 s."""
    took = {}
    for path, call in calls.items():
        start = time.perf_counter()
        call()
        took[path] = time.perf_counter() - start
    least = min(took.values())
    return {path: 1e3 * spent for path, spent in took.items() if spent >= max(LONG, HOPELESS * least)}


def _row(case: Case, size: tuple[float, float], taken: str, samples: Samples) -> dict:
    ms = {path: Spread.of(values) for path, values in samples.items()}
    best = min(ms, key=lambda path: ms[path].median)
    behind = {path: Spread.of([a / b for a, b in zip(values, samples[best])]) for path, values in samples.items()}
    shown = ", ".join(f"{path} {spread}" for path, spread in ms.items())
    late = "" if taken == best else f"  {taken} is taken: {behind[taken]}" if taken in behind else f"  {taken} is taken"
    print(f"{case}: {shown}{late}", flush=True)
    return {
        **vars(case),
        "weight_bytes": size[0],
        "mask_bytes": size[1],
        "ms": {path: vars(spread) for path, spread in ms.items()},
        "times_best": {path: vars(spread) for path, spread in behind.items()},
        "rounds": len(samples[best]),
    }


def findings_of(rows: list[dict], capability: str) -> list[Finding]:
    """Return for each dtype and product how much slower the model's choice is than the best path, at worst."""
    found = []
    for dtype, product in dict.fromkeys((row["dtype"], row["product"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["product"]) == (dtype, product)]
        worst = max((behind(row, capability) for row in own), key=lambda spread: spread.median)
        found.append(Finding(f"the model's path / the best: {product}, {dtype}", worst, "x", "at most", BOUND))
    return found


def behind(row: Mapping, capability: str) -> Spread:
    """Return time of the path that the model takes now / time of the best path; HOPELESS if it was not measured."""
    case = Case(*(row[name] for name in ("product", "dtype", "source", "n", "k", "m")))
    taken = paths_of(case, (row["weight_bytes"], row["mask_bytes"]), capability)[0]
    return Spread(**row["times_best"][taken]) if taken in row["times_best"] else Spread(*[HOPELESS] * 3)


def joined(records: Sequence[Mapping]) -> dict:
    """Return the answer of several processes: all cases in sequence, because the costs are fitted to each case."""
    held_back = records[0]["held_back"]
    if any(record["held_back"] != held_back for record in records):
        raise ValueError(f"every process must be held back alike, got {[record['held_back'] for record in records]}")
    rows = [row for record in records for row in record["cases"]]
    findings = [asdict(finding) for finding in findings_of(rows, instruction_set())]
    return {**records[0], "cases": rows, "findings": findings}


def answer(question: str, shapes: Shapes, seconds: float) -> None:
    """Measure, print how good the choice is, and store everything."""
    torch.manual_seed(0)
    rows = [row for dtype in DTYPES for row in measured(dtype, shapes, seconds)]
    report(
        question,
        f"The model's choice of a path against the best one, {torch.get_num_threads()} threads",
        findings_of(rows, instruction_set()),
        held_back={name: os.environ[name] for name in HELD_BACK if name in os.environ},
        cases=rows,
    )


def main(quick: bool = False) -> None:
    """Print and store the answer of large layers."""
    shapes = QUICK if quick else SLOW if instruction_set() in ("avx512", "avx2", "portable") else STORED
    answer("paths", shapes, 0.05 if quick else 0.2)


def main_small(quick: bool = False) -> None:
    """Print and store the answer of small layers."""
    answer("small_paths", QUICK_SMALL if quick else SMALL_LAYERS, 0.05 if quick else 0.1)
