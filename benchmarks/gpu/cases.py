"""The cases, their competitors and their order: the most valuable come first, so any interrupted run has them.

First come the checks, a figure for each goal (HEADLINE), and the sanitizer's memcheck. The cases that are expected to
fit the time are planned (within); the others need a longer budget or their own run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

_T = TypeVar("_T")

SHAPES = {  # (N, K) of the linear layers; both models have 4096 x 4096
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3.1-8b": ((1024, 4096), (14336, 4096), (4096, 14336)),
}
EVERY_SHAPE = tuple(shape for shapes in SHAPES.values() for shape in shapes)
TOKENS = (1, 16, 64, 512, 1024, 2048, 4096, 8192, 16384)
PRODUCTS = ("step", "forward", "d_x", "d_scores", "accumulate", "accumulate_product")
WHATS = ("correctness", *PRODUCTS, "memory", "threshold", "score_step", "codes", "many", "experts", "host", "train")

DENSE = "cuBLAS, unmasked"
FUSED = "fused"
CUDA = "cuda"
AUTO = "auto"
PACKED, CUDA_PACKED, AUTO_PACKED = "fused, packed", "cuda, packed", "auto, packed"
PASS = "mask pass + cuBLAS"
KEPT = "mask pass + cuBLAS, kept"
LAYER, HELD = "MaskedLinear", "MaskedLinear, held"
COMPILED = "eager, compiled"
EAGER = "eager"
PAPER = "paper's layer"

SQUARE = (4096, 4096)
COMPILED_TOKENS = 2048
DRY_SHAPE, DRY_TOKENS = (24, 40), 3
_COMPILED = {(*SQUARE, COMPILED_TOKENS), (*DRY_SHAPE, DRY_TOKENS)}
PAPER_MOST_TOKENS = 2048
WHY_NOT_COMPILED = f"compiled for a step of 4096 x 4096, M = {COMPILED_TOKENS} alone: a compilation takes 5 to 20 s"
WHY_NOT_PAPER = f"left out above M = {PAPER_MOST_TOKENS}: there the products hide more and more of its sort"

#: Run before anything is timed. Those of csrc/cuda are separate cases, so that a fault stays with its backend.
_FIRST_CHECKS = (
    "cuda layouts", "exact", "cuda exact", "random", "cuda random", "other ops", "repeats", "cuda repeats",
)  # fmt: skip
SANITIZERS = ("cuda memcheck", "cuda racecheck")
TESTS = "tests"
CUDA_CHECKS = ("cuda exact", "cuda random", "cuda repeats", "cuda layouts")

#: In this order: tokens that other answers rest on, then few tokens, for which the launch dominates, then many.
_TOKENS_BY_WORTH = (2048, 512, 1024, 64, 1, 4096, 16, 8192, 16384)
_GOAL_SHAPES = (SQUARE, (14336, 4096), (4096, 14336), (11008, 4096), (4096, 11008))
_GOAL_TOKENS = (2048, 512)
#: Tokens of the CUDA kernels' goals on LLaMA2-7B's shapes: the fewest are the hardest, and come first.
CUDA_GOAL_TOKENS = (4096, 8192, 16384)
_CUDA_GOAL_PRODUCTS = ("forward", "d_x", "d_scores")
#: d_scores added to an fp32 buffer: its extra cost hardly depends on the shape.
_ACCUMULATE_SHAPES, _ACCUMULATE_TOKENS = (SQUARE, (11008, 4096)), (4096, 512)
_MEMORY_SHAPES, _MEMORY_TOKENS = (SQUARE, (14336, 4096)), (2048, 512)
#: (N, K) of the selected scores; the second, with 58.7M scores, is the one with a goal.
SELECTED = (SQUARE, (4096, 14336))
#: Tokens of the product that a layer with a held mask adds to an fp32 buffer.
_PRODUCT_TOKENS = (2048,)
#: Products over codes (codes.py), and their tokens: one and few, where codes are a quarter of the bytes, and many.
CODES = ("nf4, forward", "nf4, d_x", "int8, forward", "int8, d_x")
_CODED_TOKENS = (1, 64, 512)
#: Few tokens by words and by scores: here "auto" may have to take CUDA's decode kernel.
_FEW_TOKENS = (1, 16, 64)
#: Rows with one mask each (many.py): tokens generated for as many users.
MANY_ROWS = (1, 16, 64)
#: Products over experts (experts.py), of a mixture's gate and up: 128 experts, 8 per token, 2048 and 64 tokens.
OVER_EXPERTS = ("forward", "d_x", "d_scores")
EXPERTS, _EXPERT_SHAPE, _EXPERT_ROWS = 128, (1536, 2048), (16384, 512)
#: Tokens at which the host may cost more than the kernel, and layers that an H100 reads in about 10 and 3 us.
HOST_TOKENS = (1, 2, 4, 8, 16, 32, 64)
_HOST_SHAPES = (SQUARE, (1024, 4096))
#: Whole optimiser steps (train.py): models, ways of running, and tokens per micro-batch.
TRAINED = ("a LLaMA2-7B layer", "a SmolLM2 layer", "SmolLM2-135M")
_WAYS = ("plain", "resident", "quantized", "layerwise")
_TRAIN_TOKENS = (2048,)

#: Seconds after which a case counts as hung. Most of the time of slow cases is compilation.
_PATIENCE = 60.0
_PATIENCE_COMPILED = 90.0
_PATIENCE_OF = {"exact": 225.0, "other ops": 225.0, "cuda layouts": 225.0}
#: Seconds for programs that use whatever they get; if nothing follows them, they get all that is left.
SECONDS_OF = {TESTS: 60.0, "cuda memcheck": 100.0, "cuda racecheck": 100.0}

#: Seconds that the start and a case may take. These are guesses, not measurements. In a check, the reference takes
#: most of the time. In a timed case the competitors do, because each is checked, captured and replayed.
_GUESS_START = 20.0
_GUESS = 4.0
_GUESS_COMPILED = 20.0
_GUESSES = {"train": 25.0, "experts": 8.0, "threshold": 6.0}
_GUESSES_OF_CHECKS = {
    "cuda layouts": 45.0, "exact": 30.0, "cuda exact": 30.0, "other ops": 30.0, "random": 10.0, "cuda random": 10.0,
    "repeats": 10.0, "cuda repeats": 10.0, **SECONDS_OF,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One thing to measure, completely or not at all. ``detail``: which check, or the dtype of the scores."""

    what: str
    n: int = 0
    k: int = 0
    m: int = 0
    detail: str = ""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Case":
        """Return the case of a record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.place) if part)

    @property
    def place(self) -> str:
        """Everything except the kind."""
        parts = [self.detail, f"{self.n} x {self.k}" if self.n else "", f"M = {self.m}" if self.m else ""]
        return ", ".join(part for part in parts if part)

    @property
    def patience(self) -> float:
        """Seconds after which it counts as hung."""
        return _PATIENCE_OF.get(self.detail, _PATIENCE_COMPILED if self._compiles else _PATIENCE)

    @property
    def guess(self) -> float:
        """Seconds that it is expected to take."""
        if self.what == "correctness":
            return _GUESSES_OF_CHECKS[self.detail]
        return _GUESSES.get(self.what, _GUESS) + (_GUESS_COMPILED if self._compiles else 0.0)

    @property
    def _compiles(self) -> bool:
        return self.what in PRODUCTS and COMPILED in competitors(self)


#: One figure for each goal, on the layer that both models have.
HEADLINE = (
    Case("step", *SQUARE, 2048),
    Case("forward", *SQUARE, 4096),
    Case("d_x", *SQUARE, 4096),
    Case("d_scores", *SQUARE, 4096),
    Case("threshold", *SELECTED[-1], detail="bfloat16"),
)


def competitors(case: Case) -> tuple[str, ...]:
    """Return the competitors that are timed in a case of PRODUCTS, or whose memory is measured.

    d_scores reads no mask, so it has no choice of masks. KEPT keeps the masked weight between forward and backward. The
    others keep nothing of its size, except the paper's layer and the eager step. The layers are timed only where the
    compiled form is; the ops that they call are timed everywhere.
    """
    if case.what == "accumulate":
        return DENSE, FUSED, CUDA, PASS, EAGER
    if case.what == "accumulate_product":
        return DENSE, FUSED, CUDA
    names = [DENSE, FUSED, CUDA, PACKED, PASS, EAGER]
    if case.what in ("forward", "d_x", "step"):
        names[names.index(PASS) : names.index(PASS)] = [CUDA_PACKED, AUTO, AUTO_PACKED]
    elif case.what == "memory":
        names.insert(names.index(PASS), AUTO)
    if case.what in ("step", "memory"):
        names.insert(names.index(PASS) + 1, KEPT)
        names += [PAPER] if case.m <= PAPER_MOST_TOKENS else []
    if case.what == "step" and (case.n, case.k, case.m) in _COMPILED:
        names += [COMPILED, LAYER, HELD]
    return tuple(names)


def left_out(case: Case) -> dict[str, str]:
    """Return the competitors that are not measured in a case of PRODUCTS, and why."""
    reasons = {}
    if COMPILED not in competitors(case) and not case.what.startswith(("memory", "accumulate")):
        reasons[COMPILED] = WHY_NOT_COMPILED
    if case.what == "step" and case.m > PAPER_MOST_TOKENS:
        reasons[PAPER] = WHY_NOT_PAPER
    return reasons


def is_beside_others(case: Case) -> bool:
    """Whether the CUDA kernels are one competitor among several, so that the case is useful without them."""
    return case.what in (*PRODUCTS, "memory", "threshold")


def plan(whats: Iterable[str], shapes: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[Case]:
    """Return every requested case: checks, headline, memcheck, few tokens, goals (CUDA's hardest first), the rest."""
    shapes, tokens = tuple(shapes), set(tokens)
    by_worth = [m for m in _TOKENS_BY_WORTH if m in tokens] + sorted(tokens - set(_TOKENS_BY_WORTH))
    is_whole = set(shapes) == set(EVERY_SHAPE)
    products = [what for what in PRODUCTS if not what.startswith("accumulate")]
    llama2 = [shape for shape in SHAPES["llama2-7b"] if shape in shapes]
    cuda_goals = [[*_cases(_CUDA_GOAL_PRODUCTS, llama2, [m])] for m in CUDA_GOAL_TOKENS if m in tokens]
    hardest = cuda_goals[0] if CUDA_GOAL_TOKENS[0] in tokens else []
    goal_shapes = [shape for shape in _GOAL_SHAPES if shape in shapes]
    square = _those(shapes, [SQUARE])
    host_tokens = HOST_TOKENS if tokens == set(TOKENS) else _those(by_worth, HOST_TOKENS)
    experts = [_EXPERT_SHAPE] if is_whole else shapes[:1]
    ordered = [
        *_cases(["correctness"], details=_FIRST_CHECKS),
        *(case for case in HEADLINE if (case.n, case.k) in shapes and (not case.m or case.m in tokens)),
        *_cases(["correctness"], details=SANITIZERS[:1]),
        *_cases(["forward", "step"], square, [m for m in _FEW_TOKENS if m in tokens]),
        *_cases(["many"], square, MANY_ROWS if tokens == set(TOKENS) else _those(by_worth, MANY_ROWS)),
        *hardest,
        *_cases(["score_step"], square),
        *_cases(["accumulate_product"], square, _those(by_worth, _PRODUCT_TOKENS)),
        *_cases(["codes"], square, _those(by_worth, _CODED_TOKENS), CODES),
        *_cases(["host"], _those(shapes, _HOST_SHAPES), host_tokens),
        *_cases(["experts"], experts, _those(by_worth, _EXPERT_ROWS), OVER_EXPERTS),
        *_cases(["train"], tokens=_those(by_worth, _TRAIN_TOKENS),
                details=[f"{model}, {way}" for model in TRAINED for way in _WAYS]),
        *_cases(products, goal_shapes, [m for m in _GOAL_TOKENS if m in tokens]),
        *(case for cases in cuda_goals for case in cases),
        *_cases(["correctness"], details=(*SANITIZERS[1:], TESTS)),
        *_cases(["accumulate"], _those(shapes, _ACCUMULATE_SHAPES), _those(by_worth, _ACCUMULATE_TOKENS)),
        *_cases(["memory"], _those(shapes, _MEMORY_SHAPES), _those(by_worth, _MEMORY_TOKENS)),
        *(case for dtype in ("bfloat16", "float32")
          for case in _cases(["threshold"], _those(shapes, SELECTED), details=[dtype])),
        *_cases(products, sorted(shapes, key=lambda shape: shape != SQUARE), by_worth),
    ]  # fmt: skip
    asked = set(whats)
    return list(dict.fromkeys(case for case in ordered if case.what in asked))


def within(cases: Sequence[Case], seconds: float) -> list[Case]:
    """Return the first cases, in order, whose guesses fit into this number of seconds together."""
    taken, left = [], seconds - _GUESS_START
    for case in cases:
        if case.guess < left:
            taken.append(case)
            left -= case.guess
    return taken


def _cases(
    whats: Sequence[str],
    shapes: Sequence[tuple[int, int]] = ((0, 0),),
    tokens: Sequence[int] = (0,),
    details: Sequence[str] = ("",),
) -> Iterable[Case]:
    """Return all combinations, shape by shape."""
    return (Case(what, n, k, m, detail) for n, k in shapes for m in tokens for what in whats for detail in details)


def _those(asked: Sequence[_T], preferred: Sequence[_T]) -> Sequence[_T]:
    """Return the preferred values among those asked for, or the first of those asked for."""
    return [one for one in preferred if one in asked] or asked[:1]
