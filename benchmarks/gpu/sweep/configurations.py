"""Which tiles a product could take, and the adapter to plan.py: what it takes, what it expects, others in place."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from mft_kernels.backends.triton import backward, plan, product, score_grad
from mft_kernels.backends.triton.plan import Operands, Tiles
from mft_kernels.backends.triton.planned import forget
from mft_kernels.backends.triton.target import Target

#: Sizes that instructions take; beyond 256 the sums of a tile do not fit the registers. Rows of less than 128 bytes are
#: no whole swizzle, and no product of plan.py has them but for fp32 scores.
_ROWS, _COLUMNS, _INNER = (16, 64, 128, 256), (64, 128, 256), (64, 128)
_WARPS, _STAGES, _SPLITS = (4, 8), (2, 3, 4, 5), (1, 2, 4, 8, 16)
_M64 = 64  # rows of a matrix instruction of sm_90, of its first operand
#: Registers of a thread beside those of the sums: addresses, and the operands of one instruction.
_OTHER_REGISTERS = 40
_LEAST_STEPS = 4  # of a part of a split sum, as in plan.py


@dataclass(frozen=True)
class Problem:
    """One product: "forward", "d_x", "d_scores", or "backward", which is d_x and d_scores in one launch."""

    kind: str
    m: int
    n: int
    k: int

    @property
    def summed(self) -> int:
        """Length of the axis that can be split; 0 where none can: d_scores is added up whole."""
        return {"forward": self.k, "d_x": self.n, "backward": self.n, "d_scores": 0}[self.kind]

    @property
    def outer(self) -> tuple[int, int]:
        """Extents that rows and columns of a tile divide."""
        return {"forward": (self.m, self.n), "d_scores": (self.n, self.k)}.get(self.kind, (self.m, self.k))


def planned(problem: Problem, target: Target, operands: Operands) -> Tiles:
    """What plan.py takes."""
    m, n, k = problem.m, problem.n, problem.k
    if problem.kind == "d_scores":
        return plan.outer_tiles(target, m, n, k, operands)
    if problem.kind == "backward":
        return plan.backward_tiles(target, m, n, k, operands, weight_grad=False)
    p, q = (n, k) if problem.kind == "forward" else (k, n)
    return plan.product_tiles(target, m, p, q, operands)


def predicted(problem: Problem, target: Target, operands: Operands, tiles: Tiles) -> float:
    """Seconds that plan.py's model expects of these tiles."""
    m, n, k = problem.m, problem.n, problem.k
    if problem.kind == "d_scores":
        return plan.outer_seconds(target, m, n, k, operands, tiles)
    if problem.kind == "backward":
        return plan.backward_seconds(target, m, n, k, operands, tiles)
    p, q = (n, k) if problem.kind == "forward" else (k, n)
    return plan.product_seconds(target, m, p, q, operands, tiles)


@contextlib.contextmanager
def instead(problem: Problem, tiles: Tiles) -> Iterator[None]:
    """Within the context the launcher of this kind of product takes these tiles."""
    module, name = _planner(problem.kind)
    before = getattr(module, name)

    def these(*_: Any, **__: Any) -> Tiles:
        return tiles

    forget()
    setattr(module, name, these)
    try:
        yield
    finally:
        setattr(module, name, before)
        forget()


def legal(problem: Problem, target: Target, operands: Operands) -> list[Tiles]:
    """Every tile, number of stages and split that may compile; the compiler and the card refuse some of them."""
    if target.backend == "interpreter":
        sizes: Any = ((16,), (32, 64), (32,), (4,), (2,), (1,))
    else:
        sizes = (_ROWS, _COLUMNS, _INNER, _WARPS, _STAGES, (1, 2))
    found = []
    for rows, columns, inner, warps, stages, blocks in itertools.product(*sizes):
        for splits in _SPLITS:
            tiles = Tiles(rows, columns, inner, warps, stages, blocks, splits)
            if _fits(tiles, problem, target, operands) and _is_worth_splitting(tiles, problem, target):
                found.append(tiles)
    return found


def _fits(tiles: Tiles, problem: Problem, target: Target, operands: Operands) -> bool:
    if target.backend == "interpreter":
        return True
    height, width = problem.outer
    fewest = 16 if target.swapped and problem.kind != "d_scores" else _M64
    if tiles.rows < min(_M64, max(fewest, height)):
        return False
    # A tile of twice the extent computes as much that nobody wants.
    if tiles.rows >= 2 * max(fewest, height) or tiles.columns >= 2 * max(_M64, width):
        return False
    sums = tiles.rows * tiles.columns / (32 * tiles.warps)
    if problem.kind == "backward":  # its other tiles are columns x columns
        sums = max(sums, tiles.columns**2 / (32 * tiles.warps))
    if sums + _OTHER_REGISTERS > tiles.registers:
        return False
    step = tiles.inner * operands.element
    masked = 0 if problem.kind == "d_scores" else tiles.inner * tiles.columns * operands.keep
    # One stage less than there are, since some forms keep the newest of the weight in registers.
    needed = (tiles.stages - 1) * (step * (tiles.rows + tiles.columns) + masked) + step * tiles.rows
    two = 2 * needed <= target.shared_memory and sums + _OTHER_REGISTERS <= replace(tiles, blocks=2).registers
    return needed * tiles.blocks <= target.shared_memory and tiles.blocks == (2 if two else 1)


def _is_worth_splitting(tiles: Tiles, problem: Problem, target: Target) -> bool:
    """Not at all, or where tiles leave multiprocessors without work, up to twice as many as there are places."""
    if tiles.splits == 1:
        return True
    height, width = problem.outer
    count = math.ceil(height / tiles.rows) * math.ceil(width / tiles.columns)
    places = target.multiprocessors * tiles.blocks
    whole = problem.summed >= tiles.splits * _LEAST_STEPS * tiles.inner or target.backend == "interpreter"
    return bool(problem.summed) and whole and count < places and count * tiles.splits <= 2 * places


def _planner(kind: str) -> tuple[ModuleType, str]:
    return {"d_scores": (score_grad, "outer_tiles"), "backward": (backward, "backward_tiles")}.get(
        kind, (product, "product_tiles")
    )
