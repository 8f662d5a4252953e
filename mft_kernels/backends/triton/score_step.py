"""score_step: one AdamW step on scores and moments in one pass over memory; the next threshold from a window.

The flattened matrix is divided into chunks of 1024 elements, and each chunk into four blocks of 256. In the 8-bit
scheme, each block has its own scale. A program takes two chunks at a time, with two warps each, and walks their blocks
side by side:

               block 0   block 1   block 2   block 3
    chunk 0   | word 0  | word 1  | word 2  | word 3  |   a thread makes the four Philox words of 4 counters once and
    chunk 1   | word 0  | word 1  | word 2  | word 3  |   uses them for 4 neighbouring elements of each block

If 16-bit scores come with their old threshold, the program reads its new scores back from the cache and counts their
keys: each key value in a window around the old threshold, and all keys above the window. A small program reads the new
threshold from these counts. If the threshold lies outside the window, the program sets a flag. The kernels of select.py
are always launched, but they read the scores again only if the flag is set. So the host never waits.

On an NVIDIA GPU, the 8-bit scheme takes approximate instructions for quotients and roots (PTX). They are off by 2 units
in the last place at most, so that about one score in 10,000 is rounded the other way than in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import Update
from ...reference.fixed_point import selectable
from ...reference.linear import kept_count
from ...reference.step import BLOCK, CHUNK, MEAN_BIAS, MEAN_CODES, SQUARE_BIAS, SQUARE_CODES
from .bits import pack_mask
from .launch import launch
from .select import INFINITY, keys_of, many_bins, select
from .target import Target, interpreting, target_of

# Four elements per thread: 16 bytes of fp32, 8 and 4 bytes of the other dtypes, and whole lines of 128 bytes per warp.
# With eight elements, the 8-bit scheme takes 230 registers (sm_90), and two programs would fill a multiprocessor.
_CHUNKS, _WARPS = 2, 4
_REGISTERS = 128  # four programs per multiprocessor
_PROGRAMS = 6  # per multiprocessor; an estimate, not measured
# 512 key values in each direction: 0.002 in fixed point, four octaves in bf16. No usual optimiser step moves a
# threshold that far. 2048 bins spill (sm_90). Where Triton counts bin by bin (see select.py), 1024 bins would cost more
# than they save.
_WINDOW, _NARROW_WINDOW = 1024, 256


def score_step(update: Update) -> tuple[Tensor, Tensor]:
    """Run the reference's step in place, and return the next threshold and packed mask.

    Both are empty without a keep_ratio. Gradient and weight are copied if they are not contiguous.
    """
    update, clock = update.by_clock()
    decay, step_size, correction = update.rates
    scores, keep_ratio, mode = update.scores, update.keep_ratio, update.mode
    target = target_of(scores.device)
    # As integers: the interpreter has no bf16 arithmetic, and int16 is not a float.
    words = scores if scores.dtype == torch.float32 else scores.view(torch.int16)
    hint = update.threshold if keep_ratio is not None and scores.dtype != torch.float32 else None
    window = window_of(target)
    counts = None
    if hint is not None:  # the bins, the keys above them, the scores that are not finite
        counts = torch.zeros(window + 2, dtype=torch.int64, device=scores.device)
        hint = hint.view(torch.int16)
    keys: dict[str, str | int] = {"MODE": mode, "INFINITY": INFINITY[selectable(scores).dtype], "WINDOW": window}
    launch(
        _score_step_kernel,
        (min(triton.cdiv(scores.numel(), _CHUNKS * CHUNK), _PROGRAMS * target.multiprocessors),),
        words,
        *update.tensors()[1:],
        update.grad_scale,
        hint,
        counts,
        clock,
        scores.numel(),
        _signed(update.step),
        _signed(update.seed),
        _signed(update.seed >> 32),
        float(decay),
        float(update.beta1),
        1.0 - update.beta1,
        float(update.beta2),
        1.0 - update.beta2,
        -step_size,
        correction,
        float(update.eps),
        FORMAT={torch.float32: "fp32", torch.bfloat16: "bf16", torch.int16: "fixed"}[scores.dtype],
        FROM_END=1.0 - update.beta1 >= 0.5,
        **keys,
        BLOCK=BLOCK,
        CHUNKS=_CHUNKS,
        BIASES=(MEAN_BIAS, SQUARE_BIAS),
        CODES=(MEAN_CODES, SQUARE_CODES),
        PTX=target.backend == "cuda" and not interpreting(),
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
        enable_fp_fusion=False,  # the reference rounds every product
    )
    if keep_ratio is None:
        return scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)
    found = _next_threshold(scores, hint, counts, keep_ratio, keys)
    return found.view(scores.dtype), pack_mask(selectable(scores), found, mode)


def window_of(target: Target) -> int:
    """Return the width of the window: how many key values around the old threshold are counted separately."""
    return _WINDOW if many_bins(target) else _NARROW_WINDOW


def _next_threshold(
    scores: Tensor, hint: Tensor | None, counts: Tensor | None, keep_ratio: float, keys: dict[str, str | int]
) -> Tensor:
    """Return the threshold of the scores, 0-d, from the counts if the window holds it; as fp16 for int16 scores."""
    floats, mode = selectable(scores), str(keys["MODE"])
    if counts is None or scores.numel() == 0:
        return select(floats, keep_ratio, mode)
    found = floats.new_empty(())
    missed = torch.empty((), dtype=torch.int32, device=scores.device)
    launch(
        _window_kernel,
        (1,),
        counts,
        hint,
        found.view(torch.int16),
        missed,
        kept_count(scores.numel(), keep_ratio),
        **keys,
        num_warps=4,
    )
    return select(floats, keep_ratio, mode, into=found, only_if=missed)


def _signed(word: int) -> int:
    """Return the lower 32 bits as an int32, so that every number compiles to the same kernel."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


# ---------------------------------------------------------------------------------------------- scores


@triton.jit
def _widen(words, FORMAT: tl.constexpr):
    """Return scores as fp32. A fixed-point code above the largest one, 0x7bff, is NaN."""
    if FORMAT == "fp32":
        values = words
    elif FORMAT == "bf16":
        values = (words.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        magnitude = words.to(tl.int32) & 0x7FFF
        values = tl.where(magnitude > 0x7BFF, float("nan"), magnitude.to(tl.float32) * 0.000003814697265625)  # 2^-18
        values = tl.where(words < 0, -values, values)
    return values


@triton.jit
def _narrow(values, old, word, FORMAT: tl.constexpr):
    """Round scores stochastically by the lower 16 bits of a random word; see narrow_scores in reference/step.py."""
    if FORMAT == "fp32":
        words = values
    else:
        pattern = values.to(tl.uint32, bitcast=True)
        magnitude = pattern & 0x7FFFFFFF
        bits = word & 0xFFFF
        if FORMAT == "bf16":
            rounded = (pattern + tl.where(magnitude < 0x7F800000, bits, 0)) >> 16
            words = tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
        else:
            finite = magnitude < 0x7F800000
            # A number exceeds the whole number of bits exactly if its ceiling does. So the ceiling, in 2^-34, decides.
            q = tl.ceil(tl.minimum(tl.abs(values) * 17179869184.0, 2080309248.0)).to(tl.int32)  # at most 31743 * 2^16
            code = (q + (bits ^ 0xFFFF).to(tl.int32, bitcast=True)) >> 16
            code = tl.where(finite, code, 0x7C00).to(tl.uint32)
            sign = (pattern >> 16) & 0x8000
            sign = tl.where(magnitude > 0x7F800000, 0, sign)
            sign = tl.where(magnitude == 0, old.to(tl.uint16, bitcast=True).to(tl.uint32) & 0x8000, sign)
            words = code | sign
        words = words.to(tl.uint16).to(tl.int16, bitcast=True)
    return words


@triton.jit
def _signs(values, words, FORMAT: tl.constexpr):
    """Return sign(score): 0 for 0 and NaN. A fixed-point 0 counts as +1 or -1, by its sign bit."""
    if FORMAT == "fixed":
        signs = tl.where(words < 0, -1.0, 1.0)
    else:
        signs = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))
    return signs


# ---------------------------------------------------------------------------------------------- 8-bit moments


@triton.jit
def _quotient(a, b, PTX: tl.constexpr):
    """Return a / b. By PTX, it is off by 2 units in the last place at most; b is from 2^-126 to 2^126, or gives 0."""
    if PTX:
        approximate: tl.constexpr = "div.approx.ftz.f32 $0, $1, $2;"
        found = tl.inline_asm_elementwise(approximate, "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    else:
        found = tl.div_rn(a, b)
    return found


@triton.jit
def _decode(codes, scale, BIAS: tl.constexpr, CODES: tl.constexpr):
    """Return minifloat codes as fp32, times their block's scale; see decode in reference/step.py."""
    if CODES == 128:  # bit 7 is the sign
        pattern = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20).to(tl.uint32, bitcast=True) & 0x87F00000
    else:
        pattern = codes.to(tl.uint32) << 20
    # A float of the same exponent and mantissa bits, but of another bias. Of codes below 8 it is subnormal.
    bias = tl.full((), (254 - BIAS) << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(127 - BIAS)
    values = pattern.to(tl.float32, bitcast=True) * bias
    return values * scale


@triton.jit
def _encode(values, inside, bits, BIAS: tl.constexpr, CODES: tl.constexpr, PTX: tl.constexpr):
    """Return (codes, scale of each row), rounded stochastically by 8 bits; see encode in reference/step.py."""
    pattern = values.to(tl.uint32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    if inside is not None:
        magnitude = tl.where(inside, magnitude, 0)
    top = tl.max(magnitude.to(tl.int32), 1, keep_dims=True)  # bit patterns order as their values do, with NaN on top
    coded = (top >= (2 << 23)) & (top <= 0x7F800000)  # 2^-125
    largest = tl.minimum(top, 253 << 23).to(tl.float32, bitcast=True)  # 2^126
    scale = tl.where(coded, _quotient(largest, 1.875, PTX), tl.where(top > 0x7F800000, float("nan"), 0.0))
    y = tl.abs(values) * tl.where(coded, _quotient(1.875, tl.where(coded, largest, 1.0), PTX), 0.0)
    if PTX:  # below the least, the product is subnormal, and rounding toward 0 truncates it
        factor = tl.full((), BIAS << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(BIAS - 127)
        cut: tl.constexpr = "mul.rz.f32 $0, $1, $2;"
        y = tl.inline_asm_elementwise(cut, "=f,f,f", [y, factor], tl.float32, is_pure=True, pack=1)
        fixed = y.to(tl.uint32, bitcast=True)
    else:
        least = tl.full((), (128 - BIAS) << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(1 - BIAS)
        steps = tl.full((), (149 + BIAS) << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(22 + BIAS)
        low = (tl.minimum(y, least) * steps).to(tl.uint32)
        fixed = tl.where(y < least, low, y.to(tl.uint32, bitcast=True) - ((127 - BIAS) << 23))
    codes = tl.minimum((fixed + ((bits & 0xFF) << 12) + 2048) >> 20, tl.where(coded, CODES - 1, 0).to(tl.uint32))
    if CODES == 128:
        codes = codes | ((pattern >> 24) & tl.where(coded, 0x80, 0).to(tl.uint32))
    else:  # a positive square stays positive
        codes = tl.maximum(codes, tl.minimum(pattern, coded.to(tl.uint32)))
    return codes.to(tl.uint8), scale


# ---------------------------------------------------------------------------------------------- the window


@triton.jit
def _keys_of_16_bits(words, MODE: tl.constexpr):
    return keys_of(words.to(tl.uint16, bitcast=True), MODE, 0x8000).to(tl.int32)


@triton.jit
def _window_start(hint, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """Return the lowest key of the window. The old threshold lies in its middle."""
    return tl.maximum(_keys_of_16_bits(tl.load(hint), MODE) - WINDOW // 2, 0)


@triton.jit
def _count(
    scores, offsets, inside, start, bins, above, bad,
    MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the counts, to which those of the keys at ``offsets`` are added. If one is not finite, only bad counts."""
    words = tl.load(scores + offsets, mask=inside, other=None if inside is None else 0)
    place = _keys_of_16_bits(words, MODE) - start  # in the window: 0 .. WINDOW - 1
    if inside is not None:
        place = tl.where(inside, place, -1)
    bins += tl.histogram(place, WINDOW, mask=place.to(tl.uint32, bitcast=True) < WINDOW)
    above += tl.sum((place >= WINDOW).to(tl.int32))
    bad += (tl.max(words.to(tl.int32) & 0x7FFF) >= INFINITY).to(tl.int32)
    return bins, above, bad


@triton.jit(do_not_specialize=["kept"])
def _window_kernel(
    counts, hint, threshold, missed, kept,
    MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Write the bits of the kept-th largest key, or set the flag ``missed`` if the window does not hold it.

    The bits are those of +inf if nothing is kept, and of NaN if a score is not finite.
    """
    bins = tl.load(counts + tl.arange(0, WINDOW))
    above = tl.load(counts + WINDOW)
    # The number of keys in a bin or above falls from bin to bin. The last bin where it is >= kept holds the threshold.
    reached = above + tl.sum(bins, 0) - tl.cumsum(bins, 0) + bins >= kept
    count = tl.sum(reached.to(tl.int32), 0)
    key = _window_start(hint, MODE, WINDOW) + count - 1
    if MODE == "magnitude":
        bits = key
    else:
        bits = tl.where((key & 0x8000) != 0, key ^ 0x8000, key ^ 0xFFFF)
    not_finite = tl.load(counts + WINDOW + 1) > 0
    miss = (kept > 0) & ((count == 0) | (above >= kept)) & (not_finite == 0)
    bits = tl.where(kept == 0, INFINITY, bits)
    bits = tl.where(not_finite, INFINITY | (INFINITY >> 1), bits)  # the quiet NaN
    tl.store(threshold, bits.to(tl.int16))
    tl.store(missed, miss.to(tl.int32))


# ---------------------------------------------------------------------------------------------- the step


@triton.jit
def _words(counter, seed, step):
    """Return the four words of each counter and of the 3 after it, (CHUNKS, 4 n); counter (CHUNKS, n): multiples of 4.

    A thread then has the words of neighbours, as it loads them. Words of one call would pass through shared memory.
    """
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    number = zero + step.to(tl.uint32)
    a = tl.philox(seed, low, high, number, zero)
    b = tl.philox(seed, low + 1, high, number, zero)
    c = tl.philox(seed, low + 2, high, number, zero)
    d = tl.philox(seed, low + 3, high, number, zero)
    w0 = tl.interleave(tl.interleave(a[0], c[0]), tl.interleave(b[0], d[0]))
    w1 = tl.interleave(tl.interleave(a[1], c[1]), tl.interleave(b[1], d[1]))
    w2 = tl.interleave(tl.interleave(a[2], c[2]), tl.interleave(b[2], d[2]))
    w3 = tl.interleave(tl.interleave(a[3], c[3]), tl.interleave(b[3], d[3]))
    return w0, w1, w2, w3


@triton.jit
def _step_block(
    scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, numel, block, word,
    decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
    FORMAT: tl.constexpr, FROM_END: tl.constexpr, MODE: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, BIASES: tl.constexpr, CODES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Step the blocks numbered ``block``, (CHUNKS, 1)."""
    offsets = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = None if WHOLE else offsets < numel
    blocks = tl.cdiv(numel, BLOCK)
    exists = None if WHOLE else block < blocks
    other = None if WHOLE else 0
    old = tl.load(scores + offsets, mask=inside, other=other)
    values = _widen(old, FORMAT)
    g = tl.load(grad + offsets, mask=inside, other=other).to(tl.float32)
    if weight is not None:
        w = tl.load(weight + offsets, mask=inside, other=other).to(tl.float32)
        if scales is None:
            g = g * w
        if MODE == "magnitude":
            g = g * _signs(values, old, FORMAT)
    if grad_scale is not None:
        g = g * tl.load(grad_scale)
    values = values * decay
    m = tl.load(exp_avg + offsets, mask=inside, other=other)
    v = tl.load(exp_avg_sq + offsets, mask=inside, other=other)
    if scales is None:
        # Round as torch's kernels do: lerp_ and addcmul_ with a fused multiply-add, addcdiv_ without.
        if FROM_END:
            m = tl.fma(g - m, tl.zeros_like(m) + (minus_beta1 - 1.0), g)
        else:
            m = tl.fma(g - m, tl.zeros_like(m) + minus_beta1, m)
        v = tl.fma(minus_beta2 * g, g, v * beta2)
        tl.store(exp_avg + offsets, m, mask=inside)
        tl.store(exp_avg_sq + offsets, v, mask=inside)
        values += tl.div_rn(minus_step_size * m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
    else:
        m = _decode(m, tl.load(scales + block, mask=exists, other=other), BIASES[0], CODES[0])
        v = _decode(v, tl.load(scales + blocks + block, mask=exists, other=other), BIASES[1], CODES[1])
        m = m * beta1 + g * minus_beta1
        v = v * beta2 + (g * g) * minus_beta2
        moved = m
        root = tl.sqrt(v) if PTX else tl.sqrt_rn(v)
        if weight is not None:
            moved = m * w
            root = root * tl.abs(w)
        values += _quotient(moved * minus_step_size, root * correction + eps, PTX)
        codes, scale = _encode(m, inside, word >> 16, BIASES[0], CODES[0], PTX)
        tl.store(exp_avg + offsets, codes, mask=inside)
        tl.store(scales + block, scale, mask=exists)
        codes, scale = _encode(v, inside, word >> 24, BIASES[1], CODES[1], PTX)
        tl.store(exp_avg_sq + offsets, codes, mask=inside)
        tl.store(scales + blocks + block, scale, mask=exists)
    tl.store(scores + offsets, _narrow(values, old, word, FORMAT), mask=inside)


@triton.jit
def _step_chunks(
    scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, bins, above, bad, numel, chunk,
    step, seed_low, seed_high, decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
    FORMAT: tl.constexpr, FROM_END: tl.constexpr, MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
    COUNTED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BIASES: tl.constexpr, CODES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Step CHUNKS chunks from number ``chunk`` on, and return the counts, to which theirs are added if COUNTED."""
    chunks = chunk + tl.arange(0, CHUNKS).to(tl.int64)[:, None]
    if scales is None and FORMAT == "fp32":  # nothing is rounded
        zero = tl.zeros((CHUNKS, BLOCK), tl.uint32)
        w0, w1, w2, w3 = zero, zero, zero, zero
    else:
        seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
        w0, w1, w2, w3 = _words(chunks * BLOCK + tl.arange(0, BLOCK // 4)[None, :] * 4, seed, step)
    # By two: 137 instructions per int16 score with 8-bit moments (sm_90). By four: 125, but 32 KiB of code.
    for i in tl.range(0, 4, loop_unroll_factor=2):
        word = tl.where(i < 2, tl.where(i == 0, w0, w1), tl.where(i == 2, w2, w3))
        _step_block(
            scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, numel, chunks * 4 + i, word,
            decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
            FORMAT, FROM_END, MODE, WHOLE, BLOCK, BIASES, CODES, PTX,
        )  # fmt: skip
    if COUNTED:
        tl.debug_barrier()  # other threads have written these scores
        offsets = chunk * (4 * BLOCK) + tl.arange(0, CHUNKS * 4 * BLOCK)
        inside = None if WHOLE else offsets < numel
        bins, above, bad = _count(scores, offsets, inside, start, bins, above, bad, MODE, INFINITY, WINDOW)
    return bins, above, bad


# One program counts in int32. An overflow would take 2^31 scores per program.
@triton.jit(do_not_specialize=["numel", "step", "seed_low", "seed_high"])
def _score_step_kernel(
    scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, hint, counts, clock, numel,
    step, seed_low, seed_high, decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
    FORMAT: tl.constexpr, FROM_END: tl.constexpr, MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, BIASES: tl.constexpr, CODES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Step every num_programs-th group of CHUNKS chunks. Whole groups are loaded without a mask, as in select.py."""
    COUNTED: tl.constexpr = counts is not None
    if clock is not None:  # see Update.by_clock
        step = tl.load(clock)
        decay = tl.load(clock + 1).to(tl.float32, bitcast=True)
        minus_step_size = tl.load(clock + 2).to(tl.float32, bitcast=True)
        correction = tl.load(clock + 3).to(tl.float32, bitcast=True)
    groups = numel // (CHUNKS * 4 * BLOCK)
    start = 0
    if COUNTED:
        start = _window_start(hint, MODE, WINDOW)
    bins = tl.zeros((WINDOW,), tl.int32)
    above = tl.full((), 0, tl.int32)
    bad = tl.full((), 0, tl.int32)
    for group in tl.range(tl.program_id(0).to(tl.int64), groups, tl.num_programs(0)):
        bins, above, bad = _step_chunks(
            scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, bins, above, bad, numel,
            group * CHUNKS, step, seed_low, seed_high,
            decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
            FORMAT, FROM_END, MODE, INFINITY, WINDOW, COUNTED, True, BLOCK, CHUNKS, BIASES, CODES, PTX,
        )  # fmt: skip
    if tl.program_id(0) == groups % tl.num_programs(0):
        bins, above, bad = _step_chunks(
            scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, bins, above, bad, numel,
            groups.to(tl.int64) * CHUNKS, step, seed_low, seed_high,
            decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
            FORMAT, FROM_END, MODE, INFINITY, WINDOW, COUNTED, False, BLOCK, CHUNKS, BIASES, CODES, PTX,
        )  # fmt: skip
    if COUNTED:
        tl.atomic_add(counts + tl.arange(0, WINDOW), bins.to(tl.int64), mask=bins > 0, sem="relaxed")
        tl.atomic_add(counts + WINDOW, above.to(tl.int64), mask=above > 0, sem="relaxed")
        tl.atomic_add(counts + WINDOW + 1, bad.to(tl.int64), mask=bad > 0, sem="relaxed")
