"""What is measured, by whom and in which order: by value, so that what ends a run ends it behind what is worth more.

The first two minutes are the checks that a wrong kernel hardly passes, then a figure for each goal (HEADLINE).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

_T = TypeVar("_T")

SHAPES = {  # (N, K) of the linear layers; both models have 4096 x 4096
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3.1-8b": ((1024, 4096), (14336, 4096), (4096, 14336)),
}
TOKENS = (1, 16, 64, 512, 1024, 2048, 4096, 8192, 16384)
PRODUCTS = ("step", "forward", "d_x", "d_scores", "accumulate")
WHATS = ("correctness", *PRODUCTS, "memory", "threshold", "updates", "codes", "experts", "host", "train", "sweep")

DENSE = "cuBLAS, unmasked"
FUSED = "fused"
CUDA = "cuda"
PACKED = "fused, packed"
AUTO = "auto"
PASS = "mask pass + cuBLAS"
KEPT = "mask pass + cuBLAS, kept"
COMPILED = "eager, compiled"
EAGER = "eager"
PAPER = "paper's layer"

SQUARE = (4096, 4096)
COMPILED_TOKENS = (16, 512, 2048)
DRY_SHAPE, DRY_TOKENS = (24, 40), 3
_COMPILED = {*((*SQUARE, m) for m in COMPILED_TOKENS), (*DRY_SHAPE, DRY_TOKENS)}
PAPER_MOST_TOKENS = 2048
WHY_NOT_COMPILED = f"compiled for 4096 x 4096 and M in {COMPILED_TOKENS} alone: each compilation takes 5 to 20 s"
WHY_NOT_PAPER = f"left out above M = {PAPER_MOST_TOKENS}: there the products hide more and more of its sort"

#: Triton's kernels; then, each a case of its own so that one backend's fault is not the other's, those of csrc/cuda.
CHECKS = ("exact", "random", "repeats", "tests")
CUDA_CHECKS = ("cuda exact", "cuda random", "cuda repeats", "cuda layouts")
SANITIZERS = ("cuda memcheck", "cuda racecheck")

#: In order: what other answers rest on, then few tokens, where a launch is the cost, then many.
_TOKENS_BY_WORTH = (2048, 512, 1024, 64, 1, 4096, 16, 8192, 16384)
_GOAL_TOKENS = (2048, 512)
_MEMORY_TOKENS = (2048, 512)
#: What the CUDA kernels are asked on LLaMA2-7B's shapes: the fewest of these tokens are the hardest, and come first.
CUDA_GOAL_TOKENS = (4096, 8192, 16384)
_CUDA_GOAL_PRODUCTS = ("forward", "d_x", "d_scores")
#: d_scores added to an fp32 buffer: what it costs beyond d_scores hardly depends on the shape.
_ACCUMULATE_TOKENS = (4096, 512)
#: (N, K) whose scores are selected; the second, 58.7M of them, is the one with a goal.
SELECTED = (SQUARE, (4096, 14336))
#: What is timed of an optimiser step beside the products (updates.py), and for how many tokens where M matters.
UPDATES = ("score_step", "accumulate_product", "held")
_UPDATE_TOKENS = (2048,)
#: Products over codes (codes.py), and tokens: one and few, where codes are a quarter of the bytes, and many.
CODES = ("nf4, forward", "nf4, d_x", "int8, forward", "int8, d_x")
_CODED_TOKENS = (1, 64, 512)
#: Products over experts (experts.py), of a mixture's gate and up: 128 experts, eight for each of 2048 and of 64 tokens.
OVER_EXPERTS = ("forward", "d_x", "d_scores")
EXPERTS, _EXPERT_SHAPE, _EXPERT_ROWS = 128, (1536, 2048), (16384, 512)
#: Where the host may cost more than the kernel, and layers that take an H100 about 10 and 3 us to read.
HOST_TOKENS = (1, 2, 4, 8, 16, 32, 64)
_HOST_SHAPES = (SQUARE, (1024, 4096))
#: Whole optimiser steps (train.py): models, ways of running, and tokens of a micro-batch.
TRAINED = ("a LLaMA2-7B layer", "a SmolLM2 layer", "SmolLM2-135M")
_WAYS = ("plain", "resident", "quantized", "layerwise")
_TRAIN_TOKENS = (2048,)
#: Every tile of these (sweep/), kind and M: one launch for both gradients of few tokens, two of many.
_SWEPT = (("forward", 2048), ("d_x", 2048), ("d_scores", 2048), ("forward", 16), ("backward", 16))
#: Of the checks, those that a wrong kernel hardly passes, each backend's.
FIRST_CHECKS = ("exact", "cuda exact", "random", "cuda random")
_THEN_CHECKED = ("repeats", "cuda repeats", "cuda layouts")


@dataclass(frozen=True)
class Case:
    """One thing to measure, whole or not at all. ``detail``: which check, or the dtype of the scores."""

    what: str
    n: int = 0
    k: int = 0
    m: int = 0
    detail: str = ""

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return " ".join(map(str, asdict(self).values()))

    def __str__(self) -> str:
        parts = [self.what, self.detail, f"{self.n} x {self.k}" if self.n else "", f"M = {self.m}" if self.m else ""]
        return " ".join(part for part in parts if part)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile takes part."""
        return self.what in PRODUCTS and COMPILED in competitors(self)


#: A figure for each goal, on the layer that both models have.
HEADLINE = (
    Case("step", *SQUARE, 2048),
    Case("forward", *SQUARE, 4096),
    Case("d_x", *SQUARE, 4096),
    Case("d_scores", *SQUARE, 4096),
    Case("threshold", *SELECTED[-1], detail="bfloat16"),
)


def competitors(case: Case) -> tuple[str, ...]:
    """Who is timed in a case of PRODUCTS, or whose memory is measured.

    d_scores reads no mask, so nothing is to be chosen there. PASS is Triton's other way too: a pass into scratch, then
    cuBLAS. KEPT keeps the masked weight between forward and backward; the others, but for the paper's layer and the
    eager step, keep nothing of its size.
    """
    if case.what == "accumulate":
        return DENSE, FUSED, CUDA, PASS, EAGER
    names = [DENSE, FUSED, CUDA, PACKED, AUTO, PASS, EAGER]
    if case.what == "d_scores":
        names.remove(AUTO)
    if case.what in ("step", "memory"):
        names.insert(names.index(PASS) + 1, KEPT)
        names += [PAPER] if case.m <= PAPER_MOST_TOKENS else []
    if (case.n, case.k, case.m) in _COMPILED and case.what != "memory":
        names.append(COMPILED)
    return tuple(names)


def takes_part(name: str, case: Case) -> bool:
    """Whether a competitor runs in a case beside others."""
    if case.what in ("threshold", "updates", "codes", "experts"):
        return True
    return case.what in (*PRODUCTS, "memory") and name in competitors(case)


def left_out(case: Case) -> dict[str, str]:
    """Who is not measured in a case, and why."""
    reasons = {}
    if COMPILED not in competitors(case) and case.what not in ("memory", "accumulate"):
        reasons[COMPILED] = WHY_NOT_COMPILED
    if case.what == "step" and case.m > PAPER_MOST_TOKENS:
        reasons[PAPER] = WHY_NOT_PAPER
    return reasons


def plan(whats: Iterable[str], shapes: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[Case]:
    """Every case asked for: first checks, headline, other checks, goals (CUDA's hardest first), sanitizer, the rest."""
    whats, shapes, tokens = set(whats), tuple(shapes), set(tokens)
    by_worth = [m for m in _TOKENS_BY_WORTH if m in tokens] + sorted(tokens - set(_TOKENS_BY_WORTH))
    products = [what for what in PRODUCTS if what in whats and what != "accumulate"]
    llama2 = [shape for shape in SHAPES["llama2-7b"] if shape in shapes]
    cuda_goals = [
        Case(what, *shape, m)
        for m in CUDA_GOAL_TOKENS
        for shape in llama2
        for what in _CUDA_GOAL_PRODUCTS
        if m in tokens and what in whats
    ]
    hardest = [case for case in cuda_goals if case.m == CUDA_GOAL_TOKENS[0]]
    goals = [
        Case(what, *shape, m)
        for shape in sorted(shapes, key=_goal_rank)
        if _goal_rank(shape) < _NO_GOAL
        for m in by_worth
        if m in _GOAL_TOKENS
        for what in products
    ]
    square_first = sorted(shapes, key=lambda shape: shape != SQUARE)
    rest = [Case(what, *shape, m) for shape in square_first for m in by_worth for what in products]
    first, then, sanitizers, last = (
        [Case("correctness", detail=check) for check in checks if "correctness" in whats]
        for checks in (FIRST_CHECKS, _THEN_CHECKED, SANITIZERS, CHECKS[-1:])
    )
    accumulate = [
        Case("accumulate", n, k, m)
        for n, k in _those(shapes, (SQUARE, (11008, 4096)))
        for m in _those(by_worth, _ACCUMULATE_TOKENS)
        if "accumulate" in whats
    ]
    memory = [
        Case("memory", n, k, m)
        for n, k in _those(shapes, (SQUARE, (14336, 4096)))
        for m in _those(by_worth, _MEMORY_TOKENS)
        if "memory" in whats
    ]
    threshold = [
        Case("threshold", n, k, detail=dtype)
        for dtype in ("bfloat16", "float32")
        for n, k in _those(shapes, SELECTED)
        if "threshold" in whats
    ]
    asked = {*goals, *cuda_goals, *threshold}
    headline = [case for case in HEADLINE if case in asked]
    beside = _beside_products(whats, shapes, tokens, by_worth)
    ahead = [*first, *headline, *then, *hardest, *beside, *goals, *cuda_goals, *sanitizers, *last]
    return list(dict.fromkeys([*ahead, *accumulate, *memory, *threshold, *rest]))


def _beside_products(
    whats: set[str], shapes: Sequence[tuple[int, int]], tokens: set[int], by_worth: Sequence[int]
) -> list[Case]:
    """Layers at few tokens, an optimiser step's parts, products over codes and over experts, whole steps, tiles."""
    host = [
        Case("host", n, k, m)
        for n, k in _those(shapes, _HOST_SHAPES)
        for m in (HOST_TOKENS if tokens == set(TOKENS) else _those(by_worth, HOST_TOKENS))
        if "host" in whats
    ]
    updates = [
        Case("updates", n, k, 0 if detail == "score_step" else m, detail)
        for n, k in _those(shapes, (SQUARE,))
        for m in _those(by_worth, _UPDATE_TOKENS)
        for detail in UPDATES
        if "updates" in whats
    ]
    codes = [
        Case("codes", n, k, m, detail)
        for n, k in _those(shapes, (SQUARE,))
        for m in _those(by_worth, _CODED_TOKENS)
        for detail in CODES
        if "codes" in whats
    ]
    experts = [
        Case("experts", n, k, m, detail)
        for n, k in ([_EXPERT_SHAPE] if len(shapes) == _SHAPES else shapes[:1])
        for m in _those(by_worth, _EXPERT_ROWS)
        for detail in OVER_EXPERTS
        if "experts" in whats
    ]
    train = [
        Case("train", m=m, detail=f"{model}, {way}")
        for m in _those(by_worth, _TRAIN_TOKENS)
        for model in TRAINED
        for way in _WAYS
        if "train" in whats
    ]
    sweep = [
        Case("sweep", n, k, m, kind)
        for n, k in (_those(shapes, (SQUARE,)) if len(shapes) == _SHAPES else shapes)
        for kind, usual in _SWEPT
        for m in ([usual] if usual in tokens else by_worth[:1])
        if "sweep" in whats
    ]
    return [*host, *updates, *codes, *experts, *train, *sweep]


_GOAL_SHAPES = (SQUARE, (14336, 4096), (4096, 14336), (11008, 4096), (4096, 11008))
_NO_GOAL = len(_GOAL_SHAPES)
_SHAPES = sum(map(len, SHAPES.values()))  # if nobody says which


def _those(asked: Sequence[_T], preferred: Sequence[_T]) -> Sequence[_T]:
    """What is preferred among what was asked for, or the first of that."""
    return [one for one in preferred if one in asked] or asked[:1]


def _goal_rank(shape: tuple[int, int]) -> int:
    return _GOAL_SHAPES.index(shape) if shape in _GOAL_SHAPES else _NO_GOAL


def work(what: str, n: int, k: int, m: int, keep_bytes: float) -> list[tuple[float, float]]:
    """[(bytes that must move, floating-point operations)], one pair a phase; 2-byte elements.

    ``keep_bytes`` tell one weight's mask: 2 for bf16 scores, 1/8 for a bit, 0 for a dense layer. A backward reads
    weight and mask once for both its gradients; nothing but x and the weight stays from forward to backward.
    """
    matrix, x, y, product = n * k, 2.0 * m * k, 2.0 * m * n, 2.0 * m * n * k
    read = matrix * (2 + keep_bytes)
    # The dense gradient of a weight reads neither weight nor sign.
    gradient = x + y + 2 * matrix
    added = x + y + 8 * matrix  # fp32, read and written
    phases = {
        "forward": [(read + x + y, product)],
        "d_x": [(read + x + y, product)],
        "d_scores": [(gradient + (read if keep_bytes else 0), product)],
        "accumulate": [(added + (read if keep_bytes else 0), product)],
        # x and d_x, each M x K; grad_output; weight and mask; d_scores.
        "backward": [(read + gradient + x, 2 * product)],
    }
    return phases["forward"] + phases["backward"] if what == "step" else phases[what]


def floor_ms(phases: list[tuple[float, float]], byte_rate: float, flop_rate: float) -> tuple[float, float, float]:
    """(by bytes alone, by operations alone, the larger of both phase by phase), milliseconds; rates a second."""
    by_bytes, by_flops = [1e3 * b / byte_rate for b, _ in phases], [1e3 * f / flop_rate for _, f in phases]
    return sum(by_bytes), sum(by_flops), sum(map(max, by_bytes, by_flops))
