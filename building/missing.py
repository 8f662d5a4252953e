"""python -m building.missing: the packages of the extra cuda-build that this machine lacks, for pip; or nothing."""

import re
import tomllib
from pathlib import Path

from .compile import CannotBuild
from .nvcc import find_cutlass, find_nvcc


def missing(requirements: list[str]) -> list[str]:
    """Those for nvcc where none is found, and CUTLASS where its headers are not."""
    try:
        find_nvcc()
        has_nvcc = True
    except CannotBuild:
        has_nvcc = False
    has_cutlass = find_cutlass() is not None
    return [r for r in requirements if not (has_cutlass if re.match("nvidia-cutlass", r) else has_nvcc)]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    print("\n".join(missing(project["optional-dependencies"]["cuda-build"])))
