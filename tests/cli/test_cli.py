"""Each verb from the command line on a tiny model, and the messages for wrong input."""

import json

import pytest
import torch
from tiny import make_llama
from tiny_run import LEARN

import mft
from mft.cli.environment import backend_line
from mft.config_file import load_config
from mft.training.flips import read_flips
from mft.training.run_directory import check_run_directory
from mft_kernels.backends import table as backends


def test_brackets_in_a_directory_are_shown_as_they_are(cli):
    name = "runs/[lr=3] [/y]"
    output = cli.done("train", *LEARN, "train.steps=1", f"output_dir={name}")
    assert f"result: {name}/masks; metrics, table and plot: {name}/" in output
    assert f"mft merge '{name}' '{name}-merged'" in output


def test_a_tilde_is_the_home_directory_wherever_a_path_is_given(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "config.yaml").rename(tmp_path / "home" / "own.yaml")
    (tmp_path / "data.jsonl").rename(tmp_path / "home" / "data.jsonl")
    one_step = [*LEARN, "train.steps=1", "data.source=~/data.jsonl", "output_dir=~/run"]
    cli.done("train", "--config=~/own.yaml", *one_step)
    cli.done("merge", "~/run", "~/merged", "--dtype=float32")
    cli.done("evaluate", "--config=~/own.yaml", "data.source=~/data.jsonl", "--masks=~/run")
    assert (tmp_path / "home" / "run" / "masks").is_dir()
    assert (tmp_path / "home" / "merged" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_finetune_writes_a_model_that_train_evaluate_merge_and_inspect_use(cli, tmp_path):
    cli.done("finetune", *LEARN)
    run = tmp_path / "run"
    files = {"config.yaml", "metrics.jsonl", "model", "plot.png", "table.json", "table.md"}
    assert {p.name for p in run.iterdir()} == files
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if "lr" in e] == [1, 2, 3, 4]
    assert load_config(run / "config.yaml").train.betas == (0.9, 0.999)  # of weights, not of masks

    tuned = ["model.name=run/model", "output_dir=masked", "--set", "mask.keep_ratio=0.9"]
    output = cli.done("train", *LEARN, *tuned)
    assert "% of the mask's bits flipped since initialisation" in output

    output = cli.done("evaluate", "model.name=run/model", "--masks", "masked", "--split", "test")
    assert "with masks" in output
    assert "±" in output

    cli.done("merge", "masked", "merged", "--dtype", "float32")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weight = merged.model.layers[3].mlp.up_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.1, abs=0.01)

    output = cli.done("inspect", "masked", "--dtype", "float32")
    rows = [line.split()[:3] for line in output.splitlines() if "_proj" in line or "total" in line]
    assert rows[-2:] == [["model.layers.2-3.mlp.down_proj", "0.004", "90.04"], ["total", "of", "14"]]
    assert len(rows) == 8
    assert "flips are unknown" not in output
    _, output = cli("inspect", "masked", "--dtype", "float32", "--all")
    assert sum("_proj" in line for line in output.splitlines()) == 14


def test_the_version_and_the_public_names(cli):
    assert cli("--version") == (0, f"mft {mft.__version__}\n")
    assert cli("--version", "nonsense")[0] == 0
    assert dir(mft) == sorted(mft.__all__) == sorted(mft._HOME)
    assert all(callable(getattr(mft, name)) for name in dir(mft))


def test_modules_to_save_are_trained_saved_and_merged(cli, tmp_path):
    output = cli.done("train", *LEARN, "mask.modules_to_save=[lm_head]", "mask.layers_to_transform=3")
    assert "auto is plain with mask.modules_to_save" in output
    cli.done("merge", "run", "merged", "--dtype", "float32")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "masks" / "adapter_model.safetensors")["lm_head.weight"]
    assert torch.equal(saved, load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"])
    assert not torch.equal(saved, make_llama().lm_head.weight)


def test_env_says_which_kernels_serve_the_cpu(cli):
    output = cli.done("env")
    assert f"torch {torch.__version__}" in output
    assert "auto on cpu: " in output
    assert "reference" in output
    assert "processor " in output
    assert "path of the cpu library " in output


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("reference", "MFT_KERNELS=reference on cpu: every function (auto: "),
        ("partial", "MFT_KERNELS=partial on cpu: pack, signs alone, the others are refused (auto: "),
        ("missing", "MFT_KERNELS=missing on cpu: every function is refused: no compiler; unset it for auto, "),
        ("fast", "MFT_KERNELS=fast on cpu: every function is refused: name must be one of ("),
        ("auto", "auto on cpu: "),
    ],
)
def test_env_says_what_the_variable_asks_for(asked, told, own_table, monkeypatch):
    functions = {name: backends.registered("reference").functions[name] for name in ("pack", "signs")}
    backends.register(backends.Backend("partial", frozenset({"cpu"}), frozenset(), functions))
    backends.register(backends.Backend("missing", frozenset({"cpu"}), frozenset(), {}, unavailable="no compiler"))
    automatic = backends.backend_report()["auto"]["cpu"]
    monkeypatch.setenv("MFT_KERNELS", asked)
    assert backend_line(torch.device("cpu"), automatic).startswith(told)


def test_a_directory_of_something_else_is_never_emptied(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    output = cli.refused("train", *LEARN, "--overwrite")
    assert "output_dir must be new, empty or a run's, got run with thesis.tex" in output
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years"


def test_a_failed_run_keeps_the_metrics_so_far(cli, tmp_path):
    output = cli.refused("finetune", *LEARN, "train.lr=1e30", "train.schedule=constant")
    assert "the loss must stay finite" in output
    assert "Traceback" not in output
    assert '"step": 1,' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "nowhere.yaml"], "must be a YAML file that exists, got nowhere.yaml: no such file"),
        (["train", "--config", "broken.yaml"], "broken.yaml:3:1: broken YAML"),
        (["train", "mask.keep_ratio=1.5"], "keep_ratio must lie in [0, 1], got 1.5"),
        (["train", "model.name=./nowhere"], "model.name must be a model that exists, got './nowhere'"),
        (["train", "data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "mask.layers_to_transform=9"], "layers_to_transform"),
        (["train", "mask.target_modules=[q_prj]"], "q_proj"),
        (["evaluate", "--split", "train"], "--split must be validation or test, got 'train'"),
        (["evaluate", "--masks", "nowhere"], "nowhere"),
        (["merge", "nowhere", "merged"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_told_in_one_message(cli, tmp_path, arguments, message):
    (tmp_path / "broken.yaml").write_text("train:\n  lr: [1\n")
    output = cli.refused(*arguments)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "argument", "message"),
    [
        *((verb, "data.source=nowhere.jsonl", "nowhere.jsonl") for verb in ("finetune", "train", "evaluate")),
        *((verb, "data.source=bad.jsonl", "bad.jsonl:2: text") for verb in ("train", "evaluate", "sensitivity")),
        *((verb, "mask.target_modules=[q_prj]", "did you mean q_proj?") for verb in ("train", "sensitivity")),
    ],
)
def test_what_is_wrong_is_told_before_a_weight_is_read(cli, tmp_path, monkeypatch, verb, argument, message):
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the base is loaded"))
    (tmp_path / "bad.jsonl").write_text('{"text": "1 2"}\n{"text": 3}\n{"text": "4"}\n')
    options = ["--config", "config.yaml"] if verb == "sensitivity" else []
    output = cli.refused(verb, *options, argument)
    assert message in output


def test_flips_of_runs_are_drawn_from_their_metrics(cli, tmp_path):
    for seed in (0, 1):
        output = cli.done("train", *LEARN, f"output_dir=run{seed}", "--set", "mask.init=magnitude")
    curve = read_flips(tmp_path / "run0" / "metrics.jsonl")
    assert curve.steps == [1, 2, 3, 4]
    assert f"{100 * read_flips(tmp_path / 'run1' / 'metrics.jsonl').from_start[-1]:.2f} % of the mask's bits" in output
    cli.done("plot", "flips", "run0", "run1", "--output", "flips.png")
    assert (tmp_path / "flips.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.done("plot", "flips", "run0", "run1") == "written: run0/flips.png\n"
    check_run_directory("run0", overwrite=True)  # the picture belongs to the run
    output = cli.refused("plot", "flips", "run0", "nowhere")
    assert "a directory must be the output_dir of mft train, got one without nowhere/metrics.jsonl" in output
    (tmp_path / "run1" / "metrics.jsonl").write_text("")
    output = cli.refused("plot", "flips", "run1")
    assert "a run must have counted flips to plot them, got none in run1/metrics.jsonl" in output


def test_sensitivity_ranks_layers_and_writes_table_and_plot(cli, tmp_path):
    output = cli.done("sensitivity", "--config", "config.yaml", *LEARN)
    rows = json.loads((tmp_path / "run" / "table.json").read_text())
    assert sorted(row["group"]["name"] for row in rows) == ["layer 2", "layer 3"]  # of mask.layers_to_transform
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)
    assert "| layer 2 |" in (tmp_path / "run" / "table.md").read_text()
    assert (tmp_path / "run" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "of the 2 groups" in output or "of 2 groups gain" in output
    output = cli.refused("sensitivity", "--config", "config.yaml", *LEARN, "--layers", "0", "--overwrite")
    assert "greater than or equal to 1" in output
