"""The estimate compared with a simulation of the engines, with the targets, and with values by hand."""

from dataclasses import replace

import pytest
from known_shapes import LOCAL, SEVEN, SEVENTY, SMALL, assert_as_simulated

from benchmarks.memory.simulated_step import simulate_step
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload

GROUPED = SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True, "intermediate_size": 1792}
QWEN = {**GROUPED, "model_type": "qwen3", "head_dim": 64}
NARROW = SMALL | {"intermediate_size": 512}  # the backward pass peaks in a norm
EIGHT = shape_from_config(known_config("llama3.1-8b"), "llama3.1-8b")


@pytest.mark.parametrize(
    "layers", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in ((1, 2), (0,), (3,)))], ids=str
)
@pytest.mark.parametrize("way", ["plain", "in_place", "resident", "layerwise"])
def test_each_way_is_as_simulated(way, layers):
    assert_as_simulated(SMALL, Workload(memory=way, layers=layers, sequence=512, accumulation=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "config"),
    [("plain", GROUPED), ("plain", QWEN), ("plain", NARROW), ("resident", QWEN), ("layerwise", NARROW)],
    ids=["plain-grouped heads", "plain-qwen3", "plain-narrow", "resident-qwen3", "layerwise-narrow"],
)
def test_other_shapes(way, config):
    """They change a layer's activations: plain holds those of all layers, the other ways those of one layer."""
    assert_as_simulated(config, Workload(memory=way, sequence=256, micro_batch=2, accumulation=3))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SMALL, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (SMALL, {"accumulation": 8}),
                (SMALL, {"accumulation": 8, "reduces_every_batch": True}),
                (SMALL, {"gradient_checkpointing": True, "layers": (1, 2)}),
                (SMALL, {"scores": "int16", "moments": "8bit", "sequence": 64}),
                (GROUPED, {"sequence": 256}),
            ]
        ),
    ],
    ids=str,
)
def test_sharded_is_as_simulated(config, changes):
    """One of four processes; the others' rows are nowhere on it."""
    workload = Workload(**{"memory": "sharded", "sequence": 512, "accumulation": 4, "processes": 4} | changes)
    expected, found = estimate(shape_from_config(config), workload), simulate_step(config, workload, steps=2)
    assert expected.device_peak == pytest.approx(found.device_peak, rel=0.06)


def test_sharded_needs_host_memory_for_one_matrix_and_the_exported_masks():
    workload = Workload(memory="sharded", layers=(4, 5, 6, 7), accumulation=8, processes=8)
    found = estimate(SEVENTY, workload)
    assert found.host == {}
    assert found.loading == 16 * 28672 * 8192  # of 69 G weights
    everywhere = estimate(SEVENTY, replace(workload, layers=None))
    weights = sum(n * k for n, k in SEVENTY.linears.values()) * SEVENTY.layers
    assert everywhere.loading == 2 * weights // 8
    alone, cpu = (estimate(SEVENTY, replace(workload, device=device)).phases for device in ("cuda", "cpu"))
    assert cpu["backward"] - alone["backward"] < 1e8  # without flash attention, with a workspace


@pytest.mark.parametrize(
    "changes",
    [
        {"batches_at_once": 2, "sequence": 128, "accumulation": 3},
        pytest.param({"batches_at_once": 2, "objective": "kl", "layers": (1, 2)}, marks=pytest.mark.slow),
        pytest.param({"batches_at_once": 2, "sequence": 16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layerwise_in_portions_is_as_simulated(changes):
    """A step of 3 or 5 batches. All layers' gradient sums are on the host; those of two layers are on the device."""
    workload = Workload(**{"memory": "layerwise", "sequence": 512, "accumulation": 5} | changes)
    found = assert_as_simulated(SMALL, workload, tolerance=0.03)  # the update holds fewer boundaries than are counted
    masked = sum(n * k for n, k in shape_from_config(SMALL).linears.values())
    assert found.host["gradients"] == 2 * masked * len(workload.layers or range(4))
    assert found.device["gradients"] == 2 * 2 * masked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("resident", {"scores": "bfloat16", "moments": "8bit"}),
        ("layerwise", {"scores": "int16", "moments": "8bit"}),
        ("in_place", {"scores": "int16", "moments": "8bit"}),
        ("in_place", {"grad_dtype": "float32"}),
        ("resident", {"grad_dtype": "float32"}),
        ("layerwise", {"grad_dtype": "float32"}),
        ("resident", {"target_modules": ("down_proj",)}),
        ("layerwise", {"target_modules": ("q_proj", "k_proj")}),
        ("plain", {"scores": "bfloat16", "moments": "8bit"}),
    ],
    ids=str,
)
def test_other_settings(way, changes):
    assert_as_simulated(SMALL, Workload(memory=way, sequence=512, accumulation=2, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "masked", "kind"),
    [
        ("quantized", True, "nf4"),
        ("quantized", False, "nf4"),
        ("layerwise", True, "nf4"),
        ("layerwise", False, "nf4"),
        ("quantized", True, "nf4-dq"),
        ("layerwise", False, "nf4-dq"),
        ("quantized", False, "int8"),
        ("layerwise", True, "int8"),
    ],
)
def test_a_quantised_base(way, masked, kind):
    """Short rows, so that a dense matrix is large next to activations. ``masked``: masked layers are codes too."""
    workload = Workload(memory=way, layers=(1, 2), sequence=128, accumulation=2, quantization=kind)
    assert_as_simulated(SMALL, replace(workload, quantize_masked=masked))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"grad_dtype": "float32"}], ids=str)
@pytest.mark.parametrize("way", ["resident", "layerwise"])
def test_gradients_of_several_processes_are_summed_in_memory_that_is_counted(way, changes):
    """Rows are so short that a step's peak is at the update of scores; 5 micro-batches run as 2, 2 and 1."""
    workload = Workload(memory=way, sequence=16, accumulation=5, scores="int16", moments="8bit", processes=3, **changes)
    found = assert_as_simulated(SMALL, workload, tolerance=0.01)
    assert found.phase == "optimiser"
    alone = estimate(shape_from_config(SMALL), replace(workload, processes=1, accumulation=2))
    largest = max(n * k for n, k in shape_from_config(SMALL).linears.values())
    assert found.device_peak - alone.device_peak == (0 if changes else 4 * largest)
    assert found.host == alone.host
    assert found.seconds == alone.seconds


def test_plain_sums_scores_of_sixteen_bits_in_fp32():
    phases = [
        estimate(SEVEN, Workload(memory="plain", scores=scores, processes=processes)).phases["optimiser"]
        for scores, processes in (("bfloat16", 1), ("bfloat16", 2), ("float32", 1), ("float32", 2))
    ]
    assert phases[1] - phases[0] == 4 * 4096 * 11008
    assert phases[3] == phases[2]


@pytest.mark.slow
def test_a_published_model_is_as_simulated():
    """The width is the published one, with layers below and above the masked ones. `make simulate` runs it whole."""
    workload = Workload(memory="resident", layers=(2, 3), accumulation=2)
    assert_as_simulated(known_config("llama2-7b") | {"num_hidden_layers": 6}, workload, tolerance=0.01)


# The limits at sequence 4096, one row at a time, in bfloat16.
@pytest.mark.parametrize(
    ("shape", "layers", "most", "options"),
    [
        (SEVEN, LOCAL, 17.5, {"memory": "resident"}),
        (SEVEN, None, 28.0, {"memory": "resident"}),
        (SEVEN, LOCAL, 8.0, {"memory": "quantized"}),
        (SEVEN, None, 19.0, {"memory": "quantized", "quantize_masked": True}),
        (SEVEN, LOCAL, 3.0, {"memory": "layerwise"}),
        (SEVEN, None, 3.0, {"memory": "layerwise"}),
        (EIGHT, LOCAL, 3.2, {"memory": "layerwise"}),
        (EIGHT, None, 3.2, {"memory": "layerwise"}),
        (SEVENTY, LOCAL, 6.5, {"memory": "layerwise", "quantization": "nf4", "quantize_masked": True}),
    ],
)
def test_targets(shape, layers, most, options):
    assert estimate(shape, Workload(layers=layers, **options)).device_peak <= most * 1e9


def test_the_parts_by_hand():
    """LLaMA2-7B resident, layers 4-7: 4 x 202,375,168 masked weights."""
    found = estimate(SEVEN, Workload(memory="resident", layers=LOCAL))
    masked = 4 * 202_375_168
    embedding = 32_000 * 4096
    assert found.device["weights"] == 2 * (6_738_415_616 - embedding)
    assert found.device["gradients"] == 2 * masked
    assert found.device["masks"] == masked // 8
    assert found.host == {"weights": 2 * embedding, "states": 12 * masked, "boundaries": 28 * 4096 * 4096 * 2}
    assert found.device_peak == sum(found.device.values()) == found.phases[found.phase] == max(found.phases.values())


def test_in_place_by_hand():
    """Masks take bits, and a hundredth of the weights is put aside.

    On a CPU, where weights are mapped, the masked weights also need a copy.
    """
    workload = Workload(memory="in_place", layers=LOCAL)
    found, masked = estimate(SEVEN, workload), 4 * 202_375_168
    assert found.device["dropped"] == pytest.approx(0.01 * 2 * masked, abs=4)
    assert found.device["gradients"] == 2 * masked
    assert found.device["weights"] == 2 * SEVEN.parameters
    together = estimate(SEVEN, replace(workload, device="cpu"))
    assert together.device["weights"] == 2 * (SEVEN.parameters + masked)
    shares = {"keep_ratio": 0.5}, {"budget": 0.01}, {"keep_ratio": 0.0}
    aside = [estimate(SEVEN, replace(workload, **share)).device["dropped"] for share in shares]
    assert aside == pytest.approx([masked, 0.02 * masked, 2 * masked], abs=4)


def test_bases_in_few_bits():
    workload = Workload(memory="quantized", layers=LOCAL)
    outside, linears = 2 * (32_000 * 4096 + 4096 + 32 * 2 * 4096), 202_375_168
    frozen_nf4, masked_exact = 28 * linears * 9 // 16, 4 * linears * 2
    assert estimate(SEVEN, workload).device["weights"] == outside + frozen_nf4 + masked_exact
    everything = estimate(SEVEN, replace(workload, quantize_masked=True)).device["weights"]
    assert everything == outside + 32 * linears * 9 // 16
    rows = 32 * sum(n for n, _ in SEVEN.linears.values())
    int8 = estimate(SEVEN, replace(workload, quantization="int8", quantize_masked=True)).device["weights"]
    assert int8 == outside + 32 * linears + 4 * rows


def test_checkpointing_holds_boundaries_alone():
    workload = Workload(memory="plain", layers=LOCAL)
    saved, less = (estimate(SEVEN, replace(workload, gradient_checkpointing=c)) for c in (False, True))
    assert less.device_peak < saved.device_peak - 10e9
    assert less.seconds > saved.seconds


def test_the_weights_are_read_before_they_are_anywhere_else():
    """plain moves them to the device before it makes scores; the other ways make scores on the host."""
    weights, masked = 2 * SEVEN.parameters, 4 * 202_375_168
    plain, resident, quantized = (
        estimate(SEVEN, Workload(memory=way, layers=LOCAL)) for way in ("plain", "resident", "quantized")
    )
    assert (plain.loading, plain.host_peak, plain.host_needed) == (weights, 0, weights)
    assert resident.loading == resident.host_needed == weights + masked // 8 + 4 * masked > resident.host_peak
    assert quantized.loading == resident.loading
    together = estimate(SEVEN, Workload(memory="quantized", layers=LOCAL, device="cpu"))
    assert (together.loading, together.phases["loading"]) == (0, resident.loading)


def test_what_is_quantised_is_counted():
    linears = 32 * 7
    counts = {
        (LOCAL, False): linears - 4 * 7,
        (LOCAL, True): linears,
        (None, False): 0,
        (None, True): linears,
    }
    for (layers, masked), count in counts.items():
        workload = Workload(memory="quantized", layers=layers, quantization="nf4", quantize_masked=masked)
        assert estimate(SEVEN, workload).quantized == count
    some = Workload(memory="layerwise", target_modules=("down_proj",), quantization="int8")
    assert estimate(SEVEN, some).quantized == 32 * 6
    assert estimate(SEVEN, Workload(memory="resident", layers=LOCAL)).quantized == 0


def test_one_memory_holds_everything_once():
    for way in ("resident", "layerwise"):
        apart = estimate(SEVEN, Workload(memory=way, layers=LOCAL, accumulation=2))
        together = estimate(SEVEN, Workload(memory=way, layers=LOCAL, accumulation=2, device="cpu"))
        assert together.host_peak == 0
        assert together.device["weights"] == 2 * 6_738_415_616
        assert "staging" not in together.device
        assert together.device["states"] == apart.host["states"]
        assert together.device["boundaries"] == apart.host["boundaries"]


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="memory must be one of auto, plain.*got 'residnt'; did you mean resident"):
        Workload(memory="residnt")
    with pytest.raises(ValueError, match="quantization must be nf4 or nf4-dq or int8 with quantize_masked, got None"):
        Workload(memory="layerwise", quantize_masked=True)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        Workload(micro_batch=0)
    with pytest.raises(ValueError, match=r"layers must lie in 0 to 31 \(llama2-7b has 32 layers\), got \[32\]"):
        estimate(SEVEN, Workload(memory="plain", layers=(32,)))
    with pytest.raises(ValueError, match="got auto: see choose"):
        estimate(SEVEN, Workload())
    with pytest.raises(ValueError, match="scores must be a format here: see choose, got auto"):
        estimate(SEVEN, Workload(memory="resident", scores="auto"))
    with pytest.raises(ValueError, match="sequence must be at most 4096, the window of"):
        estimate(replace(SEVEN, sliding_window=4096), Workload(memory="plain", sequence=8192))
