"""mft compare --on ray: actors find the same as local workers, and a killed actor is replaced."""

import io
import os
import signal
import threading

import pytest
from joiners import facts, results_in, until
from rich.console import Console
from tiny_study import FEW, equal, make_study, new_ground

from mft_study.shared import on_ray as module
from mft_study.study_run import run_study

ray = pytest.importorskip("ray", reason="needs ray, which make dev does not install")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    with new_ground(tmp_path_factory) as directory:
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        yield directory
        ray.shutdown()


def on_ray(ground, directory, said=None):
    console = Console(file=said or io.StringIO(), width=200)
    return run_study(make_study(ground, FEW, ["workers=2"]), directory, console=console, on="ray")


def test_actors_find_what_one_process_finds_though_one_is_killed(ground, tmp_path, monkeypatch):
    numbers, new = [], module._Actors._new

    def new_and_noted(self):
        actor = new(self)
        numbers.append(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))
        return actor

    def kill():
        until(lambda: results_in(tmp_path / "ray"), "a result is there")
        os.kill(numbers[0], signal.SIGKILL)

    monkeypatch.setattr(module._Actors, "_new", new_and_noted)
    killer = threading.Thread(target=kill)
    killer.start()
    on_ray(ground, tmp_path / "ray")
    killer.join()
    assert len(numbers) == 3, "nobody replaced the actor that was killed"
    assert equal(facts(ground, tmp_path / "ray"), facts(ground, tmp_path / "alone"))


def test_an_interrupted_study_keeps_what_was_finished(ground, tmp_path):
    said = io.StringIO()

    def interrupt():
        until(lambda: results_in(tmp_path / "run"), "a result is there")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        on_ray(ground, tmp_path / "run", said)
    assert "units are kept in" in said.getvalue()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "units").glob("*/*/*.json")}
    assert kept
    on_ray(ground, tmp_path / "run")
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in kept}.items()
