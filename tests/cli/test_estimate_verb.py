"""mft estimate: its table, choice and JSON, its exit codes, and sizes with their units."""

import json

import pytest
from known_shapes import LOCAL, SEVEN, SMALL
from typer.testing import CliRunner

from mft.cli import estimate as estimate_command
from mft.cli.app import app
from mft.cli.estimate import parse_bytes
from mft.config import WAYS, RunConfig
from mft.memory.estimate import estimate
from mft.memory.shapes import shape_from_config
from mft.memory.workload import Workload


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    """Pretend that this machine has 64 GB."""
    monkeypatch.setattr(estimate_command, "machine_bytes", lambda: 64e9)


PAPER = ("--sequence", "4096", "--accumulation", "128")  # the paper's row length, and rows per step


def call_paper(*arguments):
    return call(*arguments, *PAPER)


def call(*arguments):
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_verb_prints_a_table_and_the_choice():
    code, output = call(
        *("--model", "llama2-7b", "--layers", "4-7", *PAPER),
        *("--micro-batch", "1", "--memory", "auto", "--gpu", "24GB"),
    )
    assert code == 0, output
    assert "llama2-7b, layers 4-7, 1 x 4096 tokens, on a GPU" in output
    assert "memory: resident. it is the fastest way that fits; plain cannot be taken" in output
    assert "quantized, which auto does not choose because it changes the base, would fit in 7.8 GB" in output
    assert "are not measured: they assume a card that sustains 150 TFLOP/s" in output
    rows = {line[:16].strip(): line[16:].split() for line in output.splitlines()}
    assert rows["device peak"] == ["42.84", "41.14", "15.91", "7.77", "2.71", "24.00"]
    assert rows["host peak"] == ["13.48", "13.48", "16.82", "16.82", "56.05", "64.00"]
    assert rows["batches at once"] == ["32"]
    assert rows["linears in nf4"] == ["none", "none", "none", "196", "none", "224"]
    assert rows["fits"] == ["no", "no", "yes", "yes", "yes"]


@pytest.mark.parametrize(
    ("model", "gpu", "asked", "said"),
    [
        (
            "qwen3-30b-a3b",
            "80GB",
            ("--layers", "4-7", "--host", "128GB"),
            "memory: resident. it is the fastest way that fits",
        ),
        (
            "qwen3-30b-a3b",
            "24GB",
            ("--layers", "4-7", "--host", "256GB"),
            "memory: layerwise. it is the fastest way that",
        ),
        (
            "gpt-oss-20b",
            "24GB",
            (),
            "the GPU needs 95.6 GB of the host or more; mask fewer layers (--layers) or attention",
        ),
        ("gpt-oss-20b", "24GB", ("--host", "400GB"), "memory: layerwise. it is the fastest way that fits"),
        ("gpt-oss-20b", "12GB", ("--host", "400GB"), "nearest that fits: --memory layerwise --sequence 2048"),
    ],
    ids=["resident", "layerwise", "no host", "gpt-oss", "shorter rows"],
)
def test_mixtures_on_cards(model, gpu, asked, said):
    code, output = call_paper("--model", model, "--gpu", gpu, *asked)
    assert code == (0 if said.startswith("memory: ") else 2)
    assert said in output


def test_what_is_said_of_experts():
    _, output = call_paper("--model", "gpt-oss-20b", "--gpu", "24GB", "--layers", "4-7")
    assert "32 experts per layer, 4 per token: 38.2 GB of the 41.8 GB of weights, all held in memory" in output
    assert "; with a quantised base, each product dequantises the weights of one layer" in output
    assert (
        "the checkpoint holds weights in mxfp4; masks need dequantised weights, so the estimate counts those" in output
    )
    assert "eagerly: T x T per head" in output
    _, output = call_paper("--model", "llama2-7b", "--gpu", "24GB")
    assert "experts" not in output


def test_processes_share_the_machine_and_a_step():
    """With fewer micro-batches, each process needs less for boundaries, but has less memory than a single process."""
    asked = ("--model", "llama2-7b", "--layers", "4-7", "--memory", "layerwise", "--gpu", "24GB", "--host", "200GB")
    asked += ("--scores", "float32", "--moments", "float32")
    assert call_paper(*asked)[0] == 0
    code, output = call_paper(*asked, "--processes", "4", "--batches-at-once", "128")
    assert code == 2
    assert "needs 54.4 GB of the host's 50.0 GB" in output
    code, output = call_paper(*asked, "--processes", "4")
    assert code == 0
    assert "16 of a step's 32 batches at once: the hidden states of more do not fit" in output
    assert "on a GPU, each of 4 processes; in GB" in output
    assert "4 processes on one machine: each runs at most 32 of a step's 128 micro-batches" in output
    assert "seconds, for 32 micro-batches per step, are not measured" in output
    _, found = call_paper("--model", "llama2-7b", "--layers", "4-7", "--cpu", "200GB", "--processes", "4", "--json")
    assert json.loads(found)["device_limit_gb"] == 50
    code, output = call(*asked, "--processes", "4", "--accumulation", "3")
    assert code == 2
    assert "accumulation must be at least 4, the number of processes, each of which takes whole micro-batches" in output


def test_the_default_is_what_fits_a_workstation():
    """The paper's step of all layers; a format that the user gives is kept, or refused."""
    asked = ("--model", "llama2-7b", "--gpu", "4GB")
    code, output = call_paper(*asked)
    assert code == 0, output
    assert "memory: layerwise" in output
    assert "8 of a step's 128 batches at once: the hidden states of more do not fit" in output
    assert (
        "scores in int16 and moments in 8bit: with wider ones layerwise needs 106.1 GB of the host's 64.0 GB" in output
    )
    found = json.loads(call_paper(*asked, "--json")[1])
    assert (found["setting"]["scores"], found["chosen"]["scores"], found["chosen"]["batches_at_once"]) == (
        *("auto", "int16", 8),
    )
    code, output = call_paper(*asked, "--moments", "float32")
    assert code == 2
    assert "nothing fits" in output


def test_a_mode_that_is_refused_is_still_the_one_that_is_described():
    asked = ("--model", "llama2-7b", "--processes", "8", "--gpu", "80GB", "--accumulation", "100")
    code, output = call(*asked, "--memory", "sharded")
    assert code == 2
    assert "accumulation=100 must be a multiple of the 8 processes, such as 104" in output
    assert "holds a share of all weights" in output
    assert "holds its own weights" in call(*asked)[1]


def test_help_names_every_memory_mode():
    _, output = call("--help")
    assert all(way in output for way in ("auto", *WAYS)), output


def test_what_the_host_must_hold_is_part_of_what_fits():
    asked = ("--model", "llama3.1-8b", "--gpu", "12GB", "--scores", "float32", "--moments", "float32")
    code, output = call_paper(*asked)
    assert code == 2
    assert "layerwise: needs 115.8 GB of the host's 64.0 GB" in output
    code, output = call_paper(*asked, "--batches-at-once", "128")
    assert code == 2
    assert "layerwise: needs 242.4 GB of the host's 64.0 GB" in output
    assert "nearest that fits: --memory layerwise without --batches-at-once --scores bfloat16 --moments 8bit" in output
    assert "this machine has 64.0 GB (--host for another)" in output
    code, output = call_paper(*asked, "--host", "256GB")
    assert code == 0, output
    assert "memory: layerwise" in output
    assert "this machine" not in output
    found = json.loads(call_paper(*asked, "--json")[1])
    assert (found["memory"], found["host_limit_gb"]) == (None, 64)
    assert found["ways"]["layerwise"]["host_peak_gb"] == pytest.approx(115.8, abs=0.1)
    assert "an RTX 4090" in found["seconds_assume"]


def test_nf4_stands_over_no_exact_weight():
    code, output = call_paper("--model", "llama2-7b", "--gpu", "80GB", "--host", "400GB")
    assert code == 0, output
    counts = next(line for line in output.splitlines() if "linears in nf4" in line).split()
    assert counts[3:] == [*["none"] * 5, "224"]
    assert "cannot be taken: every linear layer is masked" in output
    found = json.loads(call_paper("--model", "llama2-7b", "--quantize-masked", "--gpu", "8GB", "--json")[1])
    assert found["ways"]["quantized"]["quantized_linears"] == 224


def test_json_has_the_numbers_of_the_estimate():
    code, output = call_paper("--model", "llama2-7b", "--layers", "4-7", "--gpu", "24GB", "--json")
    assert code == 0, output
    found = json.loads(output)
    expected = estimate(SEVEN, Workload(memory="resident", layers=LOCAL))
    assert found["memory"] == "resident"
    assert found["device_peak_gb"] == expected.device_peak / 1e9
    assert found["host_peak_gb"] == expected.host_needed / 1e9
    assert found["ways"]["layerwise"]["batches_at_once"] == 32
    assert (found["ways"]["layerwise"]["refusal"], found["ways"]["quantized"]["refusal"]) == (None, None)
    assert found["ways"]["plain"]["refusal"].startswith("needs 42.8 GB (and 0.6 GB for the context) of 24.0 GB")
    assert found["ways"]["resident"]["device_gb"]["gradients"] == pytest.approx(1.619, abs=1e-3)


def test_what_does_not_fit_ends_with_code_two_and_the_nearest_setting():
    asked = ("--model", "llama2-7b", "--layers", "4-7", "--memory", "resident", "--gpu", "16GB")
    code, output = call_paper(*asked)
    assert code == 2
    assert "nearest that fits: --memory layerwise" in output
    assert "error" not in output
    code, output = call_paper(*asked, "--json")
    assert code == 2
    found = json.loads(output)
    assert found["memory"] is None
    assert found["nearest"]["memory"] == "layerwise"
    assert found["device_peak_gb"] > 15.4


def test_what_is_not_given_is_what_mft_train_would_take():
    config = RunConfig()
    code, output = call("--model", "smollm2-135m", "--json")
    assert code == 0, output
    setting = json.loads(output)["setting"]
    assert (setting["sequence"], setting["micro_batch"], setting["accumulation"]) == (
        *(config.data.sequence_length, config.train.batch_size, config.train.accumulation),
    )
    assert (setting["scores"], setting["moments"]) == (config.mask.scores_dtype, config.train.moments)
    _, output = call("--model", "smollm2-135m", "--micro-batch", "2")
    assert "smollm2-135m, all layers, 2 x 512 tokens" in output
    assert "as mft train by default: --sequence 512, --accumulation 1" in output
    assert "as mft train by default" not in call_paper("--model", "smollm2-135m", "--micro-batch", "2")[1]


def test_seconds_of_a_small_step_are_not_rounded_to_none():
    _, output = call("--model", "smollm2-135m")
    seconds = next(line for line in output.splitlines() if "seconds per step" in line).split()[3:]
    assert all(0 < float(each) < 10 for each in seconds)


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
        code, output = call_paper("--model", str(name), "--gpu", "24GB", "--json")
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
        (["--model", "llama2-7b", "--layers", "4-70"], "layers must lie in 0 to 31"),
        (
            ["--model", "llama2-7b", "--scores", "int8"],
            "scores must be one of auto, float32, bfloat16, int16, got 'int8'",
        ),
        (
            ["--model", "llama2-7b", "--target-modules", "q"],
            "target_modules and target_parameters must name linear layers of llama2-7b",
        ),
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
