"""score_step: one AdamW step on scores and moments in one pass over memory; the next threshold from a window.

The flattened matrix falls into chunks of 1024, a chunk into four blocks of 256, each with a scale of its own in the
8-bit scheme. A program takes two chunks at a time, two warps each, and walks their blocks side by side:

               block 0   block 1   block 2   block 3
    chunk 0   | word 0  | word 1  | word 2  | word 3  |   a thread makes the four Philox words of 4 counters once, and
    chunk 1   | word 0  | word 1  | word 2  | word 3  |   spends them on 4 neighbours of each block

16-bit scores that come with their old threshold are counted in the same pass: how many new keys lie in a window round
the old threshold, each of its values by itself, and how many above it. From these counts a small program reads the new
threshold. Where it lies outside the window, it raises a flag, and only then do the kernels of select.py, launched in
any case, read the scores again: the host waits for nothing.
"""

import torch
from torch import Tensor

from ...operands import Update
from ...reference.linear import kept_count
from ...reference.step import BLOCK, CHUNK, MEAN_BIAS, MEAN_CODES, SQUARE_BIAS, SQUARE_CODES
from . import planned
from .bits import pack_mask
from .language import tl, triton
from .launch import launch
from .select import INFINITY, kept_threshold, many_bins, rank_of
from .target import Target, target_of

# Four elements a thread: fp32 in 16 bytes, the rest in 8 and 4, whole lines of 128 bytes a warp. With eight the 8-bit
# scheme takes 230 registers (sm_90), and two programs would fill a multiprocessor.
_CHUNKS, _WARPS = 2, 4
_REGISTERS = 168  # three programs a multiprocessor; with 144 sm_100 spills
_PROGRAMS = 6  # a multiprocessor; an estimate, not measured
# 512 steps either way: 0.002 in fixed point, four octaves in bf16. No usual step moves a threshold that far. 2048 bins
# spill (sm_90); where Triton counts bin by bin (see select.py), 1024 would cost more than they spare.
_WINDOW, _NARROW_WINDOW = 1024, 256


def score_step(update: Update) -> tuple[Tensor, Tensor]:
    """The step of the reference, in place, and its results: threshold and packed mask.

    Without a ratio they are empty. Gradient and weight are copied where they are not contiguous.
    """
    update, clock = update.by_clock()
    scores, beta1, beta2 = update.scores, update.beta1, update.beta2
    numbers = {
        "step": _signed(update.step),
        "seed_low": _signed(update.seed),
        "seed_high": _signed(update.seed >> 32),
        "decay": float(update.decay),
        "beta1": float(beta1),
        "minus_beta1": 1.0 - beta1,
        "beta2": float(beta2),
        "minus_beta2": 1.0 - beta2,
        "minus_step_size": -update.step_size,
        "correction": update.correction,
        "eps": float(update.eps),
    }
    kept = None if update.keep_ratio is None else kept_count(scores.numel(), update.keep_ratio)
    from_selection = {} if kept is None else {"kept": kept, "rank": rank_of(scores.numel(), kept)}
    # A number that int32 does not hold makes another binary.
    kind = planned.kind("step", None, update.mode, kept is None, 1 - beta1 >= 0.5) if scores.numel() < 2**31 else None
    given = (
        *(scores, update.grad, update.weight, update.exp_avg, update.exp_avg_sq, update.scales),
        *(update.grad_scale, update.threshold, clock),
    )
    found, packed = planned.by_plan(given, kind, lambda: _score_step(update, clock, numbers), numbers | from_selection)
    return found, packed


def _score_step(update: Update, clock: Tensor | None, numbers: dict[str, float]) -> list[Tensor]:
    scores, keep_ratio, mode = update.scores, update.keep_ratio, update.mode
    target = target_of(scores.device)
    # As integers: the interpreter knows no arithmetic on bf16, and int16 is no float.
    words = scores if scores.dtype == torch.float32 else scores.view(torch.int16)
    hint = update.threshold if keep_ratio is not None and scores.dtype != torch.float32 else None
    window = window_of(target)
    counts = None
    if hint is not None:  # the bins, how many keys above them, how many not finite
        counts = torch.zeros(window + 2, dtype=torch.int64, device=scores.device)
        hint = hint.view(torch.int16)
    keys: dict[str, str | int] = {"MODE": mode, "INFINITY": INFINITY[_floats(scores).dtype], "WINDOW": window}
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
        *numbers.values(),
        FORMAT={torch.float32: "fp32", torch.bfloat16: "bf16", torch.int16: "fixed"}[scores.dtype],
        FROM_END=numbers["minus_beta1"] >= 0.5,
        **keys,
        BLOCK=BLOCK,
        CHUNKS=_CHUNKS,
        BIASES=(MEAN_BIAS, SQUARE_BIAS),
        CODES=(MEAN_CODES, SQUARE_CODES),
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
        enable_fp_fusion=False,  # the reference rounds every product
    )
    if keep_ratio is None:
        return [scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)]
    found = _next_threshold(scores, hint, counts, keep_ratio, keys)
    return [found.view(scores.dtype), pack_mask(_floats(scores), found, mode)]


def window_of(target: Target) -> int:
    """How many keys round the old threshold are counted, each by itself."""
    return _WINDOW if many_bins(target) else _NARROW_WINDOW


def _next_threshold(
    scores: Tensor, hint: Tensor | None, counts: Tensor | None, keep_ratio: float, keys: dict[str, str | int]
) -> Tensor:
    """kept_threshold of the scores, from the counts where the window holds it; 0-d, for int16 scores as fp16."""
    floats, mode = _floats(scores), str(keys["MODE"])
    if counts is None or scores.numel() == 0:
        return kept_threshold(floats, keep_ratio, mode)
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
    return kept_threshold(floats, keep_ratio, mode, into=found, only_if=missed)


def _floats(scores: Tensor) -> Tensor:
    """Scores as the selection reads them: fixed point as fp16."""
    return scores.view(torch.float16) if scores.dtype == torch.int16 else scores


def _signed(word: int) -> int:
    """The lower 32 bits as an int32, so that every number compiles to the same kernel."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


# ---------------------------------------------------------------------------------------------- scores


@triton.jit
def _widen(words, FORMAT: tl.constexpr):
    """fp32 values of scores; a fixed-point code above the largest, 0x7bff, is NaN."""
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
    """Scores rounded stochastically by the lower 16 bits of a random word; see narrow_scores of reference/step.py."""
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
            q = tl.where(finite, tl.minimum(tl.abs(values) * 262144.0, 31743.0), 0.0)
            whole = q.to(tl.int32)
            up = (q - whole.to(tl.float32)) * 65536.0 > bits.to(tl.float32)
            code = tl.where(finite, whole + up.to(tl.int32), 0x7C00).to(tl.uint32)
            sign = (pattern >> 16) & 0x8000
            sign = tl.where(magnitude > 0x7F800000, 0, sign)
            sign = tl.where(magnitude == 0, old.to(tl.uint16, bitcast=True).to(tl.uint32) & 0x8000, sign)
            words = code | sign
        words = words.to(tl.uint16).to(tl.int16, bitcast=True)
    return words


@triton.jit
def _signs(values, words, FORMAT: tl.constexpr):
    """sign(score): 0 of 0 and NaN; a fixed-point 0 counts as the sign that it carries."""
    if FORMAT == "fixed":
        signs = tl.where(words < 0, -1.0, 1.0)
    else:
        signs = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))
    return signs


# ---------------------------------------------------------------------------------------------- 8-bit moments


@triton.jit
def _decode(codes, scale, BIAS: tl.constexpr, CODES: tl.constexpr):
    """fp32 values of minifloat codes, times their block's scale; see decode of reference/step.py."""
    code = codes.to(tl.uint32)
    magnitude = code & (CODES - 1)
    normal = ((magnitude + ((127 - BIAS) << 3)) << 20).to(tl.float32, bitcast=True)
    least = tl.full((), (125 - BIAS) << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(-2 - BIAS)
    values = tl.where(magnitude < 8, magnitude.to(tl.float32) * least, normal)
    if CODES == 128:
        values = tl.where(code >= 128, -values, values)
    return values * scale


@triton.jit
def _encode(values, inside, bits, BIAS: tl.constexpr, CODES: tl.constexpr):
    """(codes, scale of each row): minifloats rounded stochastically by 8 bits; see encode of reference/step.py."""
    pattern = values.to(tl.uint32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    if inside is not None:
        magnitude = tl.where(inside, magnitude, 0)
    top = tl.max(magnitude.to(tl.int32), 1, keep_dims=True)  # patterns order as their values, NaN above all
    coded = (top >= (2 << 23)) & (top <= 0x7F800000)  # 2^-125
    largest = tl.minimum(top, 253 << 23).to(tl.float32, bitcast=True)  # 2^126
    scale = tl.where(coded, tl.div_rn(largest, 1.875), tl.where(top > 0x7F800000, float("nan"), 0.0))
    y = tl.where(coded, magnitude.to(tl.float32, bitcast=True) * tl.div_rn(1.875, tl.where(coded, largest, 1.0)), 0.0)
    least = tl.full((), (128 - BIAS) << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(1 - BIAS)
    steps = tl.full((), (149 + BIAS) << 23, tl.uint32).to(tl.float32, bitcast=True)  # 2^(22 + BIAS)
    low = (tl.minimum(y, least) * steps).to(tl.uint32)
    fixed = tl.where(y < least, low, y.to(tl.uint32, bitcast=True) - ((127 - BIAS) << 23))
    codes = tl.minimum((fixed + ((bits & 0xFF) << 12) + 2048) >> 20, CODES - 1)
    if CODES == 128:
        codes = codes | tl.where(coded, (pattern >> 24) & 0x80, 0)
    else:  # a positive square stays one
        codes = tl.where(coded & (magnitude > 0), tl.maximum(codes, 1), codes)
    return codes.to(tl.uint8), scale


# ---------------------------------------------------------------------------------------------- the window


@triton.jit
def _keys(words, MODE: tl.constexpr):
    """int32 that order as 16-bit scores, or their magnitudes, do; as select._keys."""
    bits = words.to(tl.int32) & 0xFFFF
    if MODE == "magnitude":
        keys = bits & 0x7FFF
    else:
        keys = tl.where((bits & 0x8000) != 0, bits ^ 0xFFFF, bits | 0x8000)
    return keys


@triton.jit
def _window_start(hint, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """The lowest key of the window, in whose middle the old threshold lies."""
    return tl.maximum(_keys(tl.load(hint), MODE) - WINDOW // 2, 0)


@triton.jit
def _place(words, inside, start, MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr):
    """Where a key lies: in 0 .. WINDOW - 1 its bin, -1 below, WINDOW above, WINDOW + 1 not finite."""
    place = tl.minimum(tl.maximum(_keys(words, MODE) - start, -1), WINDOW)
    place = tl.where((words.to(tl.int32) & 0x7FFF) >= INFINITY, WINDOW + 1, place)
    if inside is not None:
        place = tl.where(inside, place, -1)
    return place


@triton.jit(do_not_specialize=["kept"])
def _window_kernel(
    counts, hint, threshold, missed, kept,
    MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The bits of the kept-th largest key, of +inf if nothing is kept, of NaN if a score is not finite; or a flag."""
    bins = tl.load(counts + tl.arange(0, WINDOW))
    above = tl.load(counts + WINDOW)
    # How many keys lie in a bin or higher: falls from bin to bin. The last bin where it suffices holds the threshold.
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
def _step_block(
    scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, numel, block, word,
    decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
    FORMAT: tl.constexpr, FROM_END: tl.constexpr, MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, BIASES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Step the blocks of these numbers, (CHUNKS, 1); returns where their new keys lie, see _place."""
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
        # As torch's kernels round: lerp_ and addcmul_ with a fused multiply-add, addcdiv_ without.
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
        root = tl.sqrt_rn(v)
        if weight is not None:
            moved = m * w
            root = root * tl.abs(w)
        values += tl.div_rn(moved * minus_step_size, root * correction + eps)
        codes, scale = _encode(m, inside, word >> 16, BIASES[0], CODES[0])
        tl.store(exp_avg + offsets, codes, mask=inside)
        tl.store(scales + block, scale, mask=exists)
        codes, scale = _encode(v, inside, word >> 24, BIASES[1], CODES[1])
        tl.store(exp_avg_sq + offsets, codes, mask=inside)
        tl.store(scales + blocks + block, scale, mask=exists)
    new = _narrow(values, old, word, FORMAT)
    tl.store(scores + offsets, new, mask=inside)
    return _place(new, inside, start, MODE, INFINITY, WINDOW) if FORMAT != "fp32" else offsets


@triton.jit
def _step_chunks(
    scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, bins, above, bad, numel, chunk,
    step, seed_low, seed_high, decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
    FORMAT: tl.constexpr, FROM_END: tl.constexpr, MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
    COUNTED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BIASES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Step CHUNKS chunks from number ``chunk`` on; returns the counts with theirs added, if COUNTED."""
    chunks = chunk + tl.arange(0, CHUNKS).to(tl.int64)[:, None]
    counter = chunks * BLOCK + tl.arange(0, BLOCK)[None, :]
    low = counter.to(tl.uint32)
    zero = tl.zeros_like(low)
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    if scales is None and FORMAT == "fp32":  # nothing is rounded
        w0, w1, w2, w3 = zero, zero, zero, zero
    else:
        w0, w1, w2, w3 = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero)
    # A loop that stays one: unrolled, it loads four blocks ahead, and spills.
    for i in tl.range(0, 4, loop_unroll_factor=1):
        word = tl.where(i < 2, tl.where(i == 0, w0, w1), tl.where(i == 2, w2, w3))
        place = _step_block(
            scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, numel, chunks * 4 + i, word,
            decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
            FORMAT, FROM_END, MODE, INFINITY, WINDOW, WHOLE, BLOCK, BIASES, CODES,
        )  # fmt: skip
        if COUNTED:
            above += tl.sum((place == WINDOW).to(tl.int32))
            bad += tl.sum((place > WINDOW).to(tl.int32))
            flat = place.reshape(CHUNKS * BLOCK)
            bins += tl.histogram(flat, WINDOW, mask=(flat >= 0) & (flat < WINDOW))
    return bins, above, bad


# Counts of one program are int32: it would take 2^31 scores a program to overrun them.
@triton.jit(do_not_specialize=["numel", "step", "seed_low", "seed_high"])
def _score_step_kernel(
    scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, hint, counts, clock, numel,
    step, seed_low, seed_high, decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
    FORMAT: tl.constexpr, FROM_END: tl.constexpr, MODE: tl.constexpr, INFINITY: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, BIASES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th group of CHUNKS chunks; whole groups without a mask, as select.py does."""
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
            FORMAT, FROM_END, MODE, INFINITY, WINDOW, COUNTED, True, BLOCK, CHUNKS, BIASES, CODES,
        )  # fmt: skip
    if tl.program_id(0) == groups % tl.num_programs(0):
        bins, above, bad = _step_chunks(
            scores, grad, weight, exp_avg, exp_avg_sq, scales, grad_scale, start, bins, above, bad, numel,
            groups.to(tl.int64) * CHUNKS, step, seed_low, seed_high,
            decay, beta1, minus_beta1, beta2, minus_beta2, minus_step_size, correction, eps,
            FORMAT, FROM_END, MODE, INFINITY, WINDOW, COUNTED, False, BLOCK, CHUNKS, BIASES, CODES,
        )  # fmt: skip
    if COUNTED:
        tl.atomic_add(counts + tl.arange(0, WINDOW), bins.to(tl.int64), mask=bins > 0, sem="relaxed")
        tl.atomic_add(counts + WINDOW, above.to(tl.int64), mask=above > 0, sem="relaxed")
        tl.atomic_add(counts + WINDOW + 1, bad.to(tl.int64), mask=bad > 0, sem="relaxed")
