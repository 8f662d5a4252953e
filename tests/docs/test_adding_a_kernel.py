"""docs/adding-a-kernel.md, followed by a stranger: its files in a folder of theirs, its commands in fresh processes."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-kernel.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# For every op that a process called, whether the functions of mine ran; its report comes last.
COUNTED = """
import atexit, collections, mine
from mft_kernels import backends
calls = collections.Counter()
def counted(name, function):
    def op(*arguments):
        calls[name] += 1
        return function(*arguments)
    return op
backend = backends.registered("mine")
vars(backend)["ops"] = {name: counted(name, function) for name, function in backend.ops.items()}
atexit.register(lambda: print("called:", *sorted(calls)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's Python files lie, and what pip would leave of its pyproject.toml."""
    folder = tmp_path_factory.mktemp("stranger")
    for language, text in BLOCKS:
        if language == "python":
            (folder / re.match(r'"""(\w+\.py): ', text)[1]).write_text(text)
        elif language == "toml":
            project = tomllib.loads(text)["project"]
            installed = folder / f"{project['name']}-{project['version']}.dist-info"
            installed.mkdir()
            (installed / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
            lines = []
            for group, named in project["entry-points"].items():
                lines += [f"[{group}]", *(f"{name} = {module}" for name, module in named.items())]
            (installed / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(folder, command, **environment):
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "python")))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}: {result.stdout} {result.stderr}"
    return result.stdout


def command_of(beginning):
    """(environment, words) of the one command of the page that begins so."""
    lines = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
    (line,) = [line for line in lines if line.startswith(beginning)]
    words = shlex.split(line, comments=True)
    variables = [word for word in words if re.match(r"MFT_\w+=", word)]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


def test_the_layer_runs_on_it_where_the_environment_says_so(folder):
    environment, (_, script) = command_of("MFT_KERNELS=mine python layer.py")
    counted = folder / "counted.py"
    counted.write_text(COUNTED + (folder / script).read_text())
    called = run(folder, [sys.executable, str(counted)], **environment)
    assert called == "called: kept_threshold masked_linear_packed masked_linear_packed_backward pack_mask pack_signs\n"


def test_the_command_mft_lists_it_and_auto_passes_it_over(folder):
    _, (_, verb) = command_of("mft env")
    told = run(folder, [sys.executable, "-m", "mft", verb])
    assert re.search(r"mine +│ yes +│ blocks of 256 rows", told), told
    assert "auto on cpu: mine" not in told


def test_its_ops_are_tested_as_ours_are(folder):
    environment, (_, *words) = command_of("MFT_TEST_BACKENDS=mine python -m pytest")
    words[-1] += " and (behind or token or magnitude and (opcheck or detach))"  # a few that tell much
    told = run(folder, [sys.executable, *words, "-q", "-p", "no:cacheprovider"], **environment)
    assert re.search(r"^9 passed", told, re.MULTILINE), told


def test_the_benchmarks_measure_it(folder, own_table, monkeypatch):
    """What the page's command times, without its process, which imports for 10 s."""
    from benchmarks.harness import environment
    from benchmarks.layer_competitors import DENSE, EAGER, HELD, MODULE, LayerCompetitors, inputs_of
    from benchmarks.test_ops import SHAPES
    from mft_kernels.timing import time_interleaved

    variables, words = command_of("MFT_KERNELS=mine python -m pytest benchmarks")
    assert (words[3], words[-1]) == ("benchmarks/test_ops.py", "576x1536 and 64 and forward")
    assert (576, 1536) in SHAPES
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    calls = []
    monkeypatch.setattr(mine, "masked_blocks", lambda *of: calls.append(of) or iter(()))
    made = LayerCompetitors(8, 64)
    competitors = {name: made.call(name, "forward", inputs_of(3, 8, 64)) for name in (DENSE, MODULE, HELD, EAGER)}
    samples = time_interleaved(competitors, rounds=1)
    assert samples.keys() == competitors.keys()
    assert len(calls) == 2 * len((MODULE, HELD))  # each once before it is timed
    assert environment()["backend"] == "blocks of 256 rows"


def test_its_commands_of_make_exist(folder):
    environment, words = command_of("MFT_KERNELS=mine make bench")
    run(folder, ["make", "--dry-run", *words[1:]], **environment)
