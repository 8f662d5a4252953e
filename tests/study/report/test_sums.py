"""Intervals computed again from the sums per document that table.json holds."""

import dataclasses
import json

import pytest
from test_dominance import findings as findings_with_texts
from test_study_report import findings

from mft.study.report.dominance import draws_of
from mft.study.report.statistics import METRICS
from mft.study.report.sums import recomputed, recomputed_at_budget, runs_in
from mft.study.report.write import write_study_report

_OF_A_PAIR = ("estimate", "low", "high", "p", "seeds", "documents")  # what Holm's correction changes needs its family


def written(found, directory):
    write_study_report(found, directory)
    return json.loads((directory / "table.json").read_text())["domains"]["code"]


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
    compared = [row for row in with_answers["rows"] if row["minus_control"]]
    assert len(compared) > 3
    for row in compared:
        again = recomputed(with_answers, row["arm"], row["against"], metric)
        assert same(row["minus_control"][metric], again), row["arm"]


def test_the_base_model_is_one_for_all_seeds(with_answers):
    (row,) = [row for row in with_answers["rows"] if row["arm"] == "base"]
    again = recomputed(with_answers, "base", with_answers["full"])
    assert again.seeds == 3
    assert same(row["minus_full"], again)


def test_intervals_on_general_texts_and_of_dominance_are_recomputed(with_texts):
    for row in with_texts["rows"]:
        stored = row["general"]["other"]
        for name, other in (("minus_full", with_texts["full"]), ("minus_start", row["start"])):
            if stored[name] is not None:
                assert same(stored[name], recomputed(with_texts, row["arm"], other, text="other"))
    draws = draws_of(2 * len(with_texts["comparisons"]))
    for one in with_texts["comparisons"]:
        for loss, text in (("domain", None), ("general", one["text"])):
            again = recomputed(with_texts, one["arm"], one["rival"], text=text, draws=draws)
            assert same(one[loss]["difference"], again)


def test_intervals_at_equal_budgets_are_recomputed(with_answers):
    compared = [one for one in with_answers["equal_budgets"] if one["difference"] is not None]
    assert compared
    for one in compared:
        assert same(one["difference"], recomputed_at_budget(with_answers, one))


def test_sums_give_back_the_means_of_the_table(with_texts):
    for row in with_texts["rows"]:
        runs, on_text = runs_in(with_texts, row["arm"]), runs_in(with_texts, row["arm"], "other")
        assert sum(run.evaluation.loss for run in runs.values()) / len(runs) == pytest.approx(row["loss"], abs=1e-6)
        kl = sum(run.mean_kl for run in on_text.values()) / len(on_text)
        assert kl == pytest.approx(row["general"]["other"]["kl"], abs=1e-6)


def test_a_run_takes_a_line_per_kind_of_sum(tmp_path):
    write_study_report(findings(documents=49), tmp_path)
    lines = (tmp_path / "table.json").read_text().splitlines()
    numbers = [line.strip() for line in lines if line.strip().startswith('"loss_sums": ')]
    assert {line.count(",") for line in numbers} == {49, 30}  # test's documents and validation's, a comma after
    assert max(map(len, numbers)) < 49 * 14


def test_a_table_without_sums_is_refused():
    with pytest.raises(ValueError, match="must hold the sums per document of 'MFT' on test, got none: run mft compare"):
        recomputed({"rows": []}, "MFT", "control")
