"""Which tiles a product takes on a target: small tables, and no measurement.

Every entry compiles without a spill for each kind of mask (make kernels-report). Which is fastest was not measured.
M tokens; P and Q as in product.py.
"""

import math
from dataclasses import dataclass, replace

from .target import Target

#: Columns of a tile that the epilogue of d_scores handles at a time. 64 spill with fp32 sums or a second output.
EPILOGUE_COLUMNS = 32

#: Into how many parts a sum is split at most.
MOST_SPLITS = 16

#: Up to here d_x and d_scores come from one launch, see backward.py.
MOST_TOKENS_OF_ONE_LAUNCH = 512


@dataclass(frozen=True)
class Operands:
    """What of the arguments decides the tiles, besides their sizes."""

    element: int  # bytes of an element of activations and weight
    keep: int = 0  # bytes of what tells whether one weight is kept; 0 for a packed bit
    exact: bool = False  # fp32 in full precision, which no tensor core does
    aligned: bool = True  # loads of 16 bytes and more


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a launch. ``inner`` is the step along the summed axis; ``blocks`` share a multiprocessor."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    blocks: int = 1
    splits: int = 1
    group: int = 8

    @property
    def registers(self) -> int:
        """That a thread may have, so that ``blocks`` fit."""
        return min(255, 65536 // (32 * self.warps * self.blocks) // 8 * 8)

    def part(self, summed: int) -> int:
        """Of a summed axis, what each of the splits sums: whole steps, and so whole words of a packed mask."""
        return math.ceil(math.ceil(summed / self.splits) / self.inner) * self.inner


#: For operands that are read element by element: addresses fill the registers, and larger tiles spill.
_NARROW = Tiles(64, 64, 32, 4, 2)


def product_tiles(target: Target, m: int, p: int, q: int, operands: Operands) -> Tiles:
    """rows: tokens, columns: of P, inner: of Q."""
    rows = _fit(m, 128)
    if target.backend == "interpreter":
        tiles = Tiles(16, 32, 32, 4, 2)
    elif operands.exact:
        tiles = Tiles(32, 64, 32, 8, 2)  # 32 columns are a whole word of a packed mask; larger tiles spill
    elif not operands.aligned:
        tiles = _NARROW
    elif target.swapped:
        # 128 rows of the weight feed two m64 instructions; tokens are the free axis of the instruction.
        if rows < 128:
            tiles = Tiles(rows, 128, 64, 4, 4, blocks=2)
        elif math.ceil(m / 256) * math.ceil(p / 128) < target.multiprocessors:
            tiles = Tiles(128, 128, 64, 8, 4)
        else:
            tiles = Tiles(256, 128, 64, 8, 4)
    elif target.hopper_or_newer:
        # Two blocks on a multiprocessor, so that one masks while the other multiplies.
        tiles = Tiles(max(rows, 64), 128, 32 if operands.keep == 4 else 64, 4, 2, blocks=2)
    elif target.backend == "hip":
        tiles = Tiles(rows, 128, 64, 8, 2)
    else:
        tiles = Tiles(min(rows, 64) if operands.element == 4 else rows, 128, 32, 8, 4)  # 128 rows of fp32 spill
    return _split(_fit_memory(tiles, target, operands, masks=True), target, m, p, q)


def outer_tiles(target: Target, m: int, n: int, k: int, operands: Operands) -> Tiles:
    """rows: of N, columns: of K, inner: of M."""
    if target.backend == "interpreter":
        tiles = Tiles(16, 64, 16, 4, 2)
    elif operands.exact:
        tiles = Tiles(64, 64, 16, 8, 2)
    elif not operands.aligned:
        tiles = _NARROW
    elif target.hopper_or_newer:
        wide = math.ceil(n / 128) * math.ceil(k / 256) >= target.multiprocessors
        tiles = Tiles(128, 256 if wide else 128, 64, 8, 3)
    elif target.backend == "hip":
        tiles = Tiles(128, 128, 32, 8, 2)
    else:
        tiles = Tiles(128, 128, 32, 8, 4)
    return _fit_memory(tiles, target, operands, masks=False)


def one_launch(m: int, element: int) -> bool:
    """Whether one launch makes d_x and d_scores; fp32 takes two, its tiles fill the registers."""
    return m <= MOST_TOKENS_OF_ONE_LAUNCH and element < 4


def backward_tiles(target: Target, m: int, n: int, k: int, operands: Operands, *, weight_grad: bool) -> Tiles:
    """Of the launch that makes d_x and d_scores: rows: tokens, columns: of K and of N, inner: of N and of M."""
    rows = _fit(m, 128)
    if target.backend == "interpreter":
        tiles = Tiles(16, 32, 32, 4, 2)
    elif not operands.aligned:
        tiles = _NARROW
    elif target.swapped and target.arch == 90:
        # Two blocks leave 128 registers a thread: enough for up to 64 tokens, 16-bit scores or a packed mask (with the
        # addresses of two stages, not three), and d_scores alone.
        two = rows <= 64 and operands.keep <= 2 and not weight_grad
        tiles = Tiles(max(rows, 64), 128, 64, 8, 2 if two and operands.keep == 0 else 3, blocks=2 if two else 1)
    elif target.hopper_or_newer:
        tiles = Tiles(max(rows, 16 if target.swapped else 64), 128, 64, 8, 3)
    elif target.backend == "hip":
        tiles = Tiles(rows, 128, 32, 8, 2)
    else:
        tiles = Tiles(rows, 128, 32, 8, 3)
    return _split(_fit_memory(tiles, target, operands, masks=True), target, m, k, n)


def _fit(m: int, most: int) -> int:
    """Rows of a tile for m tokens: 16, 64 or 128."""
    return min(most, 16 if m <= 16 else 64 if m <= 64 else 128)


def _fit_memory(tiles: Tiles, target: Target, operands: Operands, *, masks: bool) -> Tiles:
    """fp32 takes half the step; then as many stages as shared memory holds, at most the table's, at least 2."""
    if operands.element == 4 and not operands.exact:
        tiles = replace(tiles, inner=max(32 if masks else 16, tiles.inner // 2), columns=min(tiles.columns, 128))
    step = tiles.inner * operands.element
    stage = step * (tiles.rows + tiles.columns)
    fixed = 2048  # barriers, and what the driver keeps
    if masks:
        weight = step * tiles.columns
        stage += tiles.inner * tiles.columns * operands.keep
        # sm_90, swapped: the newest weight and scores are in registers, so they take one buffer less than there are
        # stages. Else the masked tile goes through shared memory, or waits for tensor memory there, and takes one more.
        in_registers = target.swapped and target.arch == 90
        fixed += -(weight + tiles.inner * tiles.columns * operands.keep) if in_registers else weight
    room = target.shared_memory // tiles.blocks - fixed
    return replace(tiles, stages=max(2, min(tiles.stages, room // stage)))


def _split(tiles: Tiles, target: Target, m: int, p: int, q: int) -> Tiles:
    """Split the sum where there are too few tiles for the card; each part keeps at least four steps."""
    places = target.multiprocessors * tiles.blocks
    count = math.ceil(m / tiles.rows) * math.ceil(p / tiles.columns)
    return replace(tiles, splits=max(1, min(places // count, q // (4 * tiles.inner), MOST_SPLITS)))
