"""Checks that other machines run: the workflow of continuous integration, and the hooks before a commit."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(JOB,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()


def oldest(requirement):
    return re.search(r">=([\d.]+)", requirement)[1]


def test_the_workflow_runs_what_ci_runs_on_the_oldest_and_on_the_newest():
    (torch,) = (oldest(need) for need in PROJECT["dependencies"] if re.match(r"torch\b", need))
    runs = JOB["strategy"]["matrix"]["include"]
    assert runs[0] == {"python": oldest(PROJECT["requires-python"]), "torch": f"torch=={torch}.0"}
    assert runs[-1]["torch"] == "torch", "the newest that pip finds"
    assert [step["run"] for step in JOB["steps"] if "run" in step] == [".ci/run"]
    makefile = (ROOT / "Makefile").read_text()
    for step in JOB["steps"]:
        assert all(re.search(rf"^{name} *\?=", makefile, re.MULTILINE) for name in step.get("env", {}))


def test_what_the_makefile_runs_is_there():
    text = (ROOT / "Makefile").read_text()
    files = set(re.findall(r"(?:tests|docs)/[\w/-]+(?:\.\w+)?", text))
    assert {name for name in files if not (ROOT / name).exists()} == set()
    for module in re.findall(r"-m ((?:building|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize(
    ("subject", "refused"),
    [
        ("Merge the fast-path lookups", False),
        ("Fix the stride check of packed masks", False),
        ("Let many processes work on one study", False),
        ("Read once more: one function asks for a short way, a figure is gone", True),
        ("Masks in place", True),
        ("Added a test", True),
        ("fix a typo", True),
        ("Make the product of few tokens over codes faster by decoding them in registers", True),
    ],
)
def test_a_subject_is_short_and_begins_with_an_imperative_verb(subject, refused, tmp_path):
    (tmp_path / "message").write_text(subject + "\n")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    check, grep = (hook["entry"] for hook in repository["hooks"] if hook.get("stages") == ["commit-msg"])
    program = Path(sys.executable).with_name("commit-check")
    run = subprocess.run([program, *check.split()[1:], tmp_path / "message"], cwd=ROOT, capture_output=True, text=True)
    assert bool(run.returncode or re.search(grep, subject)) == refused, run.stdout + run.stderr
