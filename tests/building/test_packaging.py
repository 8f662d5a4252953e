"""The contents of a wheel, and the version that all files name."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import mft

ROOT = Path(__file__).parents[2]
PACKAGES = {"mft_kernels": ROOT / "mft_kernels"} | {name: ROOT / "python" / name for name in ("mft", "mft_study")}
BUILT = {".so", ".pyc"}  # and everything named like these: they are not sources
BUILT_FILES = {"mft_kernels/_build.json", "mft_kernels/faster.json"}


def files(package, folder):
    """Return the names of a package's files in a wheel."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in BUILT]
    return {str(package / path.relative_to(folder)) for path in found} - BUILT_FILES


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the folder of what setup.py would put into a wheel, without the libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    aside = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder)]  # outside the checkout
    command = [sys.executable, "setup.py", "-q", *aside]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_has_every_file_of_a_package(package, wheel):
    missing = files(Path(package), PACKAGES[package]) - files(Path(package), wheel / package)
    assert missing == set(), "a folder needs an __init__.py, another file a line in setup.py's package_data"
    assert (wheel / package / "py.typed").exists()


@pytest.fixture
def bare(tmp_path):
    """Return a folder with what a build reads before any source."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "mft_kernels/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "building", tmp_path / "building", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_an_sdist_holds_sources_and_no_library(bare):
    for name in ("mft_kernels/__init__.py", "mft_kernels/libmft_cpu.so", "csrc/one.cpp"):
        (bare / name).parent.mkdir(exist_ok=True)
        (bare / name).touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "out"]
    subprocess.run(command, cwd=bare, capture_output=True, check=True)
    (sdist,) = (bare / "out").iterdir()
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/one.cpp", "building/wheel.py", "mft_kernels/__init__.py"} <= held
    assert not [name for name in held if name.endswith(".so")]


def test_a_build_brings_what_was_measured_of_the_choice_or_nothing(bare):
    measured = bare / "benchmarks" / "results" / "gpu-faster.json"
    measured.parent.mkdir(parents=True)
    built = bare / "out" / "mft_kernels" / "faster.json"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temporary"]
    environment = {**os.environ, "MFT_BUILD": "0", "MFT_CUDA": "0"}
    for text in ('{"ops": []}', None):
        if text:
            measured.write_text(text)
        else:
            measured.unlink()
        subprocess.run(command, cwd=bare, env=environment, capture_output=True, check=True)
        assert (built.read_text() if built.exists() else None) == text


def test_the_version_of_mft_loads_no_torch():
    code = "import sys, mft; print(mft.__version__); assert not {'torch', 'mft_kernels'} & {*sys.modules}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"{mft.__version__}\n"
