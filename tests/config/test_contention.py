"""The share of a core that each thread gets is measured, not guessed from a load average."""

import os

import pytest

from mft.contention import Contention, core_share


def test_more_threads_than_cores_share_them():
    cores = os.cpu_count() or 1
    measured = core_share(2 * cores + 2)
    assert measured.threads == 2 * cores + 2
    assert measured.cores < cores + 0.5
    assert measured.is_busy
    assert 1 <= measured.free_threads <= cores


@pytest.mark.parametrize(
    ("shares", "is_busy", "free_threads", "said"),
    [
        ((1.0,), False, 1, "1 thread gets 1.0 cores"),
        ((0.4,), True, 1, "1 thread gets 0.4 cores"),
        ((0.99, 0.98), False, 2, "2 threads get 2.0 cores"),
        ((0.8, 0.5), True, 1, "2 threads get 1.3 cores"),
        ((1.0,) * 15 + (0.5,), True, 15, "16 threads get 15.5 cores"),
    ],
    ids=["idle", "one waits", "two idle", "two wait", "the slowest counts"],
)
def test_a_thread_that_waits_makes_the_machine_busy(shares, is_busy, free_threads, said):
    contention = Contention(shares)
    assert (contention.is_busy, contention.free_threads, str(contention)) == (is_busy, free_threads, said)


def test_a_time_that_is_not_positive_and_no_threads_are_refused():
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="seconds must be positive, got"):
            core_share(1, seconds=seconds)
    with pytest.raises(ValueError, match=r"threads must be at least 1, got 0; pass torch.get_num_threads\(\)"):
        core_share(0)
