"""mft estimate: its table, choice and JSON, its exit codes, and sizes with their units."""

import functools
import json

import pytest
from known_shapes import LOCAL, SEVEN, SMALL
from tiny_run import refused, succeed

from mft.cli import estimate as estimate_command
from mft.cli.estimate import parse_bytes
from mft.config import RunConfig
from mft.memory.estimate import estimate
from mft.memory.shapes import shape_from_config
from mft.memory.workload import Workload


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    """Pretend that this machine has 64 GB."""
    monkeypatch.setattr(estimate_command, "machine_bytes", lambda: 64e9)


PAPER = ("--sequence", "4096", "--accumulation", "128")  # the paper's row length, and rows per step
done, fails = functools.partial(succeed, "estimate"), functools.partial(refused, "estimate")


def test_the_verb_prints_a_table_and_the_choice():
    output = done(
        *("--model", "llama2-7b", "--layers", "4-7", *PAPER),
        *("--micro-batch", "1", "--memory", "auto", "--gpu", "24GB"),
    )
    assert "llama2-7b, layers 4-7, 1 x 4096 tokens, on a GPU" in output
    assert "memory: resident. it is the fastest way that fits; in_place cannot be taken" in output
    assert "quantized, which auto does not choose because it changes the base, would fit in 7.8 GB" in output
    assert "are not measured: they assume a card that sustains 150 TFLOP/s" in output
    rows = {line[:16].strip(): line[16:].split() for line in output.splitlines()}
    assert rows["device peak"] == ["42.84", "41.14", "15.91", "7.77", "2.71", "24.00"]
    assert rows["host peak"] == ["13.48", "13.48", "16.82", "16.82", "56.05", "64.00"]
    assert rows["batches at once"] == ["32"]
    assert rows["linears in nf4"] == ["none", "none", "none", "196", "none", "224"]
    assert rows["fits"] == ["no", "no", "yes", "yes", "yes"]


def test_processes_share_the_machine_and_a_step():
    """With fewer micro-batches, each process needs less for boundaries, but has less memory than a single process."""
    asked = ("--model", "llama2-7b", "--layers", "4-7", "--memory", "layerwise", "--gpu", "24GB", "--host", "200GB")
    asked += ("--scores", "float32", "--moments", "float32")
    done(*PAPER, *asked)
    output = fails(*PAPER, *asked, "--processes", "4", "--batches-at-once", "128")
    assert "needs 54.4 GB of the host's 50.0 GB" in output
    output = done(*PAPER, *asked, "--processes", "4")
    assert "16 of a step's 32 batches at once: the hidden states of more do not fit" in output
    assert "4 processes on one machine: each runs at most 32 of a step's 128 micro-batches" in output
    found = done(*PAPER, "--model", "llama2-7b", "--layers", "4-7", "--cpu", "200GB", "--processes", "4", "--json")
    assert json.loads(found)["device_limit_gb"] == 50
    output = fails(*asked, "--processes", "4", "--accumulation", "3")
    assert "accumulation must be at least 4, the number of processes, each of which takes whole micro-batches" in output


def test_json_has_the_numbers_of_the_estimate():
    output = done(*PAPER, "--model", "llama2-7b", "--layers", "4-7", "--gpu", "24GB", "--json")
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
    output = fails(*PAPER, *asked)
    assert "nearest that fits: --memory layerwise" in output
    assert "error" not in output
    output = fails(*PAPER, *asked, "--json")
    found = json.loads(output)
    assert found["memory"] is None
    assert found["nearest"]["memory"] == "layerwise"
    assert found["device_peak_gb"] > 15.4


def test_what_is_not_given_is_what_mft_train_would_take():
    config = RunConfig()
    output = done("--model", "smollm2-135m", "--json")
    setting = json.loads(output)["setting"]
    assert (setting["sequence"], setting["micro_batch"], setting["accumulation"]) == (
        *(config.data.sequence_length, config.train.batch_size, config.train.accumulation),
    )
    assert (setting["scores"], setting["moments"]) == (config.mask.scores_dtype, config.train.moments)
    output = done("--model", "smollm2-135m", "--micro-batch", "2")
    assert "smollm2-135m, all layers, 2 x 512 tokens" in output
    assert "as mft train by default: --sequence 512, --accumulation 1" in output
    assert "as mft train by default" not in done(*PAPER, "--model", "smollm2-135m", "--micro-batch", "2")


def test_on_a_cpu_there_is_one_memory():
    output = done("--model", "smollm2-135m", "--layers", "24-29", "--sequence", "512", "--cpu", "24GB", "--json")
    found = json.loads(output)
    assert (found["memory"], found["host_peak_gb"]) == ("plain", 0)
    output = done("--model", "smollm2-135m", "--sequence", "512", "--json")
    assert json.loads(output)["device_limit_gb"] == 64


def test_a_config_file_and_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for name in (tmp_path, tmp_path / "config.json"):
        output = done(*PAPER, "--model", str(name), "--gpu", "24GB", "--json")
        expected = estimate(shape_from_config(SMALL), Workload(memory="in_place", budget=0.012))
        assert json.loads(output)["device_peak_gb"] == expected.device_peak / 1e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama2-7b"], "got 'lama2-7b', the hub cannot be reached"),
        (["--model", "meta-llama/Llama-2-7b-hf"], "it is not in the hub's local cache"),
        (["--model", "./nowhere"], "model must exist, got './nowhere': no such file or directory"),
        (["--model", "no such model"], "a model directory or a hub id, got 'no such model'"),
        (["--model", "llama2-7b", "--gpu", "12GB", "--host", "64"], "got '64': did you mean 64GB?"),
        (["--model", "llama2-7b", "--gpu", "1GB", "--cpu", "1GB"], "--gpu or --cpu must be given, got both"),
        (["--model", "llama2-7b", "--host", "1GB"], "--host must come with --gpu, got 1GB alone"),
        (["--model", "llama2-7b", "--layers", "4-70"], "layers must lie in 0 to 31"),
        (["--model", "llama2-7b", "--scores", "int8"], "scores must be one of auto, float32, bfloat16, int16, got"),
        (["--model", "llama2-7b", "--target-modules", "q"], "must name linear layers of llama2-7b"),
    ],
)
def test_errors_of_the_verb(arguments, message):
    output = fails(*arguments)
    assert message in output
    assert output.startswith("error: ")


def test_a_file_that_is_no_config(tmp_path):
    for text, message in (("{", "config.json:1: expected JSON"), ("[]", "config.json: expected an object, got list")):
        (tmp_path / "config.json").write_text(text)
        output = fails("--model", str(tmp_path / "config.json"))
        assert message in output
    (tmp_path / "empty").mkdir()
    assert "a directory with a config.json" in fails("--model", str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24GiB", 24 * 2**30), ("24e9B", 24e9), ("1.5 gb", 1.5e9), ("512mib", 2**29)]
)
def test_sizes(text, size):
    assert parse_bytes(text, "--gpu") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24XB", "1..5GB", "0", "0GB", "24", "24e9", "infGB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="--host must be a size"):
        parse_bytes(text, "--host")
