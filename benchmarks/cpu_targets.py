"""Time goals of the layer on a CPU, in units of a dense layer of the same dtype, by instruction set.

A row is an op on a shape. The columns are bf16 with AMX, bf16 with AVX512-BF16, and fp32 on any AVX-512. In addition,
no forward pass and no step may take more than 1.05 times eager PyTorch's, on any processor.
"""

from dataclasses import dataclass

from .layer_competitors import FROM_SCORES, HELD, IN_PLACE

SQUARE, NARROW = (4096, 4096), (576, 1536)
EAGER_BOUND = 1.05  # times eager PyTorch, at most, everywhere


@dataclass(frozen=True)
class Target:
    """A row of the table: the bounds of one competitor, by column."""

    op: str
    shape: tuple[int, int]
    m: int
    competitor: str
    bounds: tuple[float, float, float]  # in the order of _COLUMNS


# The place of a bound, by dtype and instruction set.
_COLUMNS = {("bf16", "amx"): 0, ("bf16", "avx512_bf16"): 1} | {
    ("fp32", name): 2 for name in ("amx", "avx512_bf16", "avx512")
}
TARGETS = (
    Target("step", SQUARE, 4096, FROM_SCORES, (1.05, 1.08, 1.05)),
    Target("step", SQUARE, 4096, HELD, (1.05, 1.08, 1.05)),
    Target("step", SQUARE, 512, FROM_SCORES, (1.10, 1.03, 1.10)),
    Target("step", SQUARE, 512, HELD, (1.00, 0.97, 1.05)),
    Target("step", SQUARE, 64, FROM_SCORES, (1.10, 0.97, 1.10)),
    Target("step", SQUARE, 64, HELD, (0.90, 0.77, 1.00)),
    Target("forward", SQUARE, 1, HELD, (0.6, 0.8, 0.9)),
    Target("forward", SQUARE, 16, HELD, (0.6, 0.8, 0.9)),
    Target("step", NARROW, 512, FROM_SCORES, (1.15, 1.15, 1.15)),
    Target("step", NARROW, 512, HELD, (1.15, 1.15, 1.15)),
    *(Target(op, SQUARE, m, IN_PLACE, (1.02, 1.02, 1.02)) for op in ("forward", "d_x") for m in (1, 16)),
    *(Target("step", SQUARE, m, IN_PLACE, (1.02, 1.02, 1.02)) for m in (64, 512, 4096)),
    Target("step", NARROW, 512, IN_PLACE, (1.02, 1.02, 1.02)),
)


def bound(
    instruction_set: str, dtype: str, op: str, shape: tuple[int, int], m: int, threads: int, competitor: str
) -> float | None:
    """Return the upper bound in units of the dense layer; None if there is none, as with one thread."""
    place = _COLUMNS.get((dtype, instruction_set))
    if place is None or threads == 1:
        return None
    asked = (op, shape, m, competitor)
    found = (one for one in TARGETS if (one.op, one.shape, one.m, one.competitor) == asked)
    return next((target.bounds[place] for target in found), None)
