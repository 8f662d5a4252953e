"""mft compare --fine-tunes-of: equal fine-tunes are taken and reported, all others are refused, nothing is lost."""

import pytest
from tiny_run import refused, succeed
from tiny_study import FEW, make_study, run_quietly


@pytest.fixture(scope="module")
def compare(ground):
    """Return the arguments of mft compare on a study that ran in run/."""
    run_quietly(make_study(ground, FEW, ["seeds=[0]"]), ground / "run")
    return ["compare", "--config", ground / "study.yaml", "seeds=[0]"]


@pytest.mark.slow
def test_the_fine_tunes_of_another_study_are_taken_up(compare, ground, tmp_path):
    (tmp_path / "other").mkdir()  # an empty directory counts as none
    more = ["arms.MFT.lrs=[2e-2]", f"output_dir={tmp_path / 'other'}", "--fine-tunes-of", ground / "run"]
    output = succeed(*compare, *more)
    runs = len(list((ground / "run" / "units" / "count" / "full").glob("*.json")))
    assert f"fine-tunes: {runs} runs of" in output
    trained = [line for line in output.splitlines() if "full, lr" in line and "on test" not in line]
    assert trained == []
    again = succeed(*compare, *more)  # continues with its own fine-tunes
    assert "has begun and continues with its own" in " ".join(again.split())


def test_what_differs_or_is_no_study_is_refused_and_nothing_is_made(compare, ground, tmp_path):
    new = f"output_dir={tmp_path / 'new'}"
    for more, said in (
        ([new, "full.warmup_ratio=0.5", "--fine-tunes-of", ground / "run"], "--fine-tunes-of must hold fine-tunes"),
        ([new, "--fine-tunes-of", tmp_path], "--fine-tunes-of must be the output_dir of a study"),
        ([new, "--overwrite", "--fine-tunes-of", ground / "run"], "--fine-tunes-of must not come with --overwrite"),
    ):
        assert said in " ".join(refused(*compare, *more).split())
        assert not (tmp_path / "new").exists()
