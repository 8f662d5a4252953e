"""The reference of score_step: one optimiser step on a matrix of scores, in plain PyTorch, on any device.

It defines what other implementations must match bit for bit: random words, minifloat codes, stochastic rounding and
fixed-point scores. Only triton's 8-bit scheme on NVIDIA GPUs may differ, by rare roundings (triton/score_step.py).
Arguments are trusted; the public function in ``ops`` checks them.
"""

import torch
from torch import Tensor

from ..operands import Update
from .fixed_point import LARGEST_CODE as LARGEST_SCORE
from .fixed_point import float_from_fixed
from .linear import kept_threshold, pack_mask, signs_of

BLOCK = 256  # consecutive elements of the flattened matrix that share one scale
CHUNK = 1024  # consecutive elements that take the words of 256 counters
LARGEST_VALUE = 1.875  # value of the largest code of either minifloat
MEAN_BIAS, MEAN_CODES = 15, 128  # exp_avg: sign, 4 exponent bits, 3 mantissa bits
SQUARE_BIAS, SQUARE_CODES = 31, 256  # exp_avg_sq: 5 exponent bits, 3 mantissa bits

_LOW32 = 0xFFFFFFFF


def score_step(update: Update) -> tuple[Tensor, Tensor]:
    """Run one AdamW step on scores and moments in place, and return the threshold and packed mask of the new scores.

    If weight is given, grad is grad_output.T @ x, and sign(scores) is a factor in mode "magnitude". If weight is None,
    grad is d_scores, and both factors, weight and sign, are 1 in the formulas.

    Exact scheme (scales None), with the operations of torch.optim.AdamW(foreach=False, fused=False) in their order:
        g = grad * weight * sign(scores) * grad_scale;  m.lerp_(g, 1 - beta1);  v = v * beta2 + (1 - beta2) * g * g
        scores = scores * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
    8-bit scheme, in which moments do not include the weight w; each product and sum is rounded to fp32 by itself:
        h = grad * sign(scores) * grad_scale;  m = m * beta1 + h * (1 - beta1);  v = v * beta2 + h * h * (1 - beta2)
        scores = scores * (1 - lr * weight_decay) + (m * w * (-lr / (1 - beta1^step)))
                 / (sqrt(v) * |w| * (1 - beta2^step)^-0.5 + eps)
    The update uses m and v before they are encoded. Factors made from scalars are computed in double and rounded to
    fp32 once. ``threshold``, that of the scores before the step, is a hint to kernels and is not read here.

    Returns: (() in the scores' dtype, int32 (N, ceil(K / 32))), or two empty tensors without a keep_ratio.
    """
    update = update.on_host()
    scores, weight, scales = update.scores, update.weight, update.scales
    exp_avg, exp_avg_sq, beta1, beta2 = update.exp_avg, update.exp_avg_sq, update.beta1, update.beta2
    decay, step_size, correction = update.rates
    words = None
    if scales is not None or scores.dtype != torch.float32:
        words = random_words(scores.numel(), update.seed, update.step, scores.device)
    factor = _sign(scores) if weight is not None and update.magnitude else None
    wide = widen_scores(scores)
    if update.weight_decay != 0:
        wide.mul_(decay)
    if scales is None:
        g = _gradient(update.grad, weight, factor, update.grad_scale)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / correction).add_(update.eps)
        wide.addcdiv_(exp_avg, denominator, value=-step_size)
    else:
        assert words is not None, "the 8-bit scheme rounds stochastically"
        h = _gradient(update.grad, None, factor, update.grad_scale)
        m = decode(exp_avg, scales[0], MEAN_BIAS, MEAN_CODES) * beta1 + h * (1 - beta1)
        v = decode(exp_avg_sq, scales[1], SQUARE_BIAS, SQUARE_CODES) * beta2 + (h * h) * (1 - beta2)
        root, moved = v.double().sqrt().float(), m  # rounded correctly; torch's sqrt in fp32 (MKL) is not
        if weight is not None:
            w = weight.float()
            root, moved = root * w.abs(), m * w
        denominator = root * correction + update.eps
        wide += (moved * -step_size) / denominator
        exp_avg.copy_(encode(m, scales[0], (words >> 16) & 0xFF, MEAN_BIAS, MEAN_CODES))
        exp_avg_sq.copy_(encode(v, scales[1], words >> 24, SQUARE_BIAS, SQUARE_CODES))
    if wide is not scores:
        assert words is not None, "16-bit scores are rounded stochastically"
        scores.copy_(narrow_scores(wide, scores, words & 0xFFFF))
    return next_mask(scores, update.mode, update.keep_ratio)


def next_mask(scores: Tensor, mode: str, keep_ratio: float | None) -> tuple[Tensor, Tensor]:
    """Return kept_threshold and pack_mask of the scores, or two empty tensors without a ratio.

    Fixed-point scores are read as fp16.
    """
    if keep_ratio is None:
        return scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)
    floats = scores.view(torch.float16) if scores.dtype == torch.int16 else scores
    threshold = kept_threshold(floats, keep_ratio, mode)
    return threshold.view(scores.dtype), pack_mask(floats, threshold, mode)


# ---------------------------------------------------------------------------------------------- random words


def random_words(numel: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Return one 32-bit word per element, int64 (numel,), from Philox 4x32-10 with the key seed.

    With r = i % 1024 and c = i // 1024 * 256 + r % 256, element i takes word r // 256 of the counter
    (c mod 2^32, c >> 32, step, 0).
    """
    chunks = -(-numel // CHUNK)
    counter = torch.arange(chunks * (CHUNK // 4), device=device)
    zero = torch.zeros_like(counter)
    words = philox(counter & _LOW32, counter >> 32, zero + (step & _LOW32), zero, seed)
    return torch.stack(words).view(4, chunks, CHUNK // 4).transpose(0, 1).reshape(-1)[:numel]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the words of Philox 4x32-10 (Salmon et al., SC 2011) for these counters, all as int64 in [0, 2^32).

    The key is (low, high) of seed.
    """
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        # A product wraps modulo 2^64, so its halves are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _LOW32 ^ c1 ^ k0, p1 & _LOW32, (p0 >> 32) & _LOW32 ^ c3 ^ k1, p0 & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


# ---------------------------------------------------------------------------------------------- scores


def widen_scores(scores: Tensor) -> Tensor:
    """Return scores as fp32; fp32 scores themselves, not a copy. A fixed-point 0 becomes 0 with its sign."""
    return float_from_fixed(scores) if scores.dtype == torch.int16 else scores.float()


def narrow_scores(wide: Tensor, old: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 scores stochastically to old's dtype, by 16 random bits per element.

    bf16: the bits are added to the fp32 pattern, which is cut to its upper half. int16: with q = min(|s| * 2^18, 31743)
    the magnitude is floor(q) + ((q - floor(q)) * 65536 > bits), and an exact 0 keeps the sign of old.
    In bf16 infinities stay, and NaN becomes 0x7fc0. In int16 both become 0x7c00, with the sign of the infinity.
    """
    bits = bits.view_as(wide)
    if old.dtype == torch.bfloat16:
        pattern = (wide.view(torch.int32).long() + bits) >> 16  # an infinity's lower half is 0: nothing is carried
        return torch.where(wide.isnan(), 0x7FC0, pattern).to(torch.int16).view(torch.bfloat16)
    q = (wide.abs() * 2.0**18).clamp(max=float(LARGEST_SCORE))
    whole = q.floor()
    magnitude = whole + ((q - whole) * 65536 > bits)
    magnitude = torch.where(wide.isfinite(), magnitude, LARGEST_SCORE + 1).to(torch.int16)
    negative = torch.where(wide == 0, old < 0, wide.signbit() & ~wide.isnan())
    return torch.where(negative, magnitude | -0x8000, magnitude)


def _sign(scores: Tensor) -> Tensor:
    if scores.dtype != torch.int16:
        return signs_of(scores).float()
    return torch.where(scores < 0, -1.0, 1.0)  # a 0 counts with its sign bit


def _gradient(grad: Tensor, weight: Tensor | None, factor: Tensor | None, grad_scale: Tensor | None) -> Tensor:
    g = grad.float()
    if weight is not None:
        g = g * weight
    if factor is not None:
        g = g * factor
    return g if grad_scale is None else g * grad_scale


# ---------------------------------------------------------------------------------------------- 8-bit moments


def decode(codes: Tensor, scale: Tensor, bias: int, count: int) -> Tensor:
    """Return the fp32 values of minifloat codes, in the codes' shape: value(code) * scale of its block, rounded once.

    Code e * 8 + f stands for f / 8 * 2^(1 - bias) if e is 0, else (1 + f / 8) * 2^(e - bias). With 128 codes, bit 7
    is the sign.
    """
    code = codes.int() & (count - 1)
    normal = (code + ((127 - bias) << 3) << 20).view(torch.float32)
    value = torch.where(code < 8, code.float() * 2.0 ** (-2 - bias), normal)
    if count == MEAN_CODES:
        value = torch.where(codes >= MEAN_CODES, -value, value)
    return value * scale.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)


def encode(x: Tensor, scale: Tensor, bits: Tensor, bias: int, count: int) -> Tensor:
    """Return minifloat codes of x, uint8, and write each block's scale.

    Codes are rounded stochastically by 8 random bits per element. For each block, largest = min(max |x|, 2^126),
    scale = largest / 1.875 and y = |x| * (1.875 / largest).
    y becomes a fixed-point number with the code above bit 20: y's pattern - ((127 - bias) << 23), or
    trunc(y * 2^(22 + bias)) if y < 2^(1 - bias). Adding (bits << 12) + 2048 and cutting at bit 20 rounds up with the
    probability of the dropped fraction, rounded to a 256th. No code exceeds the largest code.
    The code of a positive square is at least 1. With a code of 0 the mean would be divided by eps alone (updates of a
    thousand lr, where gradients were about 1).
    A block whose largest is below 2^-125 gets scale 0 and codes 0. A block that holds a NaN gets scale NaN and codes 0.
    (Within these bounds scale and its inverse are normal numbers, which every device treats alike.)
    """
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = padded.amax(1).clamp(max=2.0**126)
    coded = largest >= 2.0**-125  # false for NaN
    scale.copy_(torch.where(coded | largest.isnan(), largest / LARGEST_VALUE, 0))
    inverse = torch.full_like(largest, LARGEST_VALUE) / largest  # number / tensor would be rounded twice
    y = torch.where(coded.unsqueeze(1), padded * inverse.unsqueeze(1), 0)
    y = y.reshape(-1)[: flat.numel()]
    small = (y.clamp(max=1) * 2.0 ** (22 + bias)).clamp(max=2.0**24).int()
    fixed = torch.where(y < 2.0 ** (1 - bias), small, y.view(torch.int32) - ((127 - bias) << 23))
    code = ((fixed.long() + (bits << 12) + 2048) >> 20).clamp(max=count - 1)
    if count == SQUARE_CODES:
        code = torch.where((flat > 0) & coded.repeat_interleave(BLOCK)[: flat.numel()], code.clamp(min=1), code)
    else:
        negative = flat.signbit() & coded.repeat_interleave(BLOCK)[: flat.numel()]
        code = torch.where(negative, code | MEAN_CODES, code)
    return code.view(x.shape).to(torch.uint8)
