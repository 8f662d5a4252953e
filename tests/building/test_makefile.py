"""The packages that make installs for each target, in order, and its output. Python is a script: none is installed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)


@pytest.fixture
def environment(tmp_path):
    """Make a virtual environment whose Python logs its arguments in python.log, and fails if fail's text is in them."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/python.log\n'
        f'case "$*" in *"$(cat {tmp_path}/fail)"*) echo "one.cpp:1: error: no"; exit 1;; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "fail").write_text("nothing fails")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "extras"),
    [
        *((target, ["train"]) for target in ("install", "demo", "cuda", "wheel")),
        *((target, ["train", "dev"]) for target in ("dev", "test", "lint", "docs", "bench")),
    ],
)
def test_a_target_installs_the_extras_that_it_needs(target, extras, tmp_path):
    planned = make("--dry-run", f"VENV={tmp_path}/new", target)
    assert planned.returncode == 0, planned.stderr
    assert [extra for extra in ("train", "dev") if f"building.requirements {extra}" in planned.stdout] == extras


def test_torch_comes_first_and_the_package_last(environment):
    done = make(f"VENV={environment}", "dev")
    assert done.returncode == 0, done.stderr
    words = (environment / "python.log").read_text()
    order = [
        "--no-compile torch",
        "setup.py",
        "--no-build-isolation -e .[train,compare,serve]",
        "building.requirements dev",
    ]
    assert [words.index(step) for step in order] == sorted(words.index(step) for step in order)
    assert words.index("--no-compile torch") < words.index("train.txt") < words.index("-e .[train,compare,serve]")
    assert "Nothing to be done" in make(f"VENV={environment}", "dev").stdout


@pytest.mark.parametrize("step", ["setup.py", "train.txt", "building.requirements train"])
def test_a_step_that_fails_ends_make_with_its_message_and_is_tried_again(environment, step):
    (environment / "fail").write_text(step)
    for _ in range(2):
        failed = make(f"VENV={environment}", "install")
        assert failed.returncode != 0
        assert "one.cpp:1: error: no" in failed.stdout + failed.stderr or step.startswith("building")
        assert "-e .[train" not in (environment / "python.log").read_text()
    (environment / "fail").write_text("nothing fails")
    assert make(f"VENV={environment}", "install").returncode == 0
