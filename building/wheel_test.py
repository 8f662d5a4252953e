"""python -m building.wheel_test [--slim]: try dist's wheel in fresh environments, as a user would install it.

Each environment is a Python and a torch: this Python with this torch, and the newest other Python of this machine with
the oldest supported torch. In a folder without the repository it runs `mft` before the extra "train" is installed,
tests of the ops, `mft env` and a training of two steps. The sdist must hold every source file of the wheel and what
builds it.
--slim: only this Python with the torch of .venv, and a part of the tests.
--environment 3.12 torch==2.15.0: only that Python with that torch.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.14", "3.13", "3.12", "3.11")
TESTS = ["kernels/test_ops.py", "kernels/test_linear.py"]
SLIM = ["-k", "cpu"]
TWO_STEPS = [
    *("train.steps=2", "train.batch_size=1", "data.sequence_length=64", "data.max_train_tokens=4096"),
    *("data.max_eval_tokens=1024", "mask.layers_to_transform=29", "output_dir=run"),
]
LIBRARY_SERVES = """
import mft_kernels
report = mft_kernels.backend_report()
assert "site-packages" in mft_kernels.__file__, mft_kernels.__file__
assert report["backends"]["cpu"]["reason"] is None, report["backends"]["cpu"]
"""


def environments(slim: bool) -> list[tuple[str, str]]:
    """Return (Python, torch as a requirement for pip) of each environment."""
    import torch

    here = [(sys.executable, f"torch=={torch.__version__.split('+')[0]}")]
    if slim:
        return here
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (oldest,) = (need.split(">=")[1] for need in dependencies if re.match(r"torch\b", need))
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    others = [path for name in PYTHONS if name != mine and (path := working_python(name))]
    if not others:
        sys.exit(f"a second Python is needed, one of {', '.join(PYTHONS)} in PATH that is not {mine}; or --slim")
    return [*here, (others[0], f"torch=={oldest}.0")]


def named_environment(version: str, torch: str) -> tuple[str, str]:
    """Return one of environments. Raises: SystemExit if the Python is not here, or torch is no requirement for pip."""
    if not re.match(r"torch($|[=<>~!])", torch):
        sys.exit(f"--environment must name a torch as pip does, such as torch==2.15.0, got {torch!r}")
    if (python := working_python(version)) is None:
        sys.exit(f"--environment must name a Python that is in PATH with venv, such as 3.12, got {version!r}")
    return python, torch


def working_python(version: str) -> str | None:
    """Return a Python with venv: from a folder next to this one's, or from PATH."""
    beside = sorted(Path(sys.base_prefix).parent.glob(f"{version}*/bin/python{version}"), reverse=True)
    for path in filter(None, (*map(str, beside), shutil.which(f"python{version}"))):
        if subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return path
    return None


def try_wheel(wheel: Path, python: str, torch: str, folder: Path, *, slim: bool) -> None:
    """Install it into folder/venv and use it in ``folder``. Raises: SystemExit with what failed."""
    run([python, "-m", "venv", "venv"], folder)
    binary = folder / "venv" / "bin"
    pip = [str(binary / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, torch], folder)
    run([*pip, str(wheel), "pytest"], folder)
    run([str(binary / "python"), "-c", LIBRARY_SERVES], folder)
    said = subprocess.run([binary / "mft", "env"], cwd=folder, capture_output=True, text=True)
    if said.returncode != 2 or "pip install 'WHEEL[train]'" not in said.stderr:
        sys.exit(f"mft without its extra must say so, with exit code 2; got {said.returncode}: {said.stderr}")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    tests = [f"tests/{name}" for name in TESTS]
    run(
        [str(binary / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *(SLIM if slim else [])],
        folder,
    )
    run([*pip, f"{wheel}[train]"], folder)
    run([str(binary / "mft"), "env"], folder)
    run([str(binary / "mft"), "train", *TWO_STEPS], folder)
    run([str(binary / "mft"), "verify", "run/masks"], folder)


def packed(folder: Path) -> tuple[Path, Path]:
    """Return the wheel and the sdist in the folder. Raises: SystemExit if there is not one of each."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if (len(wheels), len(sdists)) != (1, 1):
        held = ", ".join(path.name for path in (*wheels, *sdists)) or "neither"
        sys.exit(f"{folder} must hold one wheel and one sdist, got {held}; make wheel writes both")
    return wheels[0], sdists[0]


def missing_from_sdist(wheel: Path, sdist: Path) -> list[str]:
    """Return files that the sdist needs and lacks: sources of the wheel, of the libraries, and of the build."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith((".py", ".yaml", ".json", ".jinja", ".typed"))}
    packed -= {name for name in packed if ".dist-info/" in name or name == "mft_kernels/_build.json"}
    needed = {f"python/{name}" if name.startswith(("mft/", "mft_study/")) else name for name in packed}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    for folder in ("csrc", "building"):
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
        needed |= {str(path.relative_to(ROOT)) for path in paths}
    return sorted(needed - held)


def run(command: list[str], folder: Path) -> None:
    """Run the command. Raises: SystemExit with its exit code."""
    print(f"$ {' '.join(command)}", flush=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "MFT_"))}
    if code := subprocess.run(command, cwd=folder, env=clean).returncode:
        sys.exit(code)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--slim", action="store_true")
    which.add_argument("--environment", nargs=2, metavar=("PYTHON", "TORCH"))
    arguments = parser.parse_args()
    tried = [named_environment(*arguments.environment)] if arguments.environment else environments(arguments.slim)
    wheel, sdist = packed(ROOT / "dist")
    if missing := missing_from_sdist(wheel, sdist):
        sys.exit(f"{sdist.name} must hold what it builds from, and lacks {', '.join(missing)}")
    for python, torch in tried:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mft-wheel-") as folder:
            try_wheel(wheel, python, torch, Path(folder), slim=arguments.slim)
        version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
        print(f"{wheel.name}: {version} with {torch}: works ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
