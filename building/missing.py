"""python -m building.missing: the packages of the extra cuda-build that this machine lacks, for pip; or nothing."""

import re

from .compile import CannotBuild
from .nvcc import find_cutlass, find_nvcc
from .requirements import requirements


def missing(wanted: list[str]) -> list[str]:
    """Those for nvcc where none is found, and CUTLASS where its headers are not."""
    try:
        find_nvcc()
        has_nvcc = True
    except CannotBuild:
        has_nvcc = False
    has_cutlass = find_cutlass() is not None
    return [r for r in wanted if not (has_cutlass if re.match("nvidia-cutlass", r) else has_nvcc)]


if __name__ == "__main__":
    print("\n".join(missing(requirements("cuda-build"))))
