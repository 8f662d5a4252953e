"""mft plot: pictures from a finished study's files, and its messages for an unfinished or a wrong one."""

import pytest
import torch
from tiny_run import refused, succeed
from tiny_study import FEW, make_study, run_quietly

from mft_study.outcome import Unit
from mft_study.report.pictures import figures
from mft_study.report.pictures.figures import draw_overlap, draw_surface
from mft_study.report.pictures.forgetting import curves
from mft_study.report.table import study_numbers, study_tables
from mft_study.report.verdict import study_verdicts
from mft_study.report.write import write_study_report

ARMS = (
    FEW
    + """  MFT 2: {kind: mask, lrs: [1e-2], keep_ratios: [0.8]}
  part of control: {kind: interpolated, of: control, alphas: [0.5]}
general:
  other: {source: DIRECTORY/data.jsonl, sequence_length: 8, max_eval_tokens: 64}
"""
)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def study(ground):
    """Return the directory of a finished study, and its findings."""
    findings, _ = run_quietly(make_study(ground, ARMS.replace("DIRECTORY", str(ground))), ground / "run")
    write_study_report(findings, ground / "run", {})
    return ground / "run", findings


@pytest.mark.slow
@pytest.mark.parametrize("what", ["surface", "overlap", "summary", "bytes", "forgetting"])
def test_each_picture_is_drawn_from_the_command_line(study, tmp_path, what):
    picture = tmp_path / "picture.png"
    options = ["--points", "3", "--rows", "4"] if what == "surface" else []
    assert "written: " in succeed("plot", what, study[0], "--output", picture, *options)
    assert picture.read_bytes()[:4] == PNG


@pytest.mark.slow
def test_a_study_that_ran_has_its_curves_and_a_verdict_of_dominance(study):
    _, findings = study
    (curve,) = curves(study_numbers(findings)["domains"]["count"], "other", 0)
    assert list(curve.by_alpha) == [0, 0.5, 1]
    seen = {outcome.unit: outcome for outcome in findings.outcomes}
    end, start = (seen[Unit("count", arm, 0, findings.chosen["count"][arm])] for arm in ("control", "full"))
    losses = [(outcome.general["other"].evaluation.loss, outcome.loss) for outcome in (end, start)]
    assert curve.by_alpha[1] == pytest.approx([one - other for one, other in zip(*losses)])
    compared = study_tables(findings)["count"].comparisons
    pairs = [(arm, rival) for arm in ("MFT", "MFT 2") for rival in ("full", "control", "part of control")]
    assert [(one.arm, one.rival) for one in compared] == pairs
    assert None not in [
        validation for one in compared for validation in (one.domain.validation, one.general.validation)
    ]
    assert study_verdicts(findings)[0].startswith("count, and what is left of other. MFT: nothing can be concluded (")


def test_the_surface_has_the_losses_that_the_study_measured(study, tmp_path, monkeypatch):
    directory, findings = study
    drawn = {}
    monkeypatch.setattr(figures, "plot_surfaces", lambda surfaces, path: drawn.update(surfaces))
    monkeypatch.setattr(figures, "REACH", 1.0)  # then the grid has a point at each mark of the random planes
    draw_surface(directory, tmp_path / "unused.png", rows=1000, points=3)
    measured = {arm: findings.validation["count"][arm][0].evaluation.loss for arm in ("full", "MFT")}
    for arm, loss in measured.items():
        surface = drawn[f"round {arm}"]
        assert surface.marks == {arm: (0.0, 0.0)}
        assert surface.losses[1, 1].item() == pytest.approx(loss, abs=1e-6)
        assert surface.losses.unique().numel() > 1


def test_the_overlap_is_of_the_weights_that_the_masks_dropped(study, tmp_path, monkeypatch):
    directory, _ = study
    found = {}
    monkeypatch.setattr(figures, "plot_overlaps", lambda overlaps, path, title: found.update(overlaps))
    kept = []
    real = figures.overlaps
    monkeypatch.setattr(figures, "overlaps", lambda sets: kept.append(sets) or real(sets))
    draw_overlap(directory, tmp_path / "unused.png")
    assert list(found) == [("count, seed 0", "count, seed 1")]
    for dropped in kept[0].values():
        assert torch.stack([mask.float().mean() for mask in dropped.values()]).mean() == pytest.approx(0.1, abs=0.01)
    assert 0 < found["count, seed 0", "count, seed 1"].jaccard <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["contours"], "the plot must be one of summary, bytes, forgetting, surface, overlap, flips, got 'contours'"),
        (["surface", "--domain", "cont"], "--domain must be one of count, got 'cont'; did you mean count"),
        (["overlap", "elsewhere"], "overlap must be drawn from one directory, got 2"),
        (["surface", "--arm", "control"], "--arm must be one of MFT, MFT 2, got 'control'"),
    ],
)
def test_a_wrong_request_says_so(study, arguments, message):
    what, *options = arguments
    assert message in " ".join(refused("plot", what, study[0], *options).split())


@pytest.mark.parametrize("text", ["[]", "{", '{"arms": []}', '{"domains": []}'])
def test_a_table_that_is_no_studys_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    assert "table" in refused("plot", "summary", tmp_path)


def test_an_unfinished_study_is_refused(study, tmp_path):
    directory, _ = study
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.yaml").write_text((directory / "study.yaml").read_text())
    with pytest.raises(ValueError, match="the study must be finished, MFT on count is not: run mft compare"):
        draw_overlap(tmp_path / "run", tmp_path / "unused.png")
