"""What a wheel holds, and the version that everything names."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mft
import mft_kernels

ROOT = Path(__file__).parents[2]
PACKAGES = {"mft_kernels": ROOT / "mft_kernels", "mft": ROOT / "python" / "mft"}
BUILT = {".so", ".pyc"}  # and mft_kernels/_build.json: no sources


def files(package, folder):
    """Names of a package's files, as a wheel calls them."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in BUILT]
    return {str(package / path.relative_to(folder)) for path in found} - {"mft_kernels/_build.json"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of what setup.py would put into a wheel, without the libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    aside = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder)]  # not in the checkout
    command = [sys.executable, "setup.py", "-q", *aside]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_has_every_file_of_a_package(package, wheel):
    missing = files(Path(package), PACKAGES[package]) - files(Path(package), wheel / package)
    assert missing == set(), "a folder needs an __init__.py, another file a line in setup.py's package_data"
    assert (wheel / package / "py.typed").exists()


def test_both_packages_have_the_version_of_one_file():
    assert mft.__version__ == mft_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", mft.__version__)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mft_kernels._version.__version__"}


def test_the_version_of_mft_loads_no_torch():
    code = "import sys, mft; print(mft.__version__); assert not {'torch', 'mft_kernels'} & {*sys.modules}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"{mft.__version__}\n"
