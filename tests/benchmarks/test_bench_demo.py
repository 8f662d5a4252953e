"""The benchmark of the demo: what of a finished one is profiled, and how shares are counted."""

import io

import torch
from tiny_study import make_study, write_ground

from benchmarks import bench_demo
from benchmarks.step_profile import REST
from mft.study.report.finished import opened
from mft.study.run import run_study
from mft.training.console import new_console


def test_all_that_the_demo_trained_and_tested_is_in_its_shares(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_ground(tmp_path)
    run_study(make_study(tmp_path, overrides=["seeds=[0]"]), tmp_path / "run", console=new_console(io.StringIO()))
    profiled = []
    monkeypatch.setattr(
        bench_demo, "profile_step", lambda work: profiled.append(work()) or {"products": 1.0, REST: 3.0}
    )
    with opened(tmp_path / "run") as finished, torch.enable_grad():
        found = bench_demo.shares(finished)
    assert [one.unit.arm for one in profiled] == ["full", "control", "MFT", "MFT"]
    assert (found["products"], found[REST], sum(found.values())) == (0.25, 0.75, 1.0)
