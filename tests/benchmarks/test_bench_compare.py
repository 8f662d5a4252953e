"""python -m benchmarks.compare: when a ratio is a regression, what is measured again, and what cannot be compared."""

import json
import subprocess

import pytest
from ratio_records import QUANTITY, record

from benchmarks import compare, harness
from benchmarks.records import file_name, select_records


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ((1.0, 0.01), (1.2, 0.01), "REGRESSION"),
        ((1.0, 0.01), (1.04, 0.01), ""),  # beyond the spreads, but below 5 %
        ((1.0, 0.15), (1.2, 0.10), ""),  # more than 5 %, but within the spreads
        ((1.2, 0.01), (1.0, 0.01), "better"),
    ],
)
def test_a_regression_exceeds_both_spreads_and_5_percent(before, now, verdict):
    (change,) = compare.compare(record(*before), record(*now))
    assert change.verdict == verdict


@pytest.mark.parametrize(("quantity", "unit"), [("LoRA / dense: forward", "x"), (QUANTITY, "ms"), ("ours", "x")])
def test_only_ratios_of_ours_are_compared(quantity, unit):
    assert compare.ratios(record(quantity=quantity, unit=unit)) == {}


def run_compare(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    return stopped.value.code


def write(folder, content, name="ops", instruction_set=None):
    folder.mkdir(exist_ok=True)
    path = folder / file_name(name, instruction_set or harness.instruction_set())
    own = {"instruction_set": instruction_set or harness.instruction_set()} | content["environment"]
    path.write_text(json.dumps(content | {"environment": own}))
    return folder


def answers_in_turn(monkeypatch, *medians, **environment):
    """Replace measuring: each question gets the next of these medians. Return the list of questions asked."""
    asked, left = [], list(medians)

    def answer(questions, *, quick):
        asked.append(questions)
        return {question: record(left.pop(0), **environment) for question in questions}

    monkeypatch.setattr(compare, "_answers", answer)
    return asked


def test_ratios_that_have_not_changed_are_not_listed(tmp_path, monkeypatch, capsys):
    answers_in_turn(monkeypatch, 1.0, 1.0)
    old = write(tmp_path / "old", record(1.0))
    assert run_compare(monkeypatch, old) == 0
    assert QUANTITY not in capsys.readouterr().out
    assert run_compare(monkeypatch, old, "--what", "ops", "scaling") == 1  # REF has no scaling
    assert run_compare(monkeypatch, old, "--what", "scaling") == 2


@pytest.mark.parametrize(("again", "code", "told"), [(1.5, 1, "REGRESSION"), (1.0, 0, "not repeated: 1.000")])
def test_what_seems_worse_is_measured_again_and_decides_if_it_repeats(tmp_path, monkeypatch, capsys, again, code, told):
    old = write(tmp_path / "old", record(1.0))
    asked = answers_in_turn(monkeypatch, 1.5, again)
    assert run_compare(monkeypatch, old) == code
    assert asked == [["ops"], ["ops"]]
    printed = capsys.readouterr().out
    assert QUANTITY in printed
    assert told in printed


@pytest.mark.parametrize(("ratio", "told"), [(1.5, "higher here"), (0.5, "lower here"), (1.0, "1 of 1 ratios within")])
def test_between_two_machines_nothing_is_concluded(tmp_path, monkeypatch, capsys, ratio, told):
    answers_in_turn(monkeypatch, ratio, device="b")
    assert run_compare(monkeypatch, write(tmp_path / "old", record(1.0, device="a"))) == 2
    printed = capsys.readouterr().out
    assert "!!! NOT THE SAME MACHINE: device was 'a' and is 'b'" in printed
    assert told in printed
    assert "REGRESSION" not in printed


def test_a_ref_is_a_commit_whose_results_are_read(tmp_path, monkeypatch):
    def git(*arguments):
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.parent.mkdir()
    write(results, record(2.0))
    git("init")
    git("add", ".")
    git("commit", "-m", "results")
    write(results, record(3.0))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "RESULTS", results)
    found = select_records(compare.read_ref("HEAD"), harness.instruction_set())
    assert found["ops"]["findings"][0]["measured"]["median"] == 2.0
    with pytest.raises(ValueError, match="REF must be a folder of results or a git ref, got 'nowhere'"):
        compare.read_ref("nowhere")
