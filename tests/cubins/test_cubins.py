"""Triton's kernels launched from C++: what reaches the driver is what Triton's own launcher passes, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if not triton.__version__.startswith("3.9"):
    pytest.skip(f"cubins are of Triton 3.9, this is {triton.__version__}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of launch_both.py, in a process whose driver is a stub."""
    folder = tmp_path_factory.mktemp("cubins")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, str(Path(__file__).with_name("launch_both.py")), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_is_triton_s_own(report, target):
    """Kernel, grid, block, shared memory, attributes, stream, and every parameter: 2 kernels where a sum has parts."""
    kernels = set()
    for name, launches in report[target]["calls"].items():
        for launch in launches:
            (ours,) = launch["ours"]
            assert launch["theirs"] == [ours], name
            kernels.add(ours["kernel"])
    assert kernels == {"_masked_product_kernel", "_sum_splits_kernel"}


@pytest.mark.parametrize("target", TARGETS)
def test_parameters_are_those_of_the_manifest(report, target):
    """As many and as large as the driver, which reads the cubin itself, has taken."""
    sizes = {tuple(p["size"] for p in layout) for layout in report[target]["layouts"].values()}
    for launches in report[target]["calls"].values():
        for launch in launches:
            assert tuple(len(p) // 2 for p in launch["ours"][0]["parameters"]) in sizes
    maps = [p for layout in report[target]["layouts"].values() for p in layout if p["type"] == "nvTmaDesc"]
    assert bool(maps) == (target != "sm_80")


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_argument_is_seen(report, target):
    swapped, left_out = report[target]["mistakes"]
    right = report[target]["calls"]["packed"][-1]["theirs"][0]["parameters"]
    assert swapped[0]["parameters"][:2] == [right[1], right[0]] != right[:2]
    assert left_out.endswith(f"a launch of this cubin takes {len(right)} values, got {len(right) - 1}")
