"""The choice among the ways to train: the fastest that fits, why others do not, and the nearest setting that fits."""

from dataclasses import replace

import pytest
from known_shapes import LOCAL, SEVEN, SEVENTY

from mft.config import WAYS
from mft.memory.estimate import estimate
from mft.memory.fit import choose, gigabytes
from mft.memory.workload import Workload


def test_auto_takes_the_fastest_that_fits():
    workload = Workload(layers=LOCAL)
    ways = [choose(SEVEN, workload, gb * 1e9).way for gb in (80, 24, 17.2, 16.5, 4, 2)]
    assert ways == ["in_place", "resident", "resident", "layerwise", "layerwise", None]
    assert choose(SEVEN, replace(workload, device="cpu"), 80e9).way == "plain"
    choice = choose(SEVEN, workload, 24e9)
    assert tuple(choice.estimates) == WAYS
    assert "in_place cannot be taken: needs " in choice.reason
    assert "quantized" not in choice.refusals


def test_auto_takes_a_quantised_base_only_if_asked():
    workload = Workload(layers=LOCAL)
    assert choose(SEVEN, workload, 12e9).way == "layerwise"
    assert choose(SEVEN, replace(workload, quantization="nf4"), 12e9).way == "quantized"
    assert choose(SEVEN, replace(workload, quantization="nf4"), 4e9).way == "layerwise"


def test_the_host_has_to_hold_its_part():
    workload = Workload(layers=LOCAL)
    assert choose(SEVEN, workload, 8e9).way == "layerwise"
    refused = choose(SEVEN, workload, 8e9, 24e9)
    assert refused.way is None
    assert refused.refusals["layerwise"] == "needs 25.9 GB of the host's 24.0 GB"
    whole = choose(SEVEN, replace(workload, batches_at_once=128), 8e9, 64e9)
    assert whole.refusals["layerwise"] == "needs 147.8 GB of the host's 64.0 GB"


def test_layerwise_takes_as_many_batches_at_once_as_the_host_holds():
    """The paper's step of all layers; boundaries of 128 batches would take 142 GB."""
    workload = Workload(memory="layerwise", scores="int16", moments="8bit")
    sizes = [choose(SEVEN, workload, 24e9, gb * 1e9).chosen for gb in (256, 128, 64, 56, 48)]
    assert [None if chosen is None else chosen.batches_at_once for chosen in sizes] == [None, 64, 8, 2, None]
    choice = choose(SEVEN, workload, 24e9, 64e9)
    found = choice.estimates["layerwise"]
    assert found.host_peak <= 64e9
    assert found.device_peak <= 3e9
    assert found == estimate(SEVEN, choice.chosen)
    assert found.seconds < 1.1 * estimate(SEVEN, workload).seconds
    assert "8 of a step's 128 batches at once: the hidden states of more do not fit" in choice.reason


@pytest.mark.parametrize(
    ("changes", "host", "chosen"),
    [
        ({}, 128, ("float32", "float32")),
        ({}, 88, ("float32", "8bit")),
        ({}, 64, ("int16", "8bit")),
        ({"fixed_threshold": True}, 64, ("bfloat16", "8bit")),
        ({"moments": "float32"}, 128, ("float32", "float32")),
        ({"moments": "float32"}, 100, ("int16", "float32")),
        ({"scores": "bfloat16"}, 64, ("bfloat16", "8bit")),
        ({"scores": "float32", "moments": "float32"}, 64, None),
        ({}, 48, None),
    ],
    ids=str,
)
def test_scores_and_moments_left_open_are_the_widest_that_fit(changes, host, chosen):
    workload = Workload(**{"scores": "auto", "moments": "auto"} | changes)
    choice = choose(SEVEN, workload, 24e9, host * 1e9)
    assert (None if choice.chosen is None else (choice.chosen.scores, choice.chosen.moments)) == chosen
    if (changes, host) == ({}, 64):
        said = "scores in int16 and moments in 8bit: with wider ones layerwise needs 106.1 GB of the host's 64.0 GB"
        assert choice.reason.endswith(said)


def test_plain_takes_narrow_scores_that_autograd_reaches():
    chosen = choose(SEVEN, Workload(memory="plain", scores="auto", moments="auto"), 100e9).chosen
    assert (chosen.scores, chosen.moments) == ("bfloat16", "8bit")


def test_what_is_asked_for_at_once_is_never_changed():
    asked = Workload(scores="int16", moments="8bit", batches_at_once=16)
    refused = choose(SEVEN, asked, 24e9, 64e9)
    assert (refused.way, refused.nearest.batches_at_once) == (None, None)
    assert refused.refusals["resident"].endswith("and batches_at_once=16 asks for layerwise")
    assert choose(SEVEN, asked, 80e9, 72e9).chosen == replace(asked, memory="layerwise")


def test_an_explicit_way_is_refused_if_it_does_not_fit():
    for way in ("in_place", "resident"):
        choice = choose(SEVEN, Workload(layers=LOCAL, memory=way), 16e9)
        assert choice.way is None
        needed = choice.estimates[way].device_peak
        said = f"{way}: needs {gigabytes(needed)} (and 0.6 GB for the context) of 16.0 GB"
        assert choice.reason.startswith(f"nothing fits: {said}, {gigabytes(needed + 0.6e9 - 16e9)} missing, in ")
    assert choice.nearest == Workload(layers=LOCAL, memory="layerwise")
    assert choose(SEVEN, Workload(layers=LOCAL, memory="resident"), 24e9).way == "resident"


def test_smaller_micro_batches_are_the_first_thing_to_change():
    workload = Workload(layers=LOCAL, memory="resident", micro_batch=8, accumulation=16)
    near = choose(SEVEN, workload, 18e9).nearest
    assert near == replace(workload, micro_batch=2, accumulation=64)


@pytest.mark.slow
def test_nothing_at_all_fits():
    choice = choose(SEVENTY, Workload(), 1e9)
    assert (choice.way, choice.nearest) == (None, None)


def test_the_least_that_any_setting_needs_is_told():
    """The place is the device, or the host if some settings would fit the device."""
    few = replace(SEVENTY, layers=2)
    place, needed = choose(few, Workload(), 1e9).least
    assert place == "device"
    assert choose(few, Workload(), needed).nearest is not None
    assert choose(few, Workload(), needed - 1).nearest is None
    place, needed = choose(few, Workload(), 8e9, 4e9).least
    assert place == "host"
    assert choose(few, Workload(), 8e9, needed).nearest is not None
    assert choose(few, Workload(), 8e9, needed - 1).nearest is None


def test_a_quantised_base_of_which_nothing_would_be_quantised_is_refused():
    for way in ("quantized", "layerwise"):
        choice = choose(SEVEN, Workload(memory=way, quantization="nf4"), 80e9)
        assert "nothing would be quantised without quantize_masked" in choice.refusals[way]
        assert choice.nearest.quantize_masked or choice.nearest.quantization is None
    assert (
        choose(SEVEN, Workload(memory="quantized", quantization="nf4", quantize_masked=True), 80e9).way == "quantized"
    )
    assert "layerwise" not in choose(SEVEN, Workload(), 80e9).refusals


def test_ways_that_the_engines_refuse():
    assert choose(SEVEN, Workload(layers=LOCAL, scores="int16"), 80e9).way == "in_place"
    clipped = choose(SEVEN, Workload(layers=LOCAL, clipping=True), 8e9)
    assert clipped.refusals["layerwise"] == "it has no global gradient norm to clip"
    assert clipped.way is None
