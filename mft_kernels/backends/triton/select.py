"""select: the exact k-th largest key, from histograms of its digits. The host never waits.

A score's bits become an integer key that orders as the score does: without the sign bit ("magnitude"), or with the
order of negative scores reversed ("value"). The key is found digit by digit, the highest first. Each pass counts how
often each value of the next digit occurs, among the keys that begin with the digits found so far:

    fp32, "magnitude"        |  eeeeeeeemmm  mmmmmmmmmm  mmmmmmmmmm
    pass 0: 2048 counts      |  ^^^^^^^^^^^                           of all keys
    pass 1: 1024 counts      |  found        ^^^^^^^^^^               of the keys that begin with found
    pass 2: 1024 counts      |  found        found       ^^^^^^^^^^
    threshold: 1 program     |  found        found       found        back to a float

Each program finds the earlier digits again from their histograms, by a sum over at most 2048 counts. So nothing runs
between two passes. Each pass reads the scores once: 2 x 2 bytes per 16-bit score, 3 x 4 bytes per fp32 score (4 x 4
with the digits of _NARROW). Counts are integers, so their order does not change the result.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.linear import kept_count
from .launch import launch
from .target import Target, target_of

# The first digit holds the exponent, and in value mode also the sign. So its counts tell whether a score is not finite.
_WIDE = {(2, "magnitude"): (8, 7), (2, "value"): (9, 7), (4, "magnitude"): (11, 10, 10), (4, "value"): (11, 11, 10)}
_NARROW = _WIDE | {(4, "magnitude"): (8, 8, 8, 7), (4, "value"): (9, 8, 8, 7)}
# On CUDA, Triton 3.9 counts with one shared-memory atomic per score, for any number of bins. Triton 3.6, and both
# versions on HIP, vote and count the votes bin by bin. On sm_90, 32 scores then take 16 clocks with 256 bins, and 128
# clocks with 2048 bins (computed from the SASS: a warp's POPC takes 2 clocks), which is 0.1 TB/s of fp32 scores.
_WIDE_TRITON = (3, 9)

# 16 scores per thread: two or four loads of 16 bytes, and three barriers for all of them. In magnitude mode, a pass
# takes at most 64 registers. So four programs of 8 warps fit on a multiprocessor and keep 32 KiB of 16-bit scores in
# flight, twice what an H100's 3.35 TB/s needs at 700 ns. In value mode, and for fp32 on sm_120, a pass spills with 64
# registers. 32 scores per thread take up to 112 registers and spill.
_BLOCK = 4096
_WARPS = 8
_PROGRAMS = 4  # per multiprocessor; each adds its counts to memory once

INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


def select(
    scores: Tensor,
    keep_ratio: float,
    mode: str,
    *,
    each: bool = False,
    into: Tensor | None = None,
    only_if: Tensor | None = None,
) -> Tensor:
    """Return the k-th largest key, 0-d in the scores' dtype; +inf if nothing is kept, NaN if a score is not finite.

    A threshold of zero may be -0.0. That depends on the scores, not on their order. Scores that are not contiguous are
    copied. ``each``: return that of each matrix of scores (E, ...), (E,), by the same launches. ``into`` receives the
    threshold. If ``only_if``, an int32 on the device, is 0, the kernels do nothing.
    """
    target = target_of(scores.device)
    return _kth_largest(
        scores,
        kept_count(scores[0].numel() if each else scores.numel(), keep_ratio),
        mode,
        digits=_digits(target)[scores.element_size(), mode],
        multiprocessors=target.multiprocessors,
        into=into,
        only_if=only_if,
        matrices=len(scores) if each else None,
    )


def many_bins(target: Target) -> bool:
    """Return whether 2048 bins are counted as fast as 256."""
    return target.compiler >= _WIDE_TRITON and target.backend != "hip"


def _digits(target: Target) -> dict[tuple[int, str], tuple[int, ...]]:
    """Return the bits of each digit, the highest first, by bytes per score and mode."""
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
    """Return the k-th largest key of each of ``matrices`` matrices, (matrices,); None: of all scores, 0-d."""
    count = matrices or 1
    numel = scores.numel() // count
    threshold = scores.new_empty(() if matrices is None else (matrices,)) if into is None else into
    if numel == 0:
        return threshold.fill_(math.inf)
    word = torch.uint16 if scores.element_size() == 2 else torch.uint32
    bits = scores.detach().contiguous().view(word)
    histograms = torch.zeros((count, len(digits), 1 << max(digits)), dtype=torch.int64, device=scores.device)
    rank = numel - max(kept, 1) + 1  # of the threshold among all keys; 1 is the smallest key
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
def keys_of(bits, MODE: tl.constexpr, SIGN: tl.constexpr):
    """Return uint32 keys that order as the scores of these bits, or their magnitudes, do.

    By value, -0.0 is right below +0.0.
    """
    bits = bits.to(tl.uint32)
    if MODE == "magnitude":
        keys = bits & (SIGN - 1)
    else:
        keys = tl.where((bits & SIGN) != 0, bits ^ (2 * SIGN - 1), bits | SIGN)
    return keys


@triton.jit
def _select(histograms, rank, COUNT: tl.constexpr, DIGITS: tl.constexpr, PITCH: tl.constexpr):
    """Return the first COUNT digits of the key of this rank (1 is the smallest), as one number."""
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
    """Return the histogram of a digit over the keys that begin with ``found``; ``inside`` is None or masks the load."""
    keys = keys_of(tl.load(bits, mask=inside), MODE, SIGN)
    digits = ((keys >> SHIFT) & ((1 << DIGIT) - 1)).to(tl.int32)
    if PASS > 0:
        begins = (keys >> (SHIFT + DIGIT)) == found
        inside = begins if inside is None else begins & inside
    return tl.histogram(digits, 1 << DIGIT, mask=inside)


# One program counts in int32. An overflow would take 2^31 scores per program, 2^40 on an H100.
@triton.jit(do_not_specialize=["numel", "rank"])
def _histogram_kernel(
    bits, histograms, only_if, stride, numel, rank,
    MODE: tl.constexpr, SIGN: tl.constexpr, DIGITS: tl.constexpr, PITCH: tl.constexpr,
    PASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the digit above bit SHIFT into histograms[PASS], for the keys whose higher digits are those found.

    A program takes every num_programs-th block. Whole blocks are loaded without a mask. With a mask, a numel that is
    not a multiple of 16 would make every load one score wide. So would numel as a stride. Therefore ``stride``, from
    one matrix to the next along the grid's second axis, is an argument of its own; it is None for a single matrix.
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
    """Write the bits of the key of this rank: +inf if nothing is kept, NaN if pass 0 saw a key that is not finite.

    One program per matrix.
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
    # First digits of keys, in order: -NaN -Inf | finite | Inf NaN. In magnitude mode, the left part is empty.
    digit = tl.arange(0, 1 << DIGITS[0])
    if MODE == "magnitude":
        finite = digit < (INFINITY >> SHIFT)
    else:
        finite = (digit < ((SIGN | INFINITY) >> SHIFT)) & (digit > ((SIGN - 1 - INFINITY) >> SHIFT))
    not_finite = tl.sum(tl.where(finite, 0, tl.load(histograms + digit)), 0)
    bits = tl.where(not_finite > 0, INFINITY | (INFINITY >> 1), bits)  # the quiet NaN
    tl.store(threshold + tl.program_id(0), bits.to(threshold.dtype.element_ty))
