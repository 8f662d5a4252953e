"""One threshold for several score matrices, or one each for matrices that are spread over processes; exact.

A radix select without a copy: a histogram of the highest bits, added up over all matrices, says in which bin the
threshold lies, and one of the next bits within that bin says it more exactly. Histograms of a matrix's parts add up to
the matrix's, so its threshold comes from parts, bit for bit. With 16 bits a pass, scores of 4 bytes are read twice, and
those of 2 bytes once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.checks import NonFiniteScores, check_mode, check_whole
from ..reference.fixed_point import float_from_fixed, selectable

_DIGIT = 16  # bits
# Of several thresholds, whose histograms are sent between processes: 32 KB a matrix and pass, not 512 KB. Not below 12:
# the first digit of an fp64 has its sign and exponent, and so tells what is not finite.
_SMALL_DIGIT = 12
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Scores at once on a CPU: keys and digits then stay in a core's cache. With one thread of a Zen 4 the threshold of
# 106 M fp32 scores took 0.53 s by 2^18, 0.93 by 2^15 and 1.5 by 2^20 (2026-11-30).
_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22  # elsewhere: 80 MB of keys and digits, and few launches; not measured

AddUp = Callable[[Tensor], None]  # int64 counts become, in place, the sums of all processes'


def one_process(counts: Tensor) -> None:
    """The sums of one process."""


def shared_threshold(
    read: Callable[[], Iterable[Tensor]], dropped: int, *, mode: str = "magnitude", add_up: AddUp = one_process
) -> float:
    """The (dropped + 1)-th smallest |score| (score in mode "value") of all matrices together.

    Scores of at least the threshold are kept, so ``dropped`` weights are dropped, or fewer if scores tie.

    Args:
        read: gives the matrices, floating or int16 (see fixed_point.py), all of one dtype; it is called once a pass.
        dropped: at least 0, and below the number of all scores.
        add_up: where processes hold parts of the matrices; dropped is then of all parts together.
    Returns: a number that scores of this dtype hold exactly; of int16 codes the score. NaN if another process has
        scores that are not finite.
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
    """shared_threshold of each matrix by itself, of which this process holds a part; the same list on all of them.

    With dropped = int((1 - keep_ratio) * numel) it is kept_threshold's of the whole matrix, bit for bit. All matrices
    share a pass and its call of add_up: three passes for scores of 4 bytes, two for those of 2.

    Args:
        parts: one of each matrix, of any shape, all of one dtype; other processes hold the others, in this order.
        dropped: of each whole matrix. All of a matrix gives the threshold inf.
    Returns: as shared_threshold; NaN for a matrix with a score that is not finite, on whichever process.
    """
    check_mode(mode)
    return _select(lambda: enumerate(parts), dropped, mode, add_up, _SMALL_DIGIT)[1]


# ---------------------------------------------------------------------------------------------- private


def _select(
    read: Callable[[], Iterable[tuple[int, Tensor]]], dropped: Sequence[int], mode: str, add_up: AddUp, digit: int
) -> tuple[list[int], list[float]]:
    """(the number of scores, the threshold) of each group. read: gives (group, scores), once a pass."""
    dtype = next(iter(read()))[1].dtype
    top = place = 8 * dtype.itemsize
    # Of each group: the threshold's key from ``place`` up, and how many that share it are smaller.
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
            sizes, bad = reached[:, -1].tolist(), _not_finite(counts, dtype).tolist()
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
    """How many keys have each value of the ``width`` bits below bit ``place``, int64 on the CPU.

    found: what the bits from there up have to be; None for the first digit, whose middle value is that of +0.
    """
    if found is None:
        digits = (keys >> place - width).int() + (1 << width - 1)
    else:
        digits = keys[keys >> place == found] >> place - width & (1 << width) - 1
    return torch.bincount(digits, minlength=1 << width).cpu()


def _keys(matrices: Iterable[tuple[int, Tensor]], mode: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(group, signed integers in the order of the scores, or of their magnitudes); a chunk at a time."""
    for group, scores in matrices:
        check_whole("scores", scores)
        if scores.dtype != dtype:
            raise ValueError(f"scores must be of one dtype to share a threshold, got {dtype} and {scores.dtype}")
        for some in selectable(scores.detach()).flatten().split(_CHUNK if scores.is_cpu else _DEVICE_CHUNK):
            values = some if mode == "value" else some.abs()
            yield group, _keys_of_bits(values.view(_INTEGERS[dtype.itemsize]))


def _keys_of_bits(bits: Tensor) -> Tensor:
    """Flip all bits of negative floats but the sign, so that integers have the order of the floats. Its own inverse."""
    return bits ^ (bits >> 8 * bits.itemsize - 1 & torch.iinfo(bits.dtype).max)


def _not_finite(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether each group has NaN or Inf. counts (G, bins): of the first digit, which tells."""
    floating = torch.float16 if dtype == torch.int16 else dtype
    infinity = torch.tensor(torch.inf, dtype=floating).view(_INTEGERS[dtype.itemsize])
    middle = counts.shape[1] // 2
    last = int(infinity >> 8 * dtype.itemsize - middle.bit_length())
    return counts[:, : middle - last].sum(1) + counts[:, middle + last :].sum(1) > 0
