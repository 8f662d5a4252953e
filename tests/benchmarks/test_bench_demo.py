"""Where the demo's time goes: each run and each evaluation on test counts as the one of its kind that is profiled."""

import io

import torch
from tiny_study import make_study, write_ground

from benchmarks import bench_demo
from benchmarks.step_profile import REST
from mft.study.report.finished import opened
from mft.study.run import run_study
from mft.tracking.console import new_console


def test_all_that_the_demo_trained_and_tested_is_in_its_shares(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_ground(tmp_path)
    run_study(make_study(tmp_path, overrides=["seeds=[0]"]), tmp_path / "run", console=new_console(io.StringIO()))
    ran = []

    def profiled(work):
        ran.append(work())
        return {"products": 1.0, REST: float(len(ran))}

    monkeypatch.setattr(bench_demo, "profile_step", profiled)
    with opened(tmp_path / "run") as finished, torch.enable_grad():
        found = bench_demo.shares(finished)
    assert [one.unit.arm for one in ran] == ["full", "control", "MFT", "MFT"]
    times = [2, 1, 2, 3]  # as many runs, and three arms that are tested
    products, rest = sum(times), sum(n * seconds for seconds, n in enumerate(times, 1))
    assert found["products"] == products / (products + rest)
    assert found[REST] == rest / (products + rest)
