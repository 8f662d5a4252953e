"""A whole study finds the same if it is interrupted or has more workers; errors name the unit that failed."""

import io
import json
import multiprocessing
import os
import select
import shutil
import signal
import time

import numpy as np
import pytest
from rich.console import Console
from tiny_run import refused, succeed
from tiny_study import FEW, FULL, equal, make_study

from benchmarks import recompute
from mft_study import study_run, workers
from mft_study.arms.setting import Setting
from mft_study.bases import Bases
from mft_study.evidence.sums import read_sums
from mft_study.outcome import Unit
from mft_study.report.write import write_study_report
from mft_study.study_run import run_study
from mft_study.units.job import Job

SCRATCH = "scratch.vocab_size=300"
UNTRAINED = FULL + "  random: {kind: random}\n  temperature: {kind: temperature}\n"


class Runs:
    """Run studies on the ground in a directory of their own, and keep the console's output."""

    def __init__(self, ground, tmp_path):
        self.ground, self.directory = ground, tmp_path / "run"

    def __call__(self, *overrides, arms=FEW, **options):
        self.said = io.StringIO()
        console = Console(file=self.said, width=200)
        return run_study(make_study(self.ground, arms, overrides), self.directory, console=console, **options)

    @property
    def lines(self):
        return [line for line in self.said.getvalue().splitlines() if line.startswith("[")]


@pytest.fixture
def study(ground, tmp_path):
    return Runs(ground, tmp_path)


@pytest.fixture(scope="module")
def done(ground, tmp_path_factory):
    """Return a whole study and what it found; tests that write there take a copy."""
    runs, runs.order, real = Runs(ground, tmp_path_factory.mktemp("done")), [], workers.run_job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run_job", lambda space, job: runs.order.append(job.on_test) or real(space, job))
        runs.found = facts(runs())
    return runs


def facts(findings):
    """Return what was found, without times."""
    for outcome in findings.outcomes:
        outcome.seconds = 0.0
    return {name: vars(findings)[name] for name in ("outcomes", "chosen", "validation", "test", "notes")}


def stop_after(monkeypatch, count, error):
    """Raise error instead of running the count-th unit (from 0); return the units that ran."""
    ran, real = [], workers.run_job

    def run_or_stop(workspace, job):
        if len(ran) == count:
            raise error
        ran.append(job.unit)
        return real(workspace, job)

    monkeypatch.setattr(workers, "run_job", run_or_stop)
    return ran


@pytest.mark.slow
def test_an_interrupted_study_resumes_to_the_same_bits(study, done, monkeypatch):
    for count in (1, 4, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, count, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                study()
            assert "units are kept in" in study.said.getvalue()
            assert "the same command continues" in study.said.getvalue()
    resumed = study()
    assert len(study.lines) == len(done.lines) - 1 - 4 - 5
    assert equal(facts(resumed), done.found)
    assert resumed.test_openings == 1
    study()
    assert study.lines == []  # everything is done


@pytest.mark.slow
def test_two_processes_find_what_one_finds(study, done):
    two = facts(study("workers=2"))
    assert equal(two, done.found)


def test_leaders_can_be_asked_for_when_all_has_run(study, done, tmp_path):
    shutil.copytree(done.directory, study.directory)
    later = study("leaders.seeds=3", "leaders.arms=1")
    assert all(", seed 2" in line for line in study.lines)
    assert len(study.lines) == 2 * 2  # fine-tune and mask, trained and tested
    assert {arm: sorted(seeds) for arm, seeds in later.test["count"].items()} == {
        **{"full": [0, 1, 2], "MFT": [0, 1, 2], "control": [0, 1]}
    }
    write_study_report(later, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "8 documents, " in text
    assert ", 2 seeds (3 of full, MFT)\n" in text
    assert "What led on validation ran with 3 seeds" in text
    assert read_sums(tmp_path / "sums.npz").arrays["count/test/count/MFT/seeds"].tolist() == [0, 1, 2]


def test_nothing_sees_test_before_all_is_trained(done):
    assert done.order == sorted(done.order)
    assert done.order.count(True) == 3 * 2
    tested = done.found["test"]["count"]
    assert {(arm, *seeds) for arm, seeds in tested.items()} == {(arm, 0, 1) for arm in ("full", "control", "MFT")}


def test_base_stands_for_every_seed_and_lines_say_how_far_the_study_is(study):
    findings = study(arms="  base: {kind: base}\n" + UNTRAINED)
    assert findings.test["count"]["base"][0] is findings.test["count"]["base"][1]
    assert findings.chosen["count"]["base"] == Setting()
    (trained,) = (line for line in study.lines if "] count, full, lr 0.001, epochs 1, seed 0: validation " in line)
    assert "an hour, about" in trained
    every = len(study.lines)
    assert [line.split()[0] for line in study.lines] == [f"[{number + 1}/{every}]" for number in range(every)]
    assert "count, temperature, seed 1, on test: evaluated" in study.lines[-1]


def test_a_unit_that_fails_is_named_and_what_was_done_is_kept(study, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3, ValueError("the data is wrong"))
        with pytest.raises(RuntimeError, match=r"^count, control, lr 0.01, epochs 1, seed 0: the data is wrong$"):
            study()
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        study()
    assert "[4/" in study.lines[0]


def test_a_file_that_gives_another_model_is_found(study, done, monkeypatch):
    shutil.copytree(done.directory, study.directory)
    shutil.rmtree(study.directory / "test")
    monkeypatch.setattr(study_run, "_SAME", 0.0)
    with pytest.raises(RuntimeError, match="its file must give the validation loss that its run had"):
        study()


def test_trained_weights_that_were_lost_are_made_again(study, done):
    shutil.copytree(done.directory, study.directory)
    shutil.rmtree(study.directory / "trained")
    shutil.rmtree(study.directory / "test")
    again = study(arms=FEW)
    assert equal(facts(again), done.found)
    assert any("full, lr 0.01, epochs 1, seed 1: validation" in line for line in study.lines)


@pytest.fixture
def process(study, monkeypatch):
    """Yield (one worker process, a job whose fine-tune is missing); forked, as a fresh one imports for six seconds."""
    get_context = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: get_context("fork"))
    declared = make_study(study.ground)
    processes = workers._Processes(declared, Bases(declared, study.directory))
    yield processes, Job(Unit("count", "control", 0, Setting(1e-2, 1.0)), (study.directory / "x",), study.directory)
    processes.close()
    assert not any(worker.is_alive() for worker in processes._workers.values())


def test_a_process_that_fails_names_its_unit(process):
    processes, job = process
    processes.submit(job)
    with pytest.raises(RuntimeError, match="^count, control, lr 0.01, epochs 1, seed 0: No such file or directory"):
        processes.next()


@pytest.mark.parametrize("before", [True, False])
def test_a_process_that_is_killed_names_its_unit(process, before):
    processes, job = process
    (worker,) = processes._workers.values()
    if not before:
        processes.submit(job)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(RuntimeError, match="^count, control, lr 0.01, epochs 1, seed 0: its process ended .* -9"):
        processes.submit(job) if before else processes.next()


def test_processes_end_with_the_one_that_began_them(study, monkeypatch):
    declared, fork = make_study(study.ground), multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(workers, "Workspace", lambda *_: None)  # a fork of a process with threads cannot load a model
    monkeypatch.setattr(workers, "run_job", lambda *_: time.sleep(60))
    began, begin = os.pipe()
    ended, end = os.pipe()

    def parent():
        job = Job(Unit("count", "control", 0, Setting(1e-2, 1.0)), (), study.directory)
        workers._Processes(declared, Bases(declared, study.directory)).submit(job)
        os.write(begin, b".")
        time.sleep(60)

    killed = fork.Process(target=parent)
    killed.start()
    os.close(end)  # now only the two processes have it open
    os.read(began, 1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert select.select([ended], [], [], 20)[0], "a worker goes on without its parent"
    assert os.read(ended, 1) == b""


def test_the_command_writes_its_tables_and_continues(ground, done, tmp_path):
    shutil.copytree(done.directory, tmp_path / "run")
    make_study(ground)
    call = ["compare", "--config", str(ground / "study.yaml"), f"output_dir={tmp_path}/run"]
    output = succeed(*call)
    assert (tmp_path / "run" / "plot.png").is_file()
    text = (tmp_path / "run" / "table.md").read_text()
    assert "MFT - control" in text
    assert text.startswith("count: lowest test loss: ")
    assert "- Unsettled, the best setting lies at an end of its grid: count, full: " in text  # it has two rates
    assert f"files: {tmp_path}/run/" in output
    table = json.loads((tmp_path / "run" / "table.json").read_text())["domains"]["count"]
    (row,) = [row for row in table["rows"] if row["arm"] == "MFT"]
    arrays = np.load(tmp_path / "run" / "sums.npz")
    found = recompute.difference(arrays, "count/test/count", "MFT", "control")
    assert found == pytest.approx({name: row["minus_control"]["loss"][name] for name in found}, rel=1e-9)
    assert np.abs(arrays["count/test/count/documents"]).min() > 2**32  # hashes, not document numbers
    assert output.startswith("Nothing will be concluded on count: 8 test documents, at least 20 are needed")
    assert "[1/" not in output  # everything was done
    assert "stage.batch_size: 4 -> 2" in refused(*call, "stage.batch_size=2")
    assert "[1/" in succeed(*call, "--set", "stage.batch_size=2", "seeds=[0]", "--overwrite")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["domains.count.source=typo.jsonl"], "no such file or directory"),
        (["model.name=typo"], "typo"),
        (["mask.layers_to_transform=2-9"], "layers_to_transform"),
        ([SCRATCH, "domains.count.source=typo.jsonl"], "no such file or directory"),
        ([SCRATCH, "scratch.data.subset=typo"], "'typo'"),
    ],
    ids=["no data", "no model", "no such layer", "no data for a new model", "no data for its base"],
)
def test_a_wrong_study_writes_nothing_and_deletes_nothing(study, wrong, why):
    with pytest.raises((ValueError, OSError), match=why):
        study(*wrong)
    assert not study.directory.exists()
    study.directory.mkdir()
    (study.directory / "table.md").write_text("found")
    with pytest.raises((ValueError, OSError), match=why):
        study(*wrong, overwrite=True)
    assert [path.name for path in study.directory.iterdir()] == ["table.md"]


def test_a_full_arm_without_rates_is_the_model_as_it_comes(study):
    arms = "  base: {kind: base}\n  full: {kind: full}\n  control: {kind: control, lrs: [1e-2]}\n"
    found = study("seeds=[0]", arms=arms)
    base, full, control = found.outcomes
    assert (full.loss, full.bytes, full.steps) == (base.loss, 0, 0)
    assert control.loss < full.loss
    assert found.test["count"]["full"][0].evaluation.loss == found.test["count"]["base"][0].evaluation.loss
