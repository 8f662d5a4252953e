"""The console script if the packages of an extra are missing."""

import errno
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mft.checks import install_command
from mft.cli.app import app
from mft.cli.command import NEEDED

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def without(modules, *arguments):
    """Return what `mft` prints if these modules are not installed."""
    hidden = f"sys.modules |= dict.fromkeys({list(modules)!r})"
    code = f"import sys; {hidden}; sys.argv[1:] = {list(arguments)!r}; from mft.cli.command import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_command_needs_what_its_extra_installs():
    imported_by = {"pyyaml": "yaml"}
    names = {re.split(r"[<>=~!]", line)[0] for line in PROJECT["optional-dependencies"]["train"]}
    assert {imported_by.get(name, name) for name in names} == set(NEEDED)
    assert PROJECT["scripts"]["mft"] == "mft.cli.command:main"


@pytest.mark.parametrize(("hidden", "named"), [(NEEDED, ", ".join(NEEDED)), (["typer"], "typer"), (["yaml"], "yaml")])
def test_without_its_extra_it_says_which_in_one_line_and_exits_with_2(hidden, named):
    done = without(hidden, "--help")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: mft needs {named}, not installed here: {install_command('train')} (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("group", ["mft.verbs", "mft.studies"])
def test_what_the_study_adds_to_the_command_is_installed_as_declared(group):
    installed = entry_points(group=group)
    assert {entry.name: entry.value for entry in installed} == PROJECT["entry-points"][group], "make dev installs them"
    assert all(entry.load() for entry in installed)


def test_a_reader_that_leaves_after_the_help_is_no_error(monkeypatch):
    """As in `mft serve --help | head`, if head leaves before the last newline, which click prints."""

    def leave(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(typer.core.TyperCommand, "get_help", leave)
    done = CliRunner().invoke(app, ["serve", "--help"])
    assert (done.exit_code, done.output) == (1, "")


def test_with_it_the_command_runs():
    done = without([], "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mft ")
