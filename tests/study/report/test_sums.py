"""Intervals recomputed from the sums per document, by the report's code and by numpy only, against table.json."""

import dataclasses
import json
import types
import zipfile

import numpy as np
import pytest
from test_dominance import findings as findings_with_texts
from test_study_report import findings

from benchmarks import recompute
from mft_study.arms.setting import Setting
from mft_study.evidence.sums import read_sums
from mft_study.report.dominance import draws_of
from mft_study.report.statistics import METRICS, paired
from mft_study.report.sums import recomputed
from mft_study.report.write import write_study_report

_OF_A_PAIR = ("estimate", "low", "high", "p", "seeds", "documents")  # Holm's p needs the whole family


def written(found, directory):
    """Write a report; return (a domain of table.json, its sums, the directory)."""
    write_study_report(found, directory)
    table = json.loads((directory / "table.json").read_text())["domains"]["code"]
    return types.SimpleNamespace(table=table, sums=read_sums(directory / "sums.npz"), directory=directory)


def same(stored, again):
    found = dataclasses.asdict(again)
    assert {name: found[name] for name in _OF_A_PAIR} == pytest.approx({n: stored[n] for n in _OF_A_PAIR}, rel=1e-9)
    return True


@pytest.fixture(scope="module")
def with_answers(tmp_path_factory):
    return written(findings(answers=0.4), tmp_path_factory.mktemp("with_answers"))


@pytest.fixture(scope="module")
def with_texts(tmp_path_factory):
    return written(findings_with_texts(), tmp_path_factory.mktemp("with_texts"))


@pytest.mark.parametrize("metric", METRICS)
def test_each_interval_of_the_table_is_recomputed_from_stored_sums(with_answers, metric):
    compared = [row for row in with_answers.table["rows"] if row["minus_control"]]
    assert len(compared) > 3
    for row in compared:
        again = recomputed(with_answers.sums, "code", row["arm"], row["against"], metric)
        assert same(row["minus_control"][metric], again), row["arm"]


def test_the_base_model_is_one_for_all_seeds(with_answers):
    (row,) = [row for row in with_answers.table["rows"] if row["arm"] == "base"]
    again = recomputed(with_answers.sums, "code", "base", with_answers.table["full"])
    assert again.seeds == 3
    assert same(row["minus_full"], again)


def test_intervals_on_general_texts_and_of_dominance_are_recomputed(with_texts):
    table, sums = with_texts.table, with_texts.sums
    for row in table["rows"]:
        stored = row["general"]["other"]
        for name, other in (("minus_full", table["full"]), ("minus_start", row["start"])):
            if stored[name] is not None:
                assert same(stored[name], recomputed(sums, "code", row["arm"], other, text="other"))
    draws = draws_of(2 * len(table["comparisons"]))
    for one in table["comparisons"]:
        for loss, text in (("domain", None), ("general", one["text"])):
            again = recomputed(sums, "code", one["arm"], one["rival"], text=text, draws=draws)
            assert same(one[loss]["difference"], again)


def test_intervals_at_equal_budgets_are_recomputed(with_answers):
    compared = [one for one in with_answers.table["equal_budgets"] if one["difference"] is not None]
    assert compared
    for one in compared:
        sides = ("arm", "setting"), ("control", "control_setting")
        names = [f"{one[arm]}, {Setting(**one[setting])}" for arm, setting in sides]
        assert same(one["difference"], recomputed(with_answers.sums, "code", *names, split="validation"))


def test_sums_give_back_the_means_of_the_table_on_both_splits(with_texts):
    for row in with_texts.table["rows"]:
        runs, on_text = (with_texts.sums.runs("code", row["arm"], text=text) for text in (None, "other"))
        assert sum(run.evaluation.loss for run in runs.values()) / len(runs) == pytest.approx(row["loss"], abs=1e-6)
        kl = sum(run.mean_kl for run in on_text.values()) / len(on_text)
        assert kl == pytest.approx(row["general"]["other"]["kl"], abs=1e-6)
        if row["against"] is not None and row["validation"] is not None:
            again = recomputed(with_texts.sums, "code", row["arm"], row["against"], split="validation")
            assert again.estimate == pytest.approx(row["validation"], abs=1e-6)
    on_validation = with_texts.sums.runs("code", "MFT", text="other", split="validation")
    assert sorted(on_validation) == [0, 1, 2]


@pytest.mark.slow
def test_a_document_is_named_by_its_hash_so_that_studies_can_be_joined(tmp_path):
    one = findings_with_texts()
    one.documents = {("code", "test", "code"): {n: 1000 - n for n in range(30)}}
    held = written(one, tmp_path).sums
    assert held.arrays["code/test/code/documents"].tolist() == list(range(1000, 970, -1))
    others = written(findings_with_texts(), tmp_path).sums.runs("code", "MFT")
    with pytest.raises(ValueError, match="must be measured on the same documents"):
        paired(held.runs("code", "MFT"), others)


def test_the_file_is_small_and_the_same_each_time(tmp_path):
    found = findings(documents=500)
    first, second = (written(found, tmp_path / name).directory / "sums.npz" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    held = read_sums(first)
    numbers = sum(
        array.size for name, array in held.arrays.items() if name.endswith(("/loss", "/tempered", "/correct"))
    )
    assert first.stat().st_size < 3.5 * numbers
    assert "sums" not in json.loads((tmp_path / "a" / "table.json").read_text())["domains"]["code"]


def test_what_the_file_does_not_hold_is_refused_by_name(with_texts, tmp_path):
    with pytest.raises(ValueError, match="must hold sums of the arm 'MTF' at code/test/code, got MFT, base, control, "):
        recomputed(with_texts.sums, "code", "MTF", "control")
    with pytest.raises(ValueError, match="at code/test/else, got none of any arm"):
        recomputed(with_texts.sums, "code", "MFT", "control", text="else")


def zipped(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "content")


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: zipped(path, "notes.txt"), "an archive with notes.txt"),
        (lambda path: np.savez(path, a=np.array([{}], dtype=object)), "an archive that cannot be read"),
    ],
)
def test_another_file_is_refused(make, got, tmp_path):
    path = tmp_path / "sums.npz"
    make(path)
    with pytest.raises(ValueError, match=rf"sums.npz must be the sums.npz of a study, got {got}"):
        read_sums(path)


@pytest.mark.parametrize("arm", ["base", "full fine-tune", "MFT", "MFT x3"])
def test_numpy_alone_finds_the_reports_interval(with_answers, arm):
    row = next(row for row in with_answers.table["rows"] if row["arm"] == arm)
    arrays = np.load(with_answers.directory / "sums.npz")
    again = recompute.difference(arrays, "code/test/code", arm, row["against"])
    stored = row["minus_control"]["loss"]
    assert again == pytest.approx({name: stored[name] for name in _OF_A_PAIR}, rel=1e-9)
