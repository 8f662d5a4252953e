"""mft demo on a tiny study: what it leaves, what it checks, and how it goes on."""

import re

import pytest
import torch
from tiny_study import FEW, make_study, write_ground

from mft.cli import demo
from mft.cli.demo import demo_study, run_demo
from mft.config import ModelConfig
from mft.config_file import load_config
from mft.models.pretrained import load_model
from mft.study import workers
from mft.study.report.finished import opened

LEFT = {"base", "config.yaml", "masks", "model", "plot.png", "table.json", "table.md"}
LEFT |= {"study.yaml", "test", "trained", "units"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Of one seed, in tmp_path/run; what is written needs no words that the tiny tokenizer lacks."""
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "PROMPT", "1 2 3")
    write_ground(tmp_path)
    return make_study(tmp_path, FEW.replace("lrs: [1e-2, 3e-2]", "lrs: [1e-2], keep_ratios: [0.8, 0.9]"), ["seeds=[0]"])


def test_the_demo_leaves_the_study_and_its_mask_as_a_run(study, tmp_path, capsys):
    run_demo(study)
    printed = capsys.readouterr().out
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == LEFT
    config = load_config(run / "config.yaml")
    with opened(run) as finished:
        chosen, dropped = finished.chosen("count", "MFT"), finished.dropped("count", "MFT", 0)
    assert (config.output_dir, config.memory, config.model.name) == (str(run), "plain", str(run / "base"))
    assert (config.mask.init, config.mask.keep_ratio, config.train.lr) == ("magnitude", chosen.keep_ratio, 1e-2)
    total = sum(weight.numel() for weight in load_model(ModelConfig(str(run / "model")))[0].parameters())
    gone = sum(int(mask.sum()) for mask in dropped.values())
    assert f"bit-equal: all {total:,} weights read back as written; {gone:,} of them were set to 0" in printed
    assert re.search(r"^1 2 3 \d", printed, re.MULTILINE)
    assert "A single seed: the intervals know of documents only" in " ".join(printed.split())


def test_an_unfinished_demo_goes_on_and_a_finished_one_begins_anew(study, tmp_path, monkeypatch):
    ran, real, run = [], workers._run, tmp_path / "run"
    monkeypatch.setattr(workers, "_run", lambda workspace, job: ran.append(job.unit) or real(workspace, job))
    with monkeypatch.context() as patch:
        patch.setattr(demo, "save_masks", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_demo(study)
    units = len(ran)
    (run / ".masks.abcdefgh.tmp").mkdir()  # as a killed one leaves it
    run_demo(study)
    assert len(ran) == units
    assert {path.name for path in run.iterdir()} == LEFT
    asked = []
    monkeypatch.setattr(demo, "run_compare", lambda study, *, overwrite: asked.append(overwrite))
    for overwrite in (None, False):
        run_demo(study, overwrite=overwrite)
    assert asked == [True, False]


def test_nothing_is_merged_of_a_model_that_does_not_load(study, tmp_path):
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tmp|model"):
        run_demo(study)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"study.yaml"}


def test_a_directory_of_something_else_is_refused(study, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)  # of which no study tells that it is the demo's
    for overwrite in (None, True):
        with pytest.raises(ValueError, match="output_dir must be new, empty or a study's, got .* with model"):
            run_demo(study, overwrite=overwrite)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["reloaded"], "the reloaded model must be bit-equal"),
        (["merged", "reloaded"], "must be the one that the test split saw"),
        (["merged", "reloaded", "tested"], "merging must keep weights or set them"),
    ],
)
def test_a_bit_that_differs_is_an_error(changed, message):
    models = {name: torch.nn.Linear(3, 2) for name in ("base", "tested", "merged", "reloaded")}
    for model in models.values():
        model.load_state_dict(models["base"].state_dict())
    assert "all 8 weights read back as written; 0 of them were set to 0" in demo._check_bits(**models)
    with torch.no_grad():
        for name in changed:
            models[name].weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=message):
        demo._check_bits(**models)


def test_the_shipped_study_is_tuned_on_both_sides(tmp_path):
    study = demo_study(tmp_path / "demo")
    assert (study.output_dir, study.model.name) == (str(tmp_path / "demo"), "smollm2-135m")
    assert len(study.arms["control"].settings(study.mask)) >= 3
    assert len(study.arms["MFT"].lrs) >= 3
