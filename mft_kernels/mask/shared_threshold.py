"""Find one exact threshold for several score matrices, or one each for matrices that are spread over processes.

This is a radix select without a copy. A histogram of the highest bits, summed over all matrices, tells in which bin the
threshold lies. A histogram of the next bits within that bin narrows it down. The histograms of a matrix's parts add up
to that of the matrix, so parts give its threshold bit for bit. With 16 bits per pass, scores of 4 bytes are read twice,
and those of 2 bytes once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.checks import NonFiniteScores, check_mode, check_whole
from ..reference.fixed_point import float_from_fixed, selectable

_DIGIT = 16  # bits
# For several thresholds, whose histograms are sent between processes: 32 KB per matrix and pass, not 512 KB. At least
# 12: the first digit of an fp64 must hold its sign and exponent, to tell what is not finite.
_SMALL_DIGIT = 12
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Scores per chunk on a CPU: keys and digits then stay in a core's cache. With one thread of a Zen 4, the threshold of
# 106 M fp32 scores took 0.53 s with chunks of 2^18, 0.93 s with 2^15 and 1.5 s with 2^20 (2026-11-30).
_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22  # on other devices: 80 MB of keys and digits, and few launches; not measured

AddUp = Callable[[Tensor], None]  # replaces int64 counts, in place, by their sums over all processes


def one_process(counts: Tensor) -> None:
    """Leave counts as they are: the sums over one process."""


def shared_threshold(
    read: Callable[[], Iterable[Tensor]], dropped: int, *, mode: str = "magnitude", add_up: AddUp = one_process
) -> float:
    """Return the (dropped + 1)-th smallest |score| (score in mode "value") of all matrices together.

    Scores at or above the threshold are kept, so ``dropped`` weights are dropped, or fewer if scores tie.

    Args:
        read: returns the matrices, floating or int16 (see fixed_point.py), all of one dtype; it is called once per
            pass.
        dropped: at least 0, and below the number of all scores.
        add_up: needed if processes hold parts of the matrices. dropped then counts all parts together.
    Returns: a number that scores of this dtype represent exactly; for int16 codes, the score. NaN if another process
        has scores that are not finite.
    Raises: NonFiniteScores; ValueError if dropped is out of range, or if dtypes differ.
    """
    check_mode(mode)
    (count,), (found,) = _select(lambda: ((0, scores) for scores in read()), [dropped], mode, add_up, _DIGIT)
    if math.isnan(found):
        for scores in read():
            if not (keys := selectable(scores.detach())).isfinite().all():
                raise NonFiniteScores(keys)
    if not 0 <= dropped < count:
        raise ValueError(f"dropped must be at least 0 and below the {count} scores, got {dropped}")
    return found


def part_thresholds(
    parts: Sequence[Tensor], dropped: Sequence[int], *, mode: str = "magnitude", add_up: AddUp = one_process
) -> list[float]:
    """Return the threshold of each matrix by itself, of which this process holds a part.

    All processes get the same list. With dropped = int((1 - keep_ratio) * numel), a threshold equals kept_threshold of
    the whole matrix, bit for bit. All matrices share each pass and its call of add_up. There are three passes for
    scores of 4 bytes, and two for scores of 2 bytes.

    Args:
        parts: one part of each matrix, of any shape, all of one dtype. Other processes hold the other parts, in the
            same order.
        dropped: one number for each whole matrix. If it is all of a matrix, the threshold is inf.
    Returns: numbers as in shared_threshold; NaN for a matrix with a score that is not finite, on any process.
    """
    check_mode(mode)
    return _select(lambda: enumerate(parts), dropped, mode, add_up, _SMALL_DIGIT)[1]


# ---------------------------------------------------------------------------------------------- private


def _select(
    read: Callable[[], Iterable[tuple[int, Tensor]]], dropped: Sequence[int], mode: str, add_up: AddUp, digit: int
) -> tuple[list[int], list[float]]:
    """Return the number of scores and the threshold of each group. ``read`` returns (group, scores), once per pass."""
    dtype = next(iter(read()))[1].dtype
    top = place = 8 * dtype.itemsize
    # For each group: the bits of the threshold's key from ``place`` up, and its rank among the keys with these bits.
    found, before = [0] * len(dropped), list(dropped)
    sizes: list[int] = []
    bad: list[bool] = []
    while place:
        width = min(digit, place)
        counts = torch.zeros(len(dropped), 1 << width, dtype=torch.int64)
        for group, keys in _keys(read(), mode, dtype):
            counts[group] += _histogram(keys, place, width, found[group] if place < top else None)
        add_up(counts)
        reached = counts.cumsum(1)
        if place == top:
            sizes, bad = reached[:, -1].tolist(), _has_nonfinite(counts, dtype).tolist()
        digits = (reached <= torch.tensor(before)[:, None]).sum(1).clamp(max=(1 << width) - 1)
        for group, (value, row) in enumerate(zip(digits.tolist(), reached)):
            before[group] -= int(row[value - 1]) if value else 0
            found[group] = found[group] << width | value if place < top else value - (1 << width - 1)  # signed
        place -= width
    bits = _keys_of_bits(torch.tensor(found, dtype=_INTEGERS[dtype.itemsize]))  # its own inverse
    values = (float_from_fixed(bits) if dtype == torch.int16 else bits.view(dtype)).tolist()
    ends = [math.nan if no else math.inf if few >= n else v for no, few, n, v in zip(bad, dropped, sizes, values)]
    return sizes, ends


def _histogram(keys: Tensor, place: int, width: int, found: int | None) -> Tensor:
    """Count the keys with each value of the ``width`` bits below bit ``place``; int64 on the CPU.

    found: only keys with these bits from ``place`` up count. None for the first digit, where +0 has the middle value.
    """
    if found is None:
        digits = (keys >> place - width).int() + (1 << width - 1)
    else:
        digits = keys[keys >> place == found] >> place - width & (1 << width) - 1
    return torch.bincount(digits, minlength=1 << width).cpu()


def _keys(matrices: Iterable[tuple[int, Tensor]], mode: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (group, signed integers in the order of the scores, or of their magnitudes), one chunk at a time."""
    for group, scores in matrices:
        check_whole("scores", scores)
        if scores.dtype != dtype:
            raise ValueError(f"scores must be of one dtype to share a threshold, got {dtype} and {scores.dtype}")
        for some in selectable(scores.detach()).flatten().split(_CHUNK if scores.is_cpu else _DEVICE_CHUNK):
            values = some if mode == "value" else some.abs()
            yield group, _keys_of_bits(values.view(_INTEGERS[dtype.itemsize]))


def _keys_of_bits(bits: Tensor) -> Tensor:
    """Flip all bits of negative floats except the sign: the integers get the order of the floats. Its own inverse."""
    return bits ^ (bits >> 8 * bits.itemsize - 1 & torch.iinfo(bits.dtype).max)


def _has_nonfinite(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return whether each group has NaN or Inf, from the counts (G, bins) of the first digit."""
    floating = torch.float16 if dtype == torch.int16 else dtype
    infinity = torch.tensor(torch.inf, dtype=floating).view(_INTEGERS[dtype.itemsize])
    middle = counts.shape[1] // 2
    last = int(infinity >> 8 * dtype.itemsize - middle.bit_length())
    return counts[:, : middle - last].sum(1) + counts[:, middle + last :].sum(1) > 0
