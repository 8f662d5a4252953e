"""Interleaved timing: what is called when and how often, and how the times are combined; no time is asserted."""

import time

from mft_kernels.timing import SAMPLE_MS, median_ratio, time_within


def test_what_is_fast_is_called_often_in_a_row_and_what_is_slow_once():
    calls = []
    competitors = {"slow": lambda: calls.append("slow") or time.sleep(2e-3 * SAMPLE_MS), "fast": lambda: None}
    samples = time_within(competitors, 0.0, least=2)
    assert [len(values) for values in samples.values()] == [2, 2]  # the least number, although no round fits
    assert len(calls) == 1 + 1 + 2  # to warm up, to see how slow it is, and once per round


def test_a_ratio_is_taken_within_a_round():
    assert median_ratio({"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 2.0]}, "a", "b") == 2.0
