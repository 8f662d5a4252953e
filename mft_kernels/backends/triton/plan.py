"""Choose the tiles of a product on a target: those that cost.py expects to be fastest among those that compile well.

Every entry compiles without a spill for each kind of mask (make kernels-report). Which is fastest was not measured.
M tokens; P and Q as in product.py.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .cards import Card, card_of
from .cost import LAUNCH, Jobs, seconds, sum_seconds
from .target import Target

#: Columns of a tile that the epilogue of d_scores handles at a time. 64 spill with fp32 sums or a second output.
EPILOGUE_COLUMNS = 32

#: The largest number of parts that a sum is split into.
MOST_SPLITS = 16
#: Bytes that the parts of up to 16 tokens may always take. L2 writes and reads them in 0.2 us, a tenth of a launch.
_FREE_PARTS = 2**19


@dataclass(frozen=True)
class Operands:
    """The properties of the arguments that decide the tiles, besides their sizes."""

    element: int  # bytes per element of activations and weight
    keep: int = 0  # bytes of the score that decides whether a weight is kept; 0 for a packed bit
    exact: bool = False  # fp32 in full precision, which no tensor core computes
    aligned: bool = True  # loads of 16 bytes and more are possible


class Problem(NamedTuple):
    """Products to compute on a target: m tokens each, by matrices of p x q elements (P x Q, or N x K)."""

    target: Target
    m: int
    p: int
    q: int
    operands: Operands
    experts: int | None = None  # number of matrices; None: one matrix that belongs to no expert

    @property
    def flipped(self) -> "Problem":
        """The product in the other direction: P and Q swapped."""
        return self._replace(p=self.q, q=self.p)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a launch. ``inner`` is the step along the summed axis; ``blocks`` blocks share a multiprocessor."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    blocks: int = 1
    splits: int = 1
    group: int = 8
    plain: bool = False  # the masked weight is the second operand in any form of the target

    @property
    def registers(self) -> int:
        """Registers that a thread may use so that ``blocks`` blocks fit on a multiprocessor."""
        return min(255, 65536 // (32 * self.warps * self.blocks) // 8 * 8)

    def options(self, axes: str) -> dict[str, int]:
        """Return a launch's options: BLOCK_x for each of the three axes, stages, warps and registers.

        ``axes``: the letters of the axes of rows, columns and inner, such as "MPQ".
        """
        blocks = dict(zip((f"BLOCK_{axis}" for axis in axes), (self.rows, self.columns, self.inner)))
        return {**blocks, "STAGES": self.stages, "num_warps": self.warps, "maxnreg": self.registers}

    def part(self, summed: int) -> int:
        """Return how much of a summed axis each split sums: whole steps, and so whole words of a packed mask."""
        return math.ceil(math.ceil(summed / self.splits) / self.inner) * self.inner


#: For operands that are read element by element. Addresses fill the registers, and larger tiles spill.
_NARROW = (Tiles(64, 64, 32, 4, 2),)
_INTERPRETED = (Tiles(16, 32, 32, 4, 2),)

#: For up to 16 tokens, every card multiplies with `mma.sync`. Its first operand has 16 rows, and its second any number
#: of columns, so the weight is the second. Tiles of 32 rows of the weight fill a card with a quarter of the parts that
#: tiles of 128 rows need. In return, activations come from L2 four times as often. The 12 warps of a multiprocessor
#: hide each other's masking.
_FEW = Tiles(16, 32, 128, 4, 4, blocks=3, plain=True)
#: Tiles of a product, by form. rows: tokens; columns: of P; inner: of Q. In the swapped form, 128 rows of the weight
#: feed two m64 instructions, and tokens are the free axis of the instruction.
_SWAPPED = (
    _FEW,
    Tiles(64, 128, 64, 4, 4, blocks=2),
    Tiles(128, 128, 64, 8, 4),
    Tiles(256, 128, 64, 8, 4),
)
_PRODUCT: dict[str, tuple[Tiles, ...]] = {
    "interpreter": _INTERPRETED,
    "exact": (Tiles(32, 64, 32, 8, 2),),  # 32 columns are a whole word of a packed mask; larger tiles spill
    "narrow": _NARROW,
    "swapped sm_90": _SWAPPED,
    "swapped sm_100": _SWAPPED,
    # Two blocks per multiprocessor, so that one masks while the other multiplies.
    "plain sm_90": (_FEW, Tiles(64, 128, 64, 4, 2, blocks=2), Tiles(128, 128, 64, 4, 2, blocks=2)),
    "hip": (Tiles(16, 128, 64, 8, 2), Tiles(64, 128, 64, 8, 2), Tiles(128, 128, 64, 8, 2)),
    "sm_80": (_FEW, Tiles(64, 128, 32, 8, 4), Tiles(128, 128, 32, 8, 4)),
}
#: Tiles of a product with one mask per row, by mma.sync. With 16 masks, a thread takes up to 225 registers. On sm_89,
#: 64 rows with 4 warps spilled.
_MANY = (
    replace(_FEW, stages=3, blocks=2),
    Tiles(32, 64, 64, 4, 3, blocks=2, plain=True),
    Tiles(64, 64, 64, 8, 3, plain=True),
)
#: Tiles of a product over codes. In a taller tile, more tokens share the work of decoding.
_QUANTIZED = (*_MANY[:2], Tiles(64, 64, 64, 4, 3, blocks=2, plain=True), Tiles(128, 128, 64, 8, 3, plain=True))
_QUANTIZED_NARROW = (Tiles(16, 64, 32, 4, 2), Tiles(64, 64, 32, 8, 2))
#: Tiles of d_scores. rows: of N; columns: of K; inner: of M.
_HOPPER_OUTER = (Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3))
_OUTER: dict[str, tuple[Tiles, ...]] = {
    "interpreter": (Tiles(16, 64, 16, 4, 2),),
    "exact": (Tiles(64, 64, 16, 8, 2),),
    "narrow": (replace(_NARROW[0], warps=8),),  # with 4 warps, weight and scores spill if d_weight is wanted (sm_89)
    "swapped sm_90": _HOPPER_OUTER,
    "swapped sm_100": _HOPPER_OUTER,
    "plain sm_90": _HOPPER_OUTER,
    "hip": (Tiles(128, 128, 32, 8, 2),),
    "sm_80": (Tiles(128, 128, 32, 8, 4),),
}
#: Tiles of d_x and d_scores in one launch. rows: tokens; columns: of K and of N; inner: of N and of M.
_HOPPER_BACKWARD = (Tiles(64, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 3))
_BACKWARD: dict[str, tuple[Tiles, ...]] = {
    "interpreter": _INTERPRETED,
    "narrow": _NARROW,
    "swapped sm_90": _HOPPER_BACKWARD,
    "swapped sm_100": (Tiles(16, 128, 64, 8, 3), *_HOPPER_BACKWARD),
    "plain sm_90": _HOPPER_BACKWARD,
    "hip": (Tiles(16, 128, 32, 8, 2), Tiles(64, 128, 32, 8, 2), Tiles(128, 128, 32, 8, 2)),
    "sm_80": (Tiles(16, 128, 32, 8, 3), Tiles(64, 128, 32, 8, 3), Tiles(128, 128, 32, 8, 3)),
}
#: Bytes that the epilogue of d_scores moves per element: weight, sign and result in 16 bits, or weight and fp32 result.
_EPILOGUE_BYTES = 6
#: The share of a GEMM's rate that is left if weights are masked between the multiplications. Estimates. Swapped sm_90
#: masks one step while the tensor cores multiply another. Plain sm_90 sends masked tiles through shared memory, sm_100
#: through tensor memory. On the others, the same warps mask and multiply.
_SHARES = {
    "interpreter": 0.7,
    "swapped sm_90": 0.84,
    "plain sm_90": 0.6,
    "swapped sm_100": 0.6,
    "hip": 0.7,
    "sm_80": 0.7,
}
#: How many choices each cache holds: more sizes than a process meets. Each choice takes about 0.15 ms on the host.
_MEMORY = 2**14


@functools.lru_cache(_MEMORY)
def product_tiles(problem: Problem) -> Tiles:
    """Return the tiles of a product. rows: tokens; columns: of P; inner: of Q. For experts, no sum is split."""
    operands, experts = problem.operands, problem.experts
    form = _form(problem)
    known = _PRODUCT[form]
    if form == "sm_80" and operands.element == 4:
        known = tuple(t for t in known if t.rows <= 64)  # 128 rows of fp32 spill
    if form == "plain sm_90" and operands.keep == 4:
        known = tuple(t if t.plain else replace(t, inner=32) for t in known)
    if experts is not None and form == "exact":
        known = (Tiles(16, 64, 32, 8, 2),)  # 32 rows spill together with the row ranges of 256 experts
    elif experts is not None and operands.element == 4:
        known = tuple(t for t in known if t.rows <= 128)  # on sm_90, 256 rows spill for experts, not for one matrix
    elif experts is not None and form == "hip" and operands.keep == 4:
        known = tuple(t for t in known if t.rows <= 64)  # 128 rows spill
    choices = [t for t in _choices(known, problem) if t.splits == 1 or experts is None]
    return min(choices, key=lambda tiles: product_seconds(problem, tiles))


def product_seconds(problem: Problem, tiles: Tiles, *, share: float = 1.0) -> float:
    """Return the expected seconds of products that reach ``share`` of the rate in the vendor's data sheet."""
    return _seconds(problem, tiles, [_products(problem, tiles)], share=share)


@functools.lru_cache(_MEMORY)
def many_tiles(problem: Problem, masks: int) -> Tiles:
    """Return the tiles of a product with one mask per row. rows: tokens; columns: of N; inner: of K."""
    if problem.target.backend == "interpreter":
        known = tuple(replace(_INTERPRETED[0], rows=tiles.rows) for tiles in _MANY)
    elif problem.operands.exact:
        known = (Tiles(16, 32, 32, 4, 2),)  # 64 columns spilled on sm_100 and sm_120
    else:
        known = _MANY
    tallest = [next((tiles for tiles in known if tiles.rows >= problem.m), known[-1])]
    return min(_choices(tallest, problem), key=lambda tiles: _many_seconds(problem, tiles, masks))


def _many_seconds(problem: Problem, tiles: Tiles, masks: int) -> float:
    """Return the expected seconds with ``masks`` masks, of which at most one per row is used.

    Each used mask is loaded and costs one more multiplication.
    """
    one, taken = _products(problem, tiles), min(masks, problem.m)
    jobs = replace(
        one,
        multiply_adds=one.multiply_adds * max(1, taken),
        read=one.read + one.masked / 8 * taken,
        masked=one.masked * taken,
    )
    return _seconds(problem, tiles, [jobs], beside=taken / 8)


@functools.lru_cache(_MEMORY)
def quantized_tiles(problem: Problem) -> Tiles:
    """Return the tiles of a product over codes, as if they were a dense weight.

    rows: tokens; columns: of P; inner: of Q.
    """
    if problem.target.backend == "interpreter":
        known = tuple(replace(_INTERPRETED[0], rows=tiles.rows) for tiles in _QUANTIZED)
    elif problem.operands.exact or not problem.operands.aligned:
        known = _QUANTIZED_NARROW
    else:
        known = _QUANTIZED
    return min(_choices(known, problem), key=lambda tiles: product_seconds(problem, tiles))


def fused_seconds(problem: Problem) -> float:
    """Return the expected seconds of the fused product: product_seconds with masking between the multiplications."""
    share = _SHARES[_form(problem)]
    return product_seconds(problem, product_tiles(problem), share=share)


def scratch_seconds(problem: Problem) -> float:
    """Return the expected seconds of a mask pass into scratch and a dense product."""
    operands = problem.operands
    moved = 2 * operands.element + (operands.keep or 1 / 8)
    return LAUNCH + problem.p * problem.q * moved / _card(problem.target).bandwidth + dense_seconds(problem)


def dense_seconds(problem: Problem) -> float:
    """Return the expected seconds of torch's GEMM, without a mask, at the data sheet's rate.

    On cards with clusters, its blocks share what they read in clusters of two.
    """
    maskless = _maskless(problem)
    tiles = product_tiles(maskless)
    jobs = replace(_products(maskless, tiles), masked=0)
    if problem.target.hopper_or_newer:
        jobs = replace(jobs, read=jobs.read / 2)
    return _seconds(maskless, tiles, [jobs])


@functools.lru_cache(_MEMORY)
def outer_tiles(problem: Problem) -> Tiles:
    """Return the tiles of d_scores. rows: of N; columns: of K; inner: of M.

    For experts, the tokens are not read through descriptors.
    """
    known = _OUTER[_form(problem)]
    if problem.experts is not None:
        known = tuple(t for t in known if t.columns <= 128)  # 256 columns spill on sm_90
    fitted = [_fit_memory(tiles, problem, masks=False) for tiles in known]
    return min(fitted, key=lambda tiles: outer_seconds(problem, tiles))


def outer_seconds(problem: Problem, tiles: Tiles) -> float:
    """Return the expected seconds of d_scores."""
    return _seconds(problem, tiles, [_outer(problem, tiles)], beside=_EPILOGUE_BYTES - 2)  # _seconds counts the weight


@functools.lru_cache(_MEMORY)
def one_launch(problem: Problem) -> bool:
    """Return whether one launch is expected to make d_x and d_scores (N x K) at least as fast as two launches.

    fp32 takes two, because its tiles fill the registers.
    """
    if problem.operands.element == 4:
        return False
    both = backward_seconds(problem, backward_tiles(problem, weight_grad=False))
    d_x = product_seconds(problem.flipped, product_tiles(problem.flipped))
    maskless = _maskless(problem)
    d_scores = outer_seconds(maskless, outer_tiles(maskless))
    return both <= d_x + LAUNCH + d_scores


@functools.lru_cache(_MEMORY)
def backward_tiles(problem: Problem, *, weight_grad: bool) -> Tiles:
    """Return the tiles of the launch that makes d_x and d_scores.

    rows: tokens; columns: of K and of N; inner: of N and of M.
    """
    operands = problem.operands
    form = _form(problem)
    known = _BACKWARD[form]
    # Two blocks per multiprocessor leave 128 registers per thread. That is enough for up to 64 tokens with 16-bit
    # scores or a packed mask, and d_scores without d_weight. With a packed mask, the addresses of two stages fit, but
    # not those of three.
    if form == "swapped sm_90" and operands.keep <= 2 and not weight_grad:
        known = tuple(replace(t, blocks=2, stages=2 if operands.keep == 0 else 3) if t.rows <= 64 else t for t in known)
    return min(_choices(known, problem.flipped), key=lambda tiles: backward_seconds(problem, tiles))


def backward_seconds(problem: Problem, tiles: Tiles) -> float:
    """Return the expected seconds of the launch that makes d_x and d_scores."""
    outer = replace(tiles, rows=tiles.columns, inner=min(tiles.inner, max(16, tiles.rows)))
    jobs = [_products(problem.flipped, tiles), _outer(problem, outer)]
    return _seconds(problem.flipped, tiles, jobs, beside=problem.operands.keep or 4)  # bytes of d_scores


def _maskless(problem: Problem) -> Problem:
    return problem._replace(operands=replace(problem.operands, keep=0))


def _form(problem: Problem) -> str:
    """Return the key of the tile tables: what of target and operands decides which tiles compile well."""
    target, operands = problem.target, problem.operands
    if target.backend == "interpreter":
        return "interpreter"
    if operands.exact:
        return "exact"
    if not operands.aligned:
        return "narrow"
    if target.hopper_or_newer:
        generation = "sm_90" if target.arch == 90 else "sm_100"
        return f"swapped {generation}" if target.swapped else f"plain {generation}"
    return "hip" if target.backend == "hip" else "sm_80"


@functools.cache
def _card(target: Target) -> Card:
    card = card_of(target.arch, target.multiprocessors, target.shared_memory, target.bandwidth)
    return replace(card, l2_rate=target.l2_rate or card.l2_rate)


def _fit_memory(tiles: Tiles, problem: Problem, *, masks: bool) -> Tiles:
    """Return the tiles with half the step for fp32, and as many stages as fit (at most the table's, at least 2)."""
    target, operands = problem.target, problem.operands
    if operands.element == 4 and not operands.exact:
        tiles = replace(tiles, inner=max(32 if masks else 16, tiles.inner // 2), columns=min(tiles.columns, 128))
    step = tiles.inner * operands.element
    stage = step * (tiles.rows + tiles.columns)
    fixed = 2048  # barriers, and what the driver reserves
    if masks:
        weight = step * tiles.columns
        stage += tiles.inner * tiles.columns * operands.keep
        # On sm_90 in the swapped form, the newest weight and scores are in registers, so they need one buffer less than
        # there are stages. Otherwise the masked tile goes through shared memory, or waits there for tensor memory, and
        # needs one buffer more.
        in_registers = target.swapped and target.arch == 90 and not tiles.plain
        fixed += -(weight + tiles.inner * tiles.columns * operands.keep) if in_registers else weight
        if tiles.plain:  # one buffer less than stages, also for words; the weight they mask goes through shared memory
            packed = operands.keep == 0
            stage += tiles.inner * tiles.columns // 8 * packed
            fixed = 1024 + weight * packed - stage
    room = target.shared_memory // tiles.blocks - fixed
    return replace(tiles, stages=max(2, min(tiles.stages, room // stage)))


def _choices(known: Sequence[Tiles], problem: Problem) -> Iterator[Tiles]:
    """Yield the known tiles, each with every allowed number of parts.

    A part has at least four steps, and all parts fit into half of L2; the other half is for the operands. For up to 16
    tokens in plain tiles, activations and parts move at most a tenth of the bytes of weight and mask, or the parts move
    no more than _FREE_PARTS. A tile has no more rows than m tokens need.
    """
    target, m, p, q, operands, _ = problem
    need = min((t.rows for t in known if t.rows >= m), default=m)
    for each in known:
        if each.rows <= need:
            fitted = _fit_memory(each, problem, masks=True)
            most = min(MOST_SPLITS, q // (4 * fitted.inner), _card(target).l2 // 2 // (4 * m * p))
            if m <= 16 and each.plain:
                tenth = p * q * (operands.element + (operands.keep or 1 / 8)) / 10 - m * (p + q) * operands.element
                most = min(most, int(max(tenth, _FREE_PARTS)) // (8 * m * p))  # written and read in fp32
            yield from (replace(fitted, splits=splits) for splits in range(1, max(1, most) + 1))


def _products(problem: Problem, tiles: Tiles) -> Jobs:
    _, m, p, q, operands, _ = problem
    part = tiles.part(q)
    parts = math.ceil(q / part)
    weight = operands.element + (operands.keep or 1 / 8)
    return Jobs(
        count=math.ceil(m / tiles.rows) * math.ceil(p / tiles.columns) * parts,
        steps=part // tiles.inner,
        multiply_adds=tiles.rows * tiles.columns * tiles.inner,
        read=tiles.inner * (min(m, tiles.rows) * operands.element + tiles.columns * weight),
        written=tiles.rows * tiles.columns * (operands.element if parts == 1 else 4),
        masked=tiles.inner * tiles.columns,
        warps=tiles.warps,
    )


def _outer(problem: Problem, tiles: Tiles) -> Jobs:
    _, m, n, k, operands, _ = problem
    return Jobs(
        count=math.ceil(n / tiles.rows) * math.ceil(k / tiles.columns),
        steps=math.ceil(m / tiles.inner),
        multiply_adds=tiles.rows * tiles.columns * tiles.inner,
        read=tiles.inner * (tiles.rows + tiles.columns) * operands.element,
        written=tiles.rows * tiles.columns * _EPILOGUE_BYTES,
    )


def _seconds(problem: Problem, tiles: Tiles, jobs: list[Jobs], *, share: float = 1.0, beside: float = 0) -> float:
    """Return the expected seconds of the launch, and of the one that adds up the parts.

    ``beside``: bytes per element of the weight that move in addition to the weight and its mask.
    """
    target, m, p, q, operands, experts = problem
    card, matrices = _card(target), experts or 1
    memory = matrices * (m * (p + q) * operands.element + p * q * (operands.element + operands.keep + beside))
    jobs = [replace(kind, count=matrices * kind.count) for kind in jobs]
    rate = _rate(card, operands) * share
    launch = seconds(card, jobs, memory=memory, blocks=tiles.blocks, stages=tiles.stages, rate=rate)
    return launch + sum_seconds(card, math.ceil(q / tiles.part(q)), m * p)


def _rate(card: Card, operands: Operands) -> float:
    """Return multiply-adds per cycle.

    TF32 has half the 16-bit rate. Ordinary cores have 64 (A100, used here) or 128.
    """
    return 64 if operands.exact else card.multiply_adds * 2 / operands.element
