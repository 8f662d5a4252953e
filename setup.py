"""Packages mft_kernels, mft and mft_study, and the compiled libraries libmft_cpu.so and libmft_cuda.so in mft_kernels.

building/libraries.py builds them independently, and has the switches MFT_BUILD and MFT_CUDA.
mft_kernels/_build.json stores the tools used, and the reason for what was left out, for backend_report().
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file without its folder in the path

from building.libraries import BuildLibraries, StableWheel, refusal

if reason := refusal(sys.argv):
    sys.exit(reason)

setup(
    packages=[*find_packages(include=["mft_kernels", "mft_kernels.*"]), *find_packages("python")],
    package_dir={"mft_kernels": "mft_kernels", "mft": "python/mft", "mft_study": "python/mft_study"},
    package_data={
        "mft": ["configs/*.yaml", "data/reserve.txt", "py.typed"],
        "mft.memory": ["known_models/*.json"],
        "mft.models": ["templates/*.jinja"],
        "mft_study": ["configs/*.yaml", "py.typed"],
        "mft_kernels": ["py.typed"],  # PEP 561: type checkers read our annotations
    },
    ext_modules=[Extension("mft_kernels.libmft_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": StableWheel},
)
