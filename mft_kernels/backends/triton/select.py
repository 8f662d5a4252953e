"""kept_threshold: the k-th largest key, exactly, from histograms of its digits; the host waits for nothing.

A score's bits become an integer key that orders as the score does: without the sign bit ("magnitude"), or with negative
scores turned round ("value"). The key is found digit by digit, highest first; pass p counts, among the keys that begin
with the digits found so far, how often each value of the next digit occurs:

    fp32, "magnitude"        |  eeeeeeeemmm  mmmmmmmmmm  mmmmmmmmmm
    pass 0: 2048 counts      |  ^^^^^^^^^^^                           of all keys
    pass 1: 1024 counts      |  found        ^^^^^^^^^^               of the keys that begin so
    pass 2: 1024 counts      |  found        found       ^^^^^^^^^^
    threshold: 1 program     |  found        found       found        back to a float

A program finds the earlier digits anew from their histograms, a sum over 2048 counts at most, so that nothing runs
between two passes. The scores are read once a pass: 2 x 2 bytes a score of 16 bits, 3 x 4 in fp32. Counts are integers,
hence the same in any order.
"""

import math

import torch
from torch import Tensor

from ...reference.linear import kept_count
from . import planned
from .language import tl, triton
from .launch import launch
from .target import Target, target_of

# The first digit holds the exponent, and the sign in value mode: so its counts tell whether a score is not finite.
_WIDE = {(2, "magnitude"): (8, 7), (2, "value"): (9, 7), (4, "magnitude"): (11, 10, 10), (4, "value"): (11, 11, 10)}
_NARROW = _WIDE | {(4, "magnitude"): (8, 8, 8, 7), (4, "value"): (9, 8, 8, 7)}
# On CUDA, Triton 3.9 counts by one shared-memory atomic a score, however many bins there are. 3.6, and either on HIP,
# votes and counts the votes, bin by bin: on sm_90 32 scores then take 16 clocks with 256 bins, 128 with 2048 (reckoned
# from the SASS: a warp's POPC takes 2 clocks), which is 0.1 TB/s of fp32 scores.
_WIDE_TRITON = (3, 9)

# 16 scores a thread: two or four loads of 16 bytes, and three barriers for all of them. By magnitude a pass takes at
# most 64 registers, so four programs of 8 warps fit a multiprocessor and keep 32 KiB of 16-bit scores in flight, twice
# what an H100's 3.35 TB/s need at 700 ns. By value, and of fp32 on sm_120, it spills with 64. 32 scores a thread take
# up to 112 and spill.
_BLOCK = 4096
_WARPS = 8
_PROGRAMS = 4  # a multiprocessor; each adds its counts to those in memory once

INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


def kept_threshold(
    scores: Tensor, keep_ratio: float, mode: str, *, into: Tensor | None = None, only_if: Tensor | None = None
) -> Tensor:
    """The k-th largest key, 0-d in the scores' dtype; +inf if nothing is kept, NaN if a score is not finite.

    A threshold of zero may be -0.0, by the scores alone and not by their order. Scores that are not contiguous are
    copied. ``into`` receives the threshold. Where ``only_if``, an int32 on the device, is 0, the kernels do nothing.
    """
    target, kept = target_of(scores.device), kept_count(scores.numel(), keep_ratio)

    def run() -> list[Tensor]:
        threshold = _kth_largest(
            scores,
            kept,
            mode,
            digits=_digits(target)[scores.element_size(), mode],
            multiprocessors=target.multiprocessors,
            into=into,
            only_if=only_if,
        )
        return [threshold]

    # A number that int32 does not hold makes another binary.
    number = planned.kind("threshold", None, mode) if into is None and scores.numel() < 2**31 else None
    return planned.by_plan((scores,), number, run, {"kept": kept, "rank": rank_of(scores.numel(), kept)})[0]


def select(scores: Tensor, keep_ratio: float, mode: str, *, each: bool = False) -> Tensor:
    """kept_threshold of all scores, (); each: of each of scores (E, ...), in the same launches, (E,)."""
    if not each:
        return kept_threshold(scores, keep_ratio, mode)
    target = target_of(scores.device)
    return _kth_largest(
        scores,
        kept_count(scores[0].numel(), keep_ratio),
        mode,
        digits=_digits(target)[scores.element_size(), mode],
        multiprocessors=target.multiprocessors,
        matrices=len(scores),
    )


def rank_of(numel: int, kept: int) -> int:
    """Of the threshold among all keys, 1 is the smallest."""
    return numel - max(kept, 1) + 1


def many_bins(target: Target) -> bool:
    """Whether 2048 bins are counted as fast as 256."""
    return target.compiler >= _WIDE_TRITON and target.backend != "hip"


def _digits(target: Target) -> dict[tuple[int, str], tuple[int, ...]]:
    """Bits of each digit, the highest first, by bytes of a score and mode."""
    return _WIDE if many_bins(target) else _NARROW


def _kth_largest(
    scores: Tensor,
    kept: int,
    mode: str,
    *,
    digits: tuple[int, ...],
    multiprocessors: int,
    into: Tensor | None = None,
    only_if: Tensor | None = None,
    matrices: int | None = None,
) -> Tensor:
    """``matrices``: of each of so many, (matrices,); None: of all scores, 0-d."""
    count = matrices or 1
    numel = scores.numel() // count
    threshold = scores.new_empty(() if matrices is None else (matrices,)) if into is None else into
    if numel == 0:
        return threshold.fill_(math.inf)
    word = torch.uint16 if scores.element_size() == 2 else torch.uint32
    bits = scores.detach().contiguous().view(word)
    histograms = torch.zeros((count, len(digits), 1 << max(digits)), dtype=torch.int64, device=scores.device)
    rank = rank_of(numel, kept)
    options = {"MODE": mode, "SIGN": 1 << (8 * scores.element_size() - 1), "DIGITS": digits, "PITCH": 1 << max(digits)}
    for i in range(len(digits)):
        launch(
            _histogram_kernel,
            (min(triton.cdiv(numel, _BLOCK), triton.cdiv(_PROGRAMS * multiprocessors, count)), count),
            bits,
            histograms,
            only_if,
            None if matrices is None else numel,
            numel,
            rank,
            **options,
            PASS=i,
            SHIFT=sum(digits[i + 1 :]),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            maxnreg=64 if mode == "magnitude" and target_of(scores.device).arch != 120 else 128,
        )
    launch(
        _threshold_kernel,
        (count,),
        histograms,
        threshold.view(word),
        only_if,
        rank,
        kept,
        **options,
        INFINITY=INFINITY[scores.dtype],
        SHIFT=sum(digits[1:]),
        num_warps=4,
    )
    return threshold


@triton.jit
def _keys(bits, MODE: tl.constexpr, SIGN: tl.constexpr):
    """uint32 that order as the scores of these bits do, or as their magnitudes; -0.0 right below +0.0."""
    bits = bits.to(tl.uint32)
    if MODE == "magnitude":
        keys = bits & (SIGN - 1)
    else:
        keys = tl.where((bits & SIGN) != 0, bits ^ (2 * SIGN - 1), bits | SIGN)
    return keys


@triton.jit
def _select(histograms, rank, COUNT: tl.constexpr, DIGITS: tl.constexpr, PITCH: tl.constexpr):
    """The first COUNT digits, as one number, of the key of this rank (1 is the smallest)."""
    found = tl.full((), 0, tl.uint32)
    for i in tl.static_range(COUNT):
        counts = tl.load(histograms + i * PITCH + tl.arange(0, 1 << DIGITS[i]))
        below = tl.cumsum(counts, 0) < rank
        rank -= tl.sum(tl.where(below, counts, 0), 0)
        found = (found << DIGITS[i]) + tl.sum(below.to(tl.uint32), 0)
    return found


@triton.jit
def _count(
    bits, inside, found,
    MODE: tl.constexpr, SIGN: tl.constexpr, PASS: tl.constexpr, SHIFT: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """Histogram of a digit over the keys that begin with ``found``; ``inside`` is None or masks the load."""
    keys = _keys(tl.load(bits, mask=inside), MODE, SIGN)
    digits = ((keys >> SHIFT) & ((1 << DIGIT) - 1)).to(tl.int32)
    if PASS > 0:
        begins = (keys >> (SHIFT + DIGIT)) == found
        inside = begins if inside is None else begins & inside
    return tl.histogram(digits, 1 << DIGIT, mask=inside)


# Counts of one program are int32: it would take 2^31 scores a program, 2^40 on an H100, to overrun them.
@triton.jit(do_not_specialize=["numel", "rank"])
def _histogram_kernel(
    bits, histograms, only_if, stride, numel, rank,
    MODE: tl.constexpr, SIGN: tl.constexpr, DIGITS: tl.constexpr, PITCH: tl.constexpr,
    PASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to histograms[PASS] the digit above bit SHIFT of the keys whose higher digits are those found.

    A program takes every num_programs-th block. Whole blocks are loaded without a mask: with one, a numel that 16 does
    not divide would make every load one score wide. So would it as a stride, which is therefore another argument: that
    from one matrix to the next, along the grid's second axis; None where there is one.
    """
    if only_if is not None and tl.load(only_if) == 0:
        return
    DIGIT: tl.constexpr = DIGITS[PASS]
    if stride is not None:
        bits += tl.program_id(1).to(tl.int64) * stride
        histograms += tl.program_id(1) * (len(DIGITS) * PITCH)
    found = _select(histograms, rank, PASS, DIGITS, PITCH)
    counts = tl.zeros((1 << DIGIT,), tl.int32)
    blocks = numel // BLOCK
    offsets = tl.arange(0, BLOCK)
    for block in tl.range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        counts += _count(bits + block * BLOCK + offsets, None, found, MODE, SIGN, PASS, SHIFT, DIGIT)
    if tl.program_id(0) == blocks % tl.num_programs(0):
        rest = blocks * BLOCK
        counts += _count(bits + rest + offsets, offsets < numel - rest, found, MODE, SIGN, PASS, SHIFT, DIGIT)
    bins = histograms + PASS * PITCH + tl.arange(0, 1 << DIGIT)
    tl.atomic_add(bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rank", "kept"])
def _threshold_kernel(
    histograms, threshold, only_if, rank, kept,
    MODE: tl.constexpr, SIGN: tl.constexpr, DIGITS: tl.constexpr, PITCH: tl.constexpr,
    INFINITY: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The bits of the key of this rank, of +inf if nothing is kept, of NaN if pass 0 saw a key that is not finite.

    A matrix a program.
    """
    if only_if is not None and tl.load(only_if) == 0:
        return
    histograms += tl.program_id(0) * (len(DIGITS) * PITCH)
    key = _select(histograms, rank, len(DIGITS), DIGITS, PITCH)
    if MODE == "magnitude":
        bits = key
    else:
        bits = tl.where((key & SIGN) != 0, key ^ SIGN, key ^ (2 * SIGN - 1))
    bits = tl.where(kept == 0, INFINITY, bits)
    # Digits of keys: -NaN -Inf | finite | Inf NaN; in magnitude mode there is nothing on the left.
    digit = tl.arange(0, 1 << DIGITS[0])
    if MODE == "magnitude":
        finite = digit < (INFINITY >> SHIFT)
    else:
        finite = (digit < ((SIGN | INFINITY) >> SHIFT)) & (digit > ((SIGN - 1 - INFINITY) >> SHIFT))
    not_finite = tl.sum(tl.where(finite, 0, tl.load(histograms + digit)), 0)
    bits = tl.where(not_finite > 0, INFINITY | (INFINITY >> 1), bits)  # the quiet NaN
    tl.store(threshold + tl.program_id(0), bits.to(threshold.dtype.element_ty))
