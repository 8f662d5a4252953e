"""python -m building.missing: print the packages of the extra cuda-build that this machine lacks, for pip."""

import re

from .compile import CannotBuild
from .nvcc import find_cutlass, find_nvcc
from .requirements import requirements


def missing(wanted: list[str]) -> list[str]:
    """Return the wanted packages for nvcc if none is found, and CUTLASS if its headers are missing."""
    try:
        find_nvcc()
        has_nvcc = True
    except CannotBuild:
        has_nvcc = False
    has_cutlass = find_cutlass() is not None
    return [r for r in wanted if not (has_cutlass if re.match("nvidia-cutlass", r) else has_nvcc)]


if __name__ == "__main__":
    print("\n".join(missing(requirements("cuda-build"))))
