"""Follow docs/how-to/adding-a-kernel.md as a new user: its files in a new folder, and its commands in order.

The user's Python is a new virtual environment that sees what is installed here, as if `mine` were installed there too.
"""

import os
import re
import shlex
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "adding-a-kernel.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
A_FEW = " and (behind or token or magnitude and (opcheck or detach))"  # the tests that show most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the files of the page, each under the name that its first line or its language gives."""
    folder = tmp_path_factory.mktemp("user")
    for language, text in BLOCKS:
        if language == "python":
            (folder / re.match(r'"""(\w+\.py): ', text)[1]).write_text(text)
        elif language == "toml":
            (folder / "pyproject.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return the user's Python."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True, with_pip=False)
    places = {"base": str(directory), "platbase": str(directory)}
    installed = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=places))
    (packages / "project.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in installed))
    return directory / "bin" / "python"


@pytest.fixture(scope="module")
def said(folder, python):
    """Return {command: its output}, in the page's order; make only prints what it would do, pytest runs a few tests."""
    return {line: follow(line, folder, python) for line in COMMANDS if "--benchmark-only" not in line}


def follow(line, folder, python):
    words = shlex.split(line, comments=True)
    variables = [word for word in words if re.match(r"MFT_\w+=", word)]
    program, *arguments = words[len(variables) :]
    in_clone = program == "make" or "pytest" in arguments or "benchmarks" in arguments
    if program == "make":
        command = ["make", "--dry-run", *arguments]
    elif program == "mft":  # its script names the Python that it was installed with
        command = [python, "-m", "mft", *arguments]
    else:
        assert program == "python", f"a command must be one of make, mft and python, got {line!r}"
        command = [python, *arguments]
    if "pytest" in arguments:
        command[-1] += A_FEW
        command += ["-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MFT_", "PYTHON"))}
    environment |= {"COLUMNS": "200", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    environment |= dict(word.split("=", 1) for word in variables)
    where = ROOT if in_clone else folder
    result = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{line}: {result.stdout} {result.stderr}"
    return result.stdout


def the_command(beginning):
    (line,) = [line for line in COMMANDS if line.startswith(beginning)]
    return line


def test_its_first_command_installs_it_without_a_network(said):
    assert "Successfully installed mine-0.1" in said[COMMANDS[0]]


def test_the_command_mft_lists_it_and_auto_passes_it_over(said):
    told = said["mft env"]
    assert re.search(r"mine +│ yes +│ blocks of 256 rows", told), told
    assert "auto on cpu: mine" not in told


def test_the_layer_says_what_the_page_says(said):
    told = said["MFT_KERNELS=mine python layer.py"]
    assert told.strip()
    assert f"    {told}" in PAGE


def test_its_ops_are_tested_as_ours_are(said):
    assert re.search(r"^\d+ passed", said[the_command("MFT_TEST_BACKENDS=mine python -m pytest")], re.MULTILINE)
