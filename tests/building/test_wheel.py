"""Rules for a wheel that is published, and for its sdist's contents; make wheel-test installs the real ones."""

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from building import wheel, wheel_test

NAME = "mft_kernels-0.2.0-py3-none-manylinux_2_28_x86_64.whl"
WHOLE = {"built": True, "reason": None, "left_out": {}}


def packed(folder, name=NAME, report=None, sources=()):
    """Make a wheel with these files."""
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mft_kernels/_build.json", json.dumps(report or {"cpu": WHOLE, "cuda": WHOLE}))
        for source in sources:
            archive.writestr(source, "")
    return path


def test_a_whole_wheel_has_no_fault(tmp_path):
    assert wheel.faults(packed(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "mft_kernels-0.2.0-cp311-cp311-linux_x86_64.whl"}, "must end in py3-none-manylinux_2_28_x86_64"),
        ({"report": {"cpu": WHOLE, "cuda": {"built": False, "reason": "no nvcc"}}}, "without libmft_cuda.so: no nvcc"),
        ({"report": {"cpu": WHOLE, "cuda": WHOLE | {"left_out": {"g": "no headers"}}}}, "is without g: no headers"),
    ],
)
def test_each_fault_is_named(tmp_path, changes, fault):
    (found,) = wheel.faults(packed(tmp_path, **changes))
    assert found.startswith("mft_kernels-0.2.0-")
    assert fault in found


def test_an_sdist_that_lacks_a_source_is_told(tmp_path):
    sources = ["mft_kernels/mask/held.py", "mft/config.py"]
    path = tmp_path / "mft_kernels-0.2.0.tar.gz"
    root = Path(wheel_test.__file__).parents[1]
    files = [file for folder in ("csrc", "building") for file in (root / folder).rglob("*") if file.is_file()]
    names = [str(file.relative_to(root)) for file in files]
    held = [
        *names,
        "mft_kernels/mask/held.py",
        "python/mft/config.py",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    ]

    def missing_without(*left_out):
        with tarfile.open(path, "w:gz") as archive:
            for name in set(held) - set(left_out):
                archive.addfile(tarfile.TarInfo(f"mft_kernels-0.2.0/{name}"))
        return wheel_test.missing_from_sdist(packed(tmp_path, sources=sources), path)

    assert missing_without() == []
    assert missing_without("python/mft/config.py", "csrc/operands.h") == ["csrc/operands.h", "python/mft/config.py"]
