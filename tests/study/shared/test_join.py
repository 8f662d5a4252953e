"""Processes that join one study find what one process finds, each result once, even if some of them are killed."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from joiners import facts, finish, results_in, start, told, until
from rich.console import Console
from tiny_study import FEW, equal, make_study

from mft.files.atomic import NotWritten
from mft_study import workers
from mft_study.arms.setting import Setting
from mft_study.evidence.host import this_host
from mft_study.outcome import Outcome, Unit, outcome_from, outcome_values
from mft_study.report.remarks import _places
from mft_study.shared.leases import FOLDER, Leases, Pace, _process
from mft_study.store import ALIKE, Store, open_store
from mft_study.study_run import run_study

PACE = Pace(beat=0.1, expiry=1.0, look=0.1)


@pytest.fixture(scope="module")
def alone(ground, tmp_path_factory):
    """Return what one process finds, and its directory; tests that write there take a copy."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    return facts(ground, directory), directory


def children_of(process):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [int(path.parent.name)] if path.read_text().rpartition(")")[2].split()[1] == str(process) else []
    return found


def joined(ground, directory, *overrides, **options):
    console = Console(file=io.StringIO(), width=200)
    study = make_study(ground, FEW, overrides)
    return run_study(study, directory, console=console, joins=True, pace=PACE, **options)


def assert_as_alone(ground, directory, alone):
    """Assert that the study found the same bits as one process, each result once."""
    assert equal(facts(ground, directory), alone[0])
    assert len(told(directory)) == len(set(told(directory))) <= len(results_in(directory)) == 14


@pytest.mark.slow
def test_two_that_join_find_what_one_finds_with_clocks_that_differ_by_a_minute(ground, alone, tmp_path):
    directory = tmp_path / "run"
    finish(ground, directory, [start(ground, directory, skew=skew) for skew in (0.0, 60.0)])
    assert_as_alone(ground, directory, alone)
    assert not (directory / FOLDER).exists()
    assert (directory / "table.json").is_file()


@pytest.mark.slow
def test_one_killed_before_its_weights_are_in_place_is_replaced_to_the_same_bits(ground, alone, tmp_path):
    """The command joiners.py makes more kills."""
    directory = tmp_path / "run"
    killed = start(ground, directory, stage="after a result", call=2, foreign=True)
    killed.join(120)
    assert killed.exitcode == -9
    finish(ground, directory, [start(ground, directory)])
    assert_as_alone(ground, directory, alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["after a claim", "before a result", "after a result", "while it is reported"])
def test_one_that_hung_while_others_went_on_wakes_up_and_adds_nothing(ground, alone, tmp_path, stage):
    directory = tmp_path / "run"
    hung = start(ground, directory, stage=stage, number=signal.SIGSTOP)
    until(lambda: _process(hung.pid)[1] == "T", "it stopped")
    finish(ground, directory, [start(ground, directory)])
    before = told(directory)
    os.kill(hung.pid, signal.SIGCONT)
    finish(ground, directory, [hung])
    assert told(directory) == before
    assert not list(directory.rglob(".*"))
    assert_as_alone(ground, directory, alone)


@pytest.mark.slow
def test_a_killed_pool_leaves_no_process_and_another_pool_finds_the_same_bits(ground, alone, tmp_path):
    directory = tmp_path / "run"
    one, other = (start(ground, directory, workers=2) for _ in range(2))
    until(lambda: len(children_of(one.pid)) >= 2 and told(directory), "two workers work")
    children = children_of(one.pid)
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not any(_process(child)[1] for child in children), "its workers ended")
    finish(ground, directory, [other])
    assert_as_alone(ground, directory, alone)


def test_scratch_files_of_the_dead_are_deleted_and_those_of_the_living_are_not(ground, alone, tmp_path):
    directory = shutil.copytree(alone[1], tmp_path / "run")
    kept, *gone = [
        directory / "trained" / "count" / "MFT" / name
        for name in (
            ".aaaa.safetensors.01234567.tmp",
            ".bbbb.safetensors.01234567.tmp",
            "..cccc.safetensors.01234567.tmp.abcdefgh.tmp",
            ".aaa.safetensors.01234567.tmp",
        )
    ]
    for path in (kept, *gone):
        path.write_bytes(b"half")
    base = directory / ".base.01234567.tmp"
    base.mkdir()
    weights = set(directory.glob("trained/*/*/[!.]*"))
    with Leases(directory, pace=PACE) as living:
        assert living.take("aaaa")
        joined(ground, directory)
        assert kept.exists()
        assert not any(path.exists() for path in (*gone, base))
    joined(ground, directory)
    assert not kept.exists()
    assert set(directory.glob("trained/*/*/[!.]*")) == weights


def test_one_that_joins_a_study_that_is_done_runs_nothing(ground, alone):
    directory = alone[1]
    before = {path: path.stat().st_mtime_ns for path in directory.glob("units/*/*/*")}
    joined(ground, directory)
    assert before == {path: path.stat().st_mtime_ns for path in directory.glob("units/*/*/*")}


def test_another_declaration_is_refused_while_others_work(ground, alone, tmp_path):
    directory = shutil.copytree(alone[1], tmp_path / "run")
    with open_store(make_study(ground), directory, joins=True, pace=PACE):
        with pytest.raises(
            ValueError, match=r"--join must have the same configuration .*, see .*study.yaml; changed: seeds: "
        ):
            joined(ground, directory, "seeds=[0,1,2]")
        joined(ground, directory, "workers=2")
    assert len(joined(ground, directory, "seeds=[0,1,2]").tested) == 9


@pytest.mark.parametrize(
    ("section", "name", "remedy"),
    [
        ("versions", "torch", "install those, or name another output_dir"),
        ("data", "count", "copy the same data to every machine, or name another output_dir"),
    ],
)
def test_other_packages_and_data_are_refused(ground, alone, tmp_path, section, name, remedy):
    directory = shutil.copytree(alone[1], tmp_path / "run")
    noted = json.loads((directory / ALIKE).read_text())
    noted[section][name] = "another"
    (directory / ALIKE).write_text(json.dumps(noted))
    words = rf"--join must have the {section} of the process that began .*{name} another; got .*: {remedy}$"
    with pytest.raises(ValueError, match=words):
        joined(ground, directory)
    facts(ground, directory)  # a process alone may go on elsewhere; its report says so


@pytest.mark.parametrize("is_older", [False, True], ids=["", "without a checksum"])
@pytest.mark.parametrize("folder", ["units", "test"])
def test_a_file_with_another_units_result_is_named(ground, alone, tmp_path, monkeypatch, folder, is_older):
    directory = shutil.copytree(alone[1], tmp_path / "run")
    path, other = sorted(directory.glob(f"{folder}/*/MFT/*.json"))[:2]
    values = json.loads(other.read_text())
    if is_older:
        del values["checksum"]
    path.write_text(json.dumps(values))
    looks, real = itertools.count(), Store.outcomes
    monkeypatch.setattr(Store, "outcomes", lambda store: real(store) if next(looks) < 50 else pytest.fail("no end"))
    found = "the result of count, MFT, .* in place of count, MFT, " if is_older else "another unit's, or changed values"
    with pytest.raises(ValueError, match=rf"{path} must be the JSON that was written, got {found}.*: delete it to run"):
        joined(ground, directory)


def test_a_study_from_another_processor_is_refused_if_it_is_to_be_the_same(ground, alone, tmp_path):
    directory = shutil.copytree(alone[1], tmp_path / "run")
    joined(ground, directory, same_processor=True)
    path = next(directory.glob("units/*/control/*.json"))
    values = json.loads(path.read_text())
    values["where"]["instructions"] = "avx2"
    del values["checksum"]  # as in older files
    path.write_text(json.dumps(values))
    words = r"--same-processor must run where .*: count, control, .* ran on .* \(avx2\), host .*, got .*: start it on"
    with pytest.raises(ValueError, match=words):
        joined(ground, directory, same_processor=True)
    (warning,) = _places(joined(ground, directory))
    assert warning.startswith("Warning: runs and tests were made on 2 kinds of processor (")


def test_where_a_unit_ran_is_kept_and_older_files_do_without(alone):
    (path, *_) = alone[1].glob("units/*/*/*.json")
    values = json.loads(path.read_text())
    del values["checksum"]
    assert outcome_from(values).where == this_host()
    del values["where"]
    assert outcome_from(values).where is None
    outcome = Outcome(Unit("count", "base", 0, Setting()), None)
    assert outcome_from(outcome_values(outcome)) == outcome


@pytest.fixture
def unfinished(alone, tmp_path):
    """Return a directory in which the masks have to run again."""
    directory = shutil.copytree(alone[1], tmp_path / "run")
    for path in directory.glob("units/*/MFT/*.json"):
        path.unlink()
    return directory


def test_weights_that_another_has_deleted_are_planned_again(ground, alone, unfinished, monkeypatch):
    """Another process that chose a different setting meanwhile deletes them like this."""
    real, deleted = workers.run_job, []

    def run(workspace, job):
        if not deleted:
            deleted.append(job.starts[0])
            job.starts[0].unlink()
        return real(workspace, job)

    monkeypatch.setattr(workers, "run_job", run)
    findings = joined(ground, unfinished)
    assert deleted[0].is_file()
    assert len(findings.outcomes) == len(alone[0]["outcomes"])


def test_a_job_that_fails_after_another_process_took_over_its_claim_stops_nobody(
    ground, alone, unfinished, monkeypatch
):
    """The process had stopped for long, and the other one has deleted the file that it was writing."""
    real, lost = workers.run_job, []

    def run(workspace, job):
        if not lost:
            lost.append(job.trained.name.split(".")[1])
            (unfinished / FOLDER / f"{lost[0]}.2").write_text('{"host": "far", "process": 7}\n1\n')
            raise NotWritten("gone")
        return real(workspace, job)

    monkeypatch.setattr(workers, "run_job", run)
    findings = joined(ground, unfinished)
    assert len(findings.outcomes) == len(alone[0]["outcomes"])
    assert (unfinished / "units" / "count" / "MFT" / f"{lost[0]}.json").is_file()
