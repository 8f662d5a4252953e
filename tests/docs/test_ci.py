"""Checks that other machines run: the workflow of continuous integration, and the files that the Makefile names."""

import re
import tomllib
from pathlib import Path

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
