"""The cases, their competitors and their order: the most valuable come first, so any interrupted run has them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

_T = TypeVar("_T")

SHAPES = {  # (N, K) of the linear layers; both models have 4096 x 4096
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3.1-8b": ((1024, 4096), (14336, 4096), (4096, 14336)),
}
EVERY_SHAPE = tuple(shape for shapes in SHAPES.values() for shape in shapes)
TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
PRODUCTS = ("step", "forward", "d_x", "d_scores", "accumulate", "accumulate_product")
WHATS = ("correctness", *PRODUCTS, "update", "threshold", "score_step", "codes", "many", "experts", "host", "train")

DENSE = "cuBLAS, unmasked"
FUSED = "fused"
CUDA = "cuda"
AUTO = "auto"
PACKED, CUDA_PACKED, AUTO_PACKED = "fused, packed", "cuda, packed", "auto, packed"
PASS = "mask pass + cuBLAS"
PLACE = "in place"
LAYER, HELD = "MaskedLinear", "MaskedLinear, held"
EAGER = "eager"

SQUARE = (4096, 4096)
DRY_SHAPE, DRY_TOKENS = (24, 40), 3

PREFLIGHT = "preflight"
#: Those of csrc/cuda are separate cases, so that a fault stays with its backend.
_CHECKS = (
    "cuda layouts", "exact", "cuda exact", "random", "cuda random", "other ops", "repeats", "cuda repeats",
)  # fmt: skip
SANITIZERS = ("cuda memcheck", "cuda racecheck")
TESTS = "tests"
#: Seconds that a case of the default run is planned to take, by kind or detail. Estimates: most of it is compilation.
_PLANNED = {"forward": 4, "d_x": 4, "update": 4, "d_scores": 4, "threshold": 6, "score_step": 8, "train": 10,
            "correctness": 12, PREFLIGHT: 30}  # fmt: skip
CUDA_CHECKS = ("cuda exact", "cuda random", "cuda repeats", "cuda layouts")

#: In this order: tokens that other answers rest on, then few tokens, for which the launch dominates, then many.
_TOKENS_BY_WORTH = (2048, 512, 1024, 256, 64, 1, 4096, 16, 8192, 16384)
#: What the default run decides by: which way is fastest, at which number of tokens.
_DECIDING_SHAPES, _DECIDING_TOKENS = (SQUARE, (14336, 4096)), (1, 16, 256, 512, 1024, 2048)
_LARGE_TOKENS = (2048, 512)
#: d_scores added to an fp32 buffer: its extra cost hardly depends on the shape.
_ACCUMULATE_SHAPES, _ACCUMULATE_TOKENS = (SQUARE, (11008, 4096)), (4096, 512)
#: (N, K) of the selected scores.
SELECTED = (SQUARE, (4096, 14336))
#: Tokens of the product that a layer with a held mask adds to an fp32 buffer.
_PRODUCT_TOKENS = (2048,)
#: Products over codes (codes.py), and their tokens: one and few, where codes are a quarter of the bytes, and many.
CODES = ("nf4, forward", "nf4, d_x", "int8, forward", "int8, d_x")
_CODED_TOKENS = (1, 64, 512)
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
_WAYS = ("in_place", "plain", "resident", "quantized", "layerwise")
_TRAIN_TOKENS = (2048,)

#: Seconds after which a case counts as hung: most of the time of slow cases is compilation, and in a check the
#: reference's.
_PATIENCE, _PATIENCE_OF_CHECKS = 90.0, 225.0
#: Seconds for programs that use whatever they get; if nothing follows them, they get all that is left.
SECONDS_OF = {TESTS: 60.0, "cuda memcheck": 100.0, "cuda racecheck": 100.0}


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
    def planned(self) -> float:
        """Seconds that it is planned to take in the default run."""
        return SECONDS_OF.get(self.detail) or _PLANNED.get(self.detail) or _PLANNED[self.what]

    @property
    def patience(self) -> float:
        """Seconds after which it counts as hung."""
        return _PATIENCE_OF_CHECKS if self.what == "correctness" else _PATIENCE


def competitors(case: Case) -> tuple[str, ...]:
    """Return the competitors that are timed in a case of PRODUCTS. d_scores reads no mask, so there is no choice."""
    if case.what == "accumulate":
        return DENSE, FUSED, CUDA, EAGER
    if case.what == "accumulate_product":
        return DENSE, FUSED, CUDA
    if case.what == "d_scores":
        return DENSE, FUSED, CUDA, PACKED, EAGER
    if case.what == "update":
        return FUSED, PLACE, DENSE, PASS
    names = [FUSED, *([] if case.what == "step" else [PLACE]), DENSE, PASS]
    names += [CUDA, PACKED, CUDA_PACKED, AUTO, AUTO_PACKED, EAGER]
    return tuple(names)


def is_beside_others(case: Case) -> bool:
    """Whether the CUDA kernels are one competitor among several, so that the case is useful without them."""
    return case.what in (*PRODUCTS, "threshold")


def deciding(shapes: Sequence[tuple[int, int]], tokens: Iterable[int]) -> list[Case]:
    """Return the default run: a preflight, what decides between the ways, training, checks, memcheck."""
    tokens, shapes = sorted(set(tokens)), _those(shapes, _DECIDING_SHAPES)
    return [
        *_cases(["correctness"], details=[PREFLIGHT]),
        *_cases(["forward", "d_x", "update"], shapes, _those(tokens, _DECIDING_TOKENS)),
        *_cases(["d_scores"], shapes, _those(tokens, _LARGE_TOKENS)),
        *_cases(["threshold"], shapes[:1], details=["bfloat16"]),
        *_cases(["score_step"], shapes[:1]),
        *_cases(["train"], tokens=_those(tokens, _TRAIN_TOKENS), details=[f"{TRAINED[0]}, {way}" for way in _WAYS]),
        *_cases(["train"], tokens=_those(tokens, _TRAIN_TOKENS), details=[f"{TRAINED[-1]}, {_WAYS[0]}"]),
        *_cases(["correctness"], details=(*_CHECKS, SANITIZERS[0])),
    ]  # fmt: skip


def plan(whats: Iterable[str], shapes: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[Case]:
    """Return every case of these kinds: those of the default run, the other ops, the rest, and programs last."""
    shapes, tokens = tuple(shapes), set(tokens)
    by_worth = [m for m in _TOKENS_BY_WORTH if m in tokens] + sorted(tokens - set(_TOKENS_BY_WORTH))
    products = [what for what in PRODUCTS if not what.startswith("accumulate")]
    square, selected = _those(shapes, [SQUARE]), _those(shapes, SELECTED)
    few, host_tokens = (
        preferred if tokens == set(TOKENS) else _those(by_worth, preferred) for preferred in (MANY_ROWS, HOST_TOKENS)
    )
    experts = [_EXPERT_SHAPE] if set(shapes) == set(EVERY_SHAPE) else shapes[:1]
    *first, memcheck = deciding(shapes, tokens)
    ordered = [
        *(case for case in first if case.m in (0, *tokens)),
        *_cases(["many"], square, few),
        *_cases(["accumulate_product"], square, _those(by_worth, _PRODUCT_TOKENS)),
        *_cases(["codes"], square, _those(by_worth, _CODED_TOKENS), CODES),
        *_cases(["host"], _those(shapes, _HOST_SHAPES), host_tokens),
        *_cases(["experts"], experts, _those(by_worth, _EXPERT_ROWS), OVER_EXPERTS),
        *_cases(["train"], tokens=_those(by_worth, _TRAIN_TOKENS),
                details=[f"{model}, {way}" for model in TRAINED for way in _WAYS]),
        *_cases(["accumulate"], _those(shapes, _ACCUMULATE_SHAPES), _those(by_worth, _ACCUMULATE_TOKENS)),
        *(case for dtype in ("bfloat16", "float32") for case in _cases(["threshold"], selected, details=[dtype])),
        *_cases([*products, "update"], sorted(shapes, key=lambda shape: shape != SQUARE), by_worth),
        memcheck,
        *_cases(["correctness"], details=(*SANITIZERS[1:], TESTS)),
    ]  # fmt: skip
    asked = set(whats)
    return list(dict.fromkeys(case for case in ordered if case.what in asked))


def schedule(cases: Iterable[Case]) -> str:
    """Return the planned start of each case, a line each, and the end."""
    at, lines = 0.0, []
    for case in cases:
        lines.append(f"{at:4.0f} s  {case}")
        at += case.planned
    return "\n".join([*lines, f"{at:4.0f} s  the end"])


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
