"""mft compare --fine-tunes-of: equal fine-tunes are taken and reported, all others are refused, nothing is lost."""

import pytest
from tiny_study import FEW, make_study, run_quietly, write_ground
from typer.testing import CliRunner

from mft.cli.app import app


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a study that ran."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("study")
        patch.setenv("MFT_CACHE", str(directory / "cache"))
        write_ground(directory)
        run_quietly(make_study(directory, FEW, ["seeds=[0]"]), directory / "run")
    return directory


def compare(directory, *more):
    config = ["--config", str(directory / "study.yaml"), "seeds=[0]"]
    return CliRunner().invoke(app, ["compare", *config, *map(str, more)])


@pytest.mark.slow
def test_the_fine_tunes_of_another_study_are_taken_up(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("MFT_CACHE", str(finished / "cache"))
    (tmp_path / "other").mkdir()  # an empty directory counts as none
    more = ["arms.MFT.lrs=[2e-2]", f"output_dir={tmp_path / 'other'}", "--fine-tunes-of", finished / "run"]
    result = compare(finished, *more)
    assert result.exit_code == 0, result.output
    runs = len(list((finished / "run" / "units" / "count" / "full").glob("*.json")))
    assert f"fine-tunes: {runs} runs of" in result.output
    trained = [line for line in result.output.splitlines() if "full, lr" in line and "on test" not in line]
    assert trained == []
    again = compare(finished, *more)  # continues with its own fine-tunes
    assert again.exit_code == 0, again.output
    assert "has begun and continues with its own" in " ".join(again.output.split())


def test_what_differs_or_is_no_study_is_refused_and_nothing_is_made(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("MFT_CACHE", str(finished / "cache"))
    new = f"output_dir={tmp_path / 'new'}"
    for more, said in (
        ([new, "full.warmup_ratio=0.5", "--fine-tunes-of", finished / "run"], "--fine-tunes-of must hold fine-tunes"),
        ([new, "--fine-tunes-of", tmp_path], "--fine-tunes-of must be the output_dir of a study"),
        ([new, "--overwrite", "--fine-tunes-of", finished / "run"], "--fine-tunes-of must not come with --overwrite"),
    ):
        result = compare(finished, *more)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())
        assert not (tmp_path / "new").exists()
