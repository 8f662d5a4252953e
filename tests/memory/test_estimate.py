"""The estimate against a simulation of the engines, against the targets, and what is chosen and refused."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks.memory.simulated_step import simulate_step
from mft.cli import estimate as estimate_command
from mft.cli.app import app
from mft.cli.estimate import parse_bytes
from mft.config import WAYS
from mft.memory.estimate import estimate
from mft.memory.fit import RESERVE, choose, gigabytes
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload

# LLaMA2-7B's proportions at an eighth of its width.
SMALL = known_config("llama2-7b") | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True, "intermediate_size": 1792}
QWEN = {**GROUPED, "model_type": "qwen3", "head_dim": 64}
NARROW = SMALL | {"intermediate_size": 512}  # the backward pass peaks in a norm
SEVEN = shape_from_config(known_config("llama2-7b"), "llama2-7b")
EIGHT = shape_from_config(known_config("llama3.1-8b"), "llama3.1-8b")
SEVENTY = shape_from_config(known_config("llama2-70b"), "llama2-70b")
LOCAL = (4, 5, 6, 7)


def assert_as_simulated(config, workload, tolerance=0.05):
    expected = estimate(shape_from_config(config), workload)
    found = simulate_step(config, workload, steps=2)
    assert expected.device_peak == pytest.approx(found.device_peak, rel=tolerance)
    assert expected.host_peak == pytest.approx(found.host_peak, rel=tolerance)


@pytest.mark.parametrize("layers", [None, (2, 3), (0,), (5,)], ids=str)
@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_each_way_is_as_simulated(way, layers):
    assert_as_simulated(SMALL, Workload(memory=way, layers=layers, sequence=512, accumulation=2))


@pytest.mark.parametrize("config", [GROUPED, QWEN, NARROW], ids=["grouped heads", "qwen3", "narrow"])
@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_other_shapes(way, config):
    assert_as_simulated(config, Workload(memory=way, sequence=256, micro_batch=2, accumulation=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": "bfloat16", "moments": "8bit"},
        {"scores": "int16", "moments": "8bit"},
        {"grad_dtype": "float32"},
        {"target_modules": ("down_proj",)},
        {"target_modules": ("q_proj", "k_proj")},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["resident", "layerwise"])
def test_other_settings(way, changes):
    assert_as_simulated(SMALL, Workload(memory=way, sequence=512, accumulation=2, **changes))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked too", "frozen alone"])
@pytest.mark.parametrize("way", ["quantized", "layerwise"])
def test_a_quantised_base(way, masked, kind):
    """Short rows, so that a dense matrix counts beside the activations."""
    workload = Workload(memory=way, layers=(2, 3), sequence=128, accumulation=2, quantization=kind)
    assert_as_simulated(SMALL, replace(workload, quantize_masked=masked))


def test_plain_with_states_in_few_bits():
    assert_as_simulated(
        SMALL, Workload(memory="plain", sequence=512, accumulation=2, scores="bfloat16", moments="8bit")
    )


def test_a_published_model_is_as_simulated():
    workload = Workload(memory="resident", layers=LOCAL, accumulation=2)
    assert_as_simulated(known_config("llama2-7b"), workload, tolerance=0.01)


# What must hold at sequence 4096, one row at a time, in bfloat16.
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
    """Plain moves them to the device before it makes scores; the others make them on the host."""
    weights, masked = 2 * SEVEN.parameters, 4 * 202_375_168
    plain, resident, quantized = (estimate(SEVEN, Workload(memory=way, layers=LOCAL)) for way in WAYS[:3])
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


# ---------------------------------------------------------------------------------------------- the choice


def test_auto_takes_the_fastest_that_fits():
    workload = Workload(layers=LOCAL)
    ways = [choose(SEVEN, workload, gb * 1e9).way for gb in (80, 24, 17.2, 16.5, 4, 2)]
    assert ways == ["plain", "resident", "resident", "layerwise", "layerwise", None]
    choice = choose(SEVEN, workload, 24e9)
    assert set(choice.estimates) == set(WAYS)
    assert "plain cannot be taken: needs 42.8 GB" in choice.reason
    assert "quantized" not in choice.refusals


def test_auto_takes_a_quantised_base_only_if_asked():
    workload = Workload(layers=LOCAL)
    assert choose(SEVEN, workload, 12e9).way == "layerwise"
    assert choose(SEVEN, replace(workload, quantization="nf4"), 12e9).way == "quantized"
    assert choose(SEVEN, replace(workload, quantization="nf4"), 4e9).way == "layerwise"


def test_the_host_has_to_hold_its_part():
    workload = Workload(layers=LOCAL)
    assert choose(SEVEN, workload, 8e9).way == "layerwise"
    refused = choose(SEVEN, workload, 8e9, 64e9)
    assert refused.way is None
    assert refused.refusals["layerwise"] == "needs 147.8 GB of the host's 64.0 GB"


def test_an_explicit_way_is_refused_if_it_does_not_fit():
    choice = choose(SEVEN, Workload(layers=LOCAL, memory="resident"), 16e9)
    assert choice.way is None
    needed = gigabytes(choice.estimates["resident"].device_peak)
    assert choice.reason.startswith(f"nothing fits: resident: needs {needed} (and 0.6 GB for the context) of 16.0 GB")
    assert choice.nearest == Workload(layers=LOCAL, memory="layerwise")
    assert choose(SEVEN, Workload(layers=LOCAL, memory="resident"), 24e9).way == "resident"


@pytest.mark.parametrize(("gigabytes", "host"), [(24, 64), (12, 32), (8, 32), (6, 48)])
def test_the_nearest_setting_fits(gigabytes, host):
    workload = Workload(micro_batch=4, accumulation=32)
    choice = choose(SEVEN, workload, gigabytes * 1e9, host * 1e9)
    assert choice.way is None
    near = choice.nearest
    assert near is not None
    again = choose(SEVEN, near, gigabytes * 1e9, host * 1e9)
    assert again.way == near.memory
    assert near.layers == workload.layers
    assert near.sequence <= workload.sequence
    found = estimate(SEVEN, near)
    assert found.device_peak + RESERVE["cuda"] <= gigabytes * 1e9
    assert found.host_peak <= host * 1e9


def test_smaller_micro_batches_are_the_first_thing_to_change():
    workload = Workload(layers=LOCAL, memory="resident", micro_batch=8, accumulation=16)
    near = choose(SEVEN, workload, 18e9).nearest
    assert near == replace(workload, micro_batch=2, accumulation=64)


def test_nothing_at_all_fits():
    choice = choose(SEVENTY, Workload(), 1e9)
    assert (choice.way, choice.nearest) == (None, None)


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
    assert choose(SEVEN, Workload(layers=LOCAL, scores="int16"), 80e9).way == "resident"
    clipped = choose(SEVEN, Workload(layers=LOCAL, clipping=True), 8e9)
    assert clipped.refusals["layerwise"] == "it has no global gradient norm to clip"
    assert clipped.way is None


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="memory must be one of auto, plain.*got 'residnt'; did you mean resident"):
        Workload(memory="residnt")
    with pytest.raises(
        ValueError, match="memory must be quantized, layerwise or auto over a quantised base, got plain"
    ):
        Workload(memory="plain", quantization="nf4")
    with pytest.raises(ValueError, match="quantization must be nf4 or int8 with quantize_masked, got None"):
        Workload(memory="layerwise", quantize_masked=True)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        Workload(micro_batch=0)
    with pytest.raises(ValueError, match=r"layers must lie in 0 to 31 \(llama2-7b has 32 layers\), got \[32\]"):
        estimate(SEVEN, Workload(memory="plain", layers=(32,)))
    with pytest.raises(ValueError, match="got auto: see choose"):
        estimate(SEVEN, Workload())
    with pytest.raises(ValueError, match="sequence must be at most 4096, the window of"):
        estimate(replace(SEVEN, sliding_window=4096), Workload(memory="plain", sequence=8192))


# ---------------------------------------------------------------------------------------------- the verb


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    """One of 64 GB."""
    monkeypatch.setattr(estimate_command, "machine_bytes", lambda: 64e9)


def call(*arguments):
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_verb_prints_a_table_and_the_choice():
    code, output = call(
        *("--model", "llama2-7b", "--layers", "4-7", "--keep-ratio", "0.9", "--sequence", "4096"),
        *("--micro-batch", "1", "--memory", "auto", "--gpu", "24GB"),
    )
    assert code == 0, output
    assert "llama2-7b, layers 4-7, 1 x 4096 tokens, on a GPU" in output
    assert "memory: resident. it is the fastest way that fits; plain cannot be taken" in output
    assert "quantized, which auto leaves alone since it changes the base, would fit in 7.8 GB" in output
    assert "are not measured: they assume a card that sustains 150 TFLOP/s" in output
    rows = {line[:16].strip(): line[16:].split() for line in output.splitlines()}
    assert rows["device peak"] == ["42.84", "15.91", "7.77", "2.31", "24.00"]
    assert rows["host peak"] == ["13.48", "16.82", "16.82", "147.85", "64.00"]
    assert rows["linears in nf4"] == ["none", "none", "196", "none", "224"]
    assert rows["fits"] == ["no", "yes", "yes", "no"]


def test_what_the_host_must_hold_is_part_of_what_fits():
    asked = ("--model", "llama3.1-8b", "--gpu", "12GB")
    code, output = call(*asked)
    assert code == 2
    assert "layerwise: needs 242.4 GB of the host's 64.0 GB" in output
    assert "this machine has 64.0 GB (--host for another)" in output
    code, output = call(*asked, "--host", "256GB")
    assert code == 0, output
    assert "memory: layerwise" in output
    assert "this machine" not in output
    found = json.loads(call(*asked, "--json")[1])
    assert (found["memory"], found["host_limit_gb"]) == (None, 64)
    assert found["ways"]["layerwise"]["host_peak_gb"] == pytest.approx(242.4, abs=0.1)
    assert "an RTX 4090" in found["seconds_assume"]


def test_nf4_stands_over_no_exact_weight():
    code, output = call("--model", "llama2-7b", "--gpu", "80GB", "--host", "400GB")
    assert code == 0, output
    counts = next(line for line in output.splitlines() if "linears in nf4" in line).split()
    assert counts[3:] == ["none", "none", "none", "none", "224"]
    assert "cannot be taken: every linear layer is masked" in output
    found = json.loads(call("--model", "llama2-7b", "--quantize-masked", "--gpu", "8GB", "--json")[1])
    assert found["ways"]["quantized"]["quantized_linears"] == 224


def test_json_has_the_numbers_of_the_estimate():
    code, output = call("--model", "llama2-7b", "--layers", "4-7", "--gpu", "24GB", "--json")
    assert code == 0, output
    found = json.loads(output)
    expected = estimate(SEVEN, Workload(memory="resident", layers=LOCAL))
    assert found["memory"] == "resident"
    assert found["device_peak_gb"] == expected.device_peak / 1e9
    assert found["host_peak_gb"] == expected.host_needed / 1e9
    assert found["ways"]["layerwise"]["refusal"] == "needs 147.8 GB of the host's 64.0 GB"
    assert found["ways"]["quantized"]["refusal"] is None
    assert found["ways"]["resident"]["device_gb"]["gradients"] == pytest.approx(1.619, abs=1e-3)


def test_what_does_not_fit_ends_with_code_two_and_the_nearest_setting():
    asked = ("--model", "llama2-7b", "--layers", "4-7", "--memory", "resident", "--gpu", "16GB")
    code, output = call(*asked)
    assert code == 2
    assert "nearest that fits: --memory layerwise" in output
    assert "error" not in output
    code, output = call(*asked, "--json")
    assert code == 2
    found = json.loads(output)
    assert found["memory"] is None
    assert found["nearest"]["memory"] == "layerwise"
    assert found["device_peak_gb"] > 15.4


def test_one_row_more_at_once_means_fewer_micro_batches():
    _, output = call("--model", "llama2-7b", "--micro-batch", "4", "--gpu", "80GB", "--json")
    assert json.loads(output)["setting"]["accumulation"] == 32


def test_on_a_cpu_there_is_one_memory():
    code, output = call("--model", "smollm2-135m", "--layers", "24-29", "--sequence", "512", "--cpu", "24GB", "--json")
    assert code == 0, output
    found = json.loads(output)
    assert (found["memory"], found["host_peak_gb"]) == ("plain", 0)
    _, output = call("--model", "smollm2-135m", "--sequence", "512", "--json")
    assert json.loads(output)["device_limit_gb"] == 64


def test_a_config_file_and_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for name in (tmp_path, tmp_path / "config.json"):
        code, output = call("--model", str(name), "--gpu", "24GB", "--json")
        assert code == 0, output
        expected = estimate(shape_from_config(SMALL), Workload(memory="plain"))
        assert json.loads(output)["device_peak_gb"] == expected.device_peak / 1e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama2-7b"], "got 'lama2-7b', the hub cannot be reached"),
        (["--model", "meta-llama/Llama-2-7b-hf"], "it is not in the hub's local cache"),
        (["--model", "./nowhere"], "model must exist, got './nowhere': no such file or directory"),
        (["--model", "no such model"], "a model directory or a hub id, got 'no such model'"),
        (["--model", "llama2-7b", "--gpu", "24 apples"], "--gpu must be a size with its unit, such as 24GB or 24GiB"),
        (["--model", "llama2-7b", "--gpu", "12"], "got '12': did you mean 12GB?"),
        (["--model", "llama2-7b", "--gpu", "12GB", "--host", "64"], "got '64': did you mean 64GB?"),
        (["--model", "llama2-7b", "--gpu", "1GB", "--cpu", "1GB"], "--gpu or --cpu must be given, got both"),
        (["--model", "llama2-7b", "--host", "1GB"], "--host must come with --gpu, got 1GB alone"),
        (["--model", "llama2-7b", "--keep-ratio", "1.5"], "keep_ratio must lie in [0, 1], got 1.5"),
        (["--model", "llama2-7b", "--layers", "4-70"], "layers must lie in 0 to 31"),
        (["--model", "llama2-7b", "--scores", "int8"], "scores must be one of float32, bfloat16, int16, got 'int8'"),
        (["--model", "llama2-7b", "--target-modules", "q"], "target_modules must name linear layers of llama2-7b"),
    ],
)
def test_errors_of_the_verb(arguments, message):
    code, output = call(*arguments)
    assert code == 2
    assert message in output
    assert output.startswith("error: ")


def test_a_file_that_is_no_config(tmp_path):
    for text, message in (("{", "config.json:1: expected JSON"), ("[]", "config.json: expected an object, got list")):
        (tmp_path / "config.json").write_text(text)
        code, output = call("--model", str(tmp_path / "config.json"))
        assert code == 2
        assert message in output
    (tmp_path / "empty").mkdir()
    assert "a directory with a config.json" in call("--model", str(tmp_path / "empty"))[1]


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24GiB", 24 * 2**30), ("24e9B", 24e9), ("1.5 gb", 1.5e9), ("512mib", 2**29)]
)
def test_sizes(text, size):
    assert parse_bytes(text, "--gpu") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24XB", "1..5GB", "0", "0GB", "24", "24e9", "infGB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="--host must be a size"):
        parse_bytes(text, "--host")
