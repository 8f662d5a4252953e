"""One threshold for several score matrices that drops a given number of all their weights; exact, without a copy.

A radix select: a histogram of the highest 16 bits, added up over all matrices, says in which bin the threshold lies,
and one of the next 16 bits within that bin says it exactly. Scores of 4 bytes are so read twice, of 2 bytes once.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..ops.checks import NonFiniteScores, check_mode, check_whole
from ..reference.fixed_point import float_from_fixed, selectable

_DIGIT = 16  # bits
_BINS, _MIDDLE = 1 << _DIGIT, 1 << _DIGIT - 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Scores at once on a CPU: keys and digits then stay in a core's cache. With one thread of a Zen 4 the threshold of
# 106 M fp32 scores took 0.53 s by 2^18, 0.93 by 2^15 and 1.5 by 2^20 (2026-11-30).
_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22  # elsewhere: 80 MB of keys and digits, and few launches; not measured


def shared_threshold(read: Callable[[], Iterable[Tensor]], dropped: int, *, mode: str = "magnitude") -> float:
    """The (dropped + 1)-th smallest |score| (score in mode "value") of all matrices together.

    Scores of at least the threshold are kept, so ``dropped`` weights are dropped, or fewer if scores tie.

    Args:
        read: gives the matrices, floating or int16 (see fixed_point.py), all of one dtype; it is called once a pass.
        dropped: at least 0, and below the number of all scores.
    Returns: a number that scores of this dtype hold exactly; of int16 codes the score.
    Raises: NonFiniteScores; ValueError if dropped is out of range, or if dtypes differ.
    """
    check_mode(mode)
    dtype = next(iter(read())).dtype
    top = place = 8 * dtype.itemsize
    found, before = 0, dropped  # the threshold's key from ``place`` up, and how many that share it are smaller
    while place:
        counts = _histogram(_keys(read(), mode, dtype), place, found if place < top else None)
        if place == top:
            _check(counts, read, dropped, dtype)
        reached = counts.cumsum(0)
        digit = int((reached <= before).sum())
        before -= int(reached[digit - 1]) if digit else 0
        found = found << _DIGIT | digit if place < top else digit - _MIDDLE  # keys are signed
        place -= _DIGIT
    bits = _keys_of_bits(torch.tensor(found, dtype=_INTEGERS[dtype.itemsize]))  # its own inverse
    return float(float_from_fixed(bits) if dtype == torch.int16 else bits.view(dtype))


def _histogram(keys: Iterable[Tensor], place: int, found: int | None) -> Tensor:
    """How many keys have each value of the 16 bits below bit ``place``, int64 on the CPU.

    found: what the bits from there up have to be; None for the first digit, whose middle value is that of +0.
    """
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for some in keys:
        if found is None:
            digits = (some >> place - _DIGIT).int() + _MIDDLE
        else:
            digits = some[some >> place == found] >> place - _DIGIT & _BINS - 1
        counts += torch.bincount(digits, minlength=_BINS).cpu()
    return counts


def _keys(matrices: Iterable[Tensor], mode: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Signed integers in the order of the scores, or of their magnitudes; a chunk at a time."""
    for scores in matrices:
        check_whole("scores", scores)
        if scores.dtype != dtype:
            raise ValueError(f"scores must be of one dtype to share a threshold, got {dtype} and {scores.dtype}")
        for some in selectable(scores.detach()).flatten().split(_CHUNK if scores.is_cpu else _DEVICE_CHUNK):
            values = some if mode == "value" else some.abs()
            yield _keys_of_bits(values.view(_INTEGERS[dtype.itemsize]))


def _keys_of_bits(bits: Tensor) -> Tensor:
    """Flip all bits of negative floats but the sign, so that integers have the order of the floats. Its own inverse."""
    return bits ^ (bits >> 8 * bits.itemsize - 1 & torch.iinfo(bits.dtype).max)


def _check(counts: Tensor, read: Callable[[], Iterable[Tensor]], dropped: int, dtype: torch.dtype) -> None:
    """counts: of the first digit, which tells what is not finite."""
    floating = torch.float16 if dtype == torch.int16 else dtype
    infinity = torch.tensor(torch.inf, dtype=floating).view(_INTEGERS[dtype.itemsize])
    last = int(infinity >> 8 * dtype.itemsize - _DIGIT)
    if int(counts[: _MIDDLE - last].sum() + counts[_MIDDLE + last :].sum()):
        raise NonFiniteScores(next(keys for s in read() if not (keys := selectable(s.detach())).isfinite().all()))
    count = int(counts.sum())
    if not 0 <= dropped < count:
        raise ValueError(f"dropped must be at least 0 and below the {count} scores, got {dropped}")
