"""One threshold for several score matrices, compared with a sort of all scores; thresholds from parts of matrices."""

import threading

import pytest
import torch

from mft_kernels import kept_threshold
from mft_kernels.mask import shared_threshold as module
from mft_kernels.mask.shared_threshold import part_thresholds, shared_threshold
from mft_kernels.ops.checks import NonFiniteScores
from mft_kernels.reference.fixed_point import fixed_from_float, float_from_fixed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int16]


def matrices(dtype):
    """Return matrices of different scales, one of experts among them, with ties and zeros."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(37, 11, generator=generator) * scale for scale in (0.02, 0.03, 0.001)]
    drawn.append(torch.randint(-3, 4, (2, 9, 5), generator=generator) * 0.005)
    return [fixed_from_float(scores) if dtype == torch.int16 else scores.to(dtype) for scores in drawn]


def in_order(scores, mode):
    values = torch.cat([(float_from_fixed(s) if s.dtype == torch.int16 else s).double().flatten() for s in scores])
    return (values.abs() if mode == "magnitude" else values).sort().values


@pytest.mark.parametrize("chunk", [50, 1 << 18])
@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_next_larger_score_after_those_that_are_dropped(dtype, mode, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    scores = matrices(dtype)
    ordered = in_order(scores, mode)
    for dropped in (0, 1, 5, 400, len(ordered) - 1):
        assert shared_threshold(lambda: iter(scores), dropped, mode=mode) == ordered[dropped]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_are_not_finite_are_refused(dtype, bad):
    scores = matrices(dtype)
    scores[1][3, 4] = fixed_from_float(torch.tensor(bad)) if dtype == torch.int16 else bad
    for mode in ("magnitude", "value"):
        with pytest.raises(NonFiniteScores, match=r"got 1 NaN or Inf among \(37, 11\)"):
            shared_threshold(lambda: iter(scores), 5, mode=mode)


def test_what_cannot_be_dropped_is_refused():
    scores = [torch.ones(2, 3), torch.ones(4)]
    for dropped in (-1, 10):
        with pytest.raises(ValueError, match=rf"dropped must be at least 0 and below the 10 scores, got {dropped}"):
            shared_threshold(lambda: iter(scores), dropped)
    with pytest.raises(ValueError, match=r"scores must be of one dtype .* got torch\.float32 and torch\.float64"):
        shared_threshold(lambda: iter([*scores, torch.ones(2, dtype=torch.float64)]), 1)


class Meeting:
    """Add up the counts of one thread per part, as an all-reduce adds up those of processes."""

    def __init__(self, count):
        self.barrier, self.lock, self.total = threading.Barrier(count), threading.Lock(), None

    def add_up(self, counts):
        with self.lock:
            self.total = counts.clone() if self.total is None else self.total + counts
        self.barrier.wait()
        counts.copy_(self.total)
        if self.barrier.wait() == 0:
            self.total = None
        self.barrier.wait()


def by_parts(scores, keep_ratio, mode, count=3):
    """Return what each of ``count`` threads finds for the matrices; each thread holds some of their rows."""
    meeting, found = Meeting(count), [None] * count
    dropped = [int((1 - keep_ratio) * matrix.numel()) for matrix in scores]

    def work(place):
        parts = [matrix.tensor_split(count)[place] for matrix in scores]
        found[place] = part_thresholds(parts, dropped, mode=mode, add_up=meeting.add_up)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("keep_ratio", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_of_parts_is_the_matrix_s_bit_for_bit(dtype, mode, keep_ratio):
    scores = matrices(dtype)
    expected = [kept_threshold(matrix, keep_ratio, mode=mode) for matrix in scores]
    expected = [(float_from_fixed(t) if dtype == torch.int16 and keep_ratio else t).item() for t in expected]
    if dtype == torch.int16 and not keep_ratio:
        expected = [torch.inf] * len(scores)  # a special code represents infinity
    for found in by_parts(scores, keep_ratio, mode):
        assert found == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_with_a_score_that_is_not_finite_has_the_threshold_nan_on_all(dtype):
    scores = matrices(dtype)
    scores[1][3, 4] = fixed_from_float(torch.tensor(torch.nan)) if dtype == torch.int16 else torch.nan
    for found in by_parts(scores, 0.9, "magnitude"):
        assert [number == number for number in found] == [True, False, True, True]
