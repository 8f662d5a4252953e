"""Triton's kernels launched from C++: the driver gets the same bytes as from Triton's own launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import on_stub
import pytest
import torch
import triton

from mft_kernels.backends import triton as backend
from mft_kernels.backends.triton import cubins
from mft_kernels.backends.triton import launch as launcher
from mft_kernels.backends.triton import target as targets
from mft_kernels.backends.triton.target import H100, H100_OLD_TRITON

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if not triton.__version__.startswith("3.9"):
    pytest.skip(f"cubins are of Triton 3.9, this is {triton.__version__}", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100"]
_NAMES = (
    "masked_product sum_splits many_masks backward score_grad quantized_product masked_weight histogram threshold pack "
    "score_step window"
)
KERNELS = {f"_{name}_kernel" for name in _NAMES.split()}


def run(module: str, folder: Path, first: str = "") -> dict:
    """Return what the module's main prints, in a process whose driver is a stub and which runs ``first`` before."""
    path = f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"
    environment = os.environ | {"PYTHONPATH": path, "TRITON_DISABLE_LINE_INFO": "1"}
    code = f"import pathlib, sys; {first or 'pass'}; import {module}; {module}.main(pathlib.Path({str(folder)!r}))"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    on_stub.build(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return run("launch_both", folder)


@pytest.fixture(scope="module")
def alone(folder, both):
    return run("without_triton", folder, "sys.modules['triton'] = None")


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_is_triton_s_own(both, target):
    """Compare kernel, grid, block, shared memory, attributes, stream, and every parameter."""
    kernels = set()
    for name, launches in both[target]["calls"].items():
        for launch in launches:
            (ours,) = launch["ours"]
            assert launch["theirs"] == [ours], name
            kernels.add(ours["kernel"])
    assert kernels == KERNELS


@pytest.mark.parametrize("target", TARGETS)
def test_parameters_are_those_of_the_manifest(both, target):
    """Their number and sizes are those that the driver, which reads the cubin itself, has taken."""
    types = set()
    for launches in both[target]["calls"].values():
        for launch in launches:
            taken = [len(p) // 2 for p in launch["ours"][0]["parameters"]]
            assert taken == [p["size"] for p in launch["layout"]]
            types |= {p["type"] for p in launch["layout"]}
    assert ("nvTmaDesc" in types) == (target != "sm_80")


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_argument_is_seen(both, target):
    swapped, left_out = both[target]["mistakes"]
    right = both[target]["calls"]["mask"][-1]["theirs"][0]["parameters"]
    assert swapped[0]["parameters"][:2] == [right[1], right[0]] != right[:2]
    assert left_out.endswith(f"a launch of this cubin takes {len(right)} values, got {len(right) - 1}")


def without_addresses(launch: dict, layout: list[dict]) -> dict:
    """Remove addresses: a map begins with its address, and a pointer is one."""
    addresses = [p["type"].startswith(("*", "nvTmaDesc")) for p in layout]
    return launch | {"parameters": [p[16 if a else 0 :] for p, a in zip(launch["parameters"], addresses)]}


@pytest.mark.parametrize("target", TARGETS)
def test_without_triton_the_same_is_launched(both, alone, target):
    for name, found in alone[target].items():
        for launches in (found["launches"], found["again"]):
            for ours, launch in zip(launches, both[target]["calls"][name], strict=True):
                theirs, layout = launch["theirs"][0], launch["layout"]
                assert without_addresses(ours, layout) == without_addresses(theirs, layout)
        out = found["out"].to_bytes(8, "little").hex()
        assert any(out in launch["parameters"] for launch in found["again"]), name


def test_a_cubin_is_loaded_once(both, alone):
    assert alone["modules"] == sum(both[target]["cubins"] for target in TARGETS)


def test_a_call_that_resembles_a_remembered_one_is_launched_by_what_it_is(alone):
    """A call with another pitch, or one in which equal addresses belonged to different tensors."""
    after_another, fresh = alone["pitched"]
    assert after_another == fresh
    assert alone["shared"]


def test_each_result_takes_its_own_place(alone):
    """Nothing else changes except the parts of a sum."""
    results, others = alone["moved"]
    assert results
    assert others <= 1


def test_gradients_are_planned_once_a_layout_and_setting(alone):
    """A change of the layout or of a setting needs a new plan.

    Changed here: tokens, pitch, alignment, dtype (also of scores), wanted gradients, TF32, MFT_TRITON and MFT_AUTOTUNE.
    """
    found = alone["in Python"]
    assert found["gradients"] == [True, False, False, False]
    assert found["sums"] == found["fp32 gradients"] == [True, False, False]
    assert found["other gradients"] == [True] * 11
    assert found["other sums"] == [True] * 4
    assert found["what torch had a hand in"] == [True] * 4  # a copy, a GEMM: our launches do not show them
    assert alone["short way"] == [True, False, False]


def test_rows_of_many_masks_codes_selections_and_steps_are_planned_once(alone):
    """Another number of masks, kind of codes, direction, shape or mode needs a new plan."""
    assert alone["in Python"]["others"] == [True, False] * 8
    assert alone["in Python"]["other others"] == [True] * 5


def test_numbers_that_differ_from_call_to_call_reach_the_launch(alone):
    by_the_first_s_plan, by_none = alone["other numbers"]
    assert by_the_first_s_plan == by_none
    assert len(by_none) > 200


def test_what_counts_begins_at_zero_in_each_call(alone):
    assert alone["zeros"] == [0] * 8


def test_no_more_plans_are_remembered_than_8192_and_those_in_use_stay(alone):
    most, in_use, unused = alone["bounded"]
    assert 4096 < most <= 8192
    assert in_use
    assert not unused


def test_where_nothing_can_be_compiled_a_launch_without_a_cubin_is_refused(alone):
    assert alone["refusal"].startswith("there is no cubin for _masked_product_kernel(bfloat16[16, 128]")
    assert alone["refusal"].endswith(" on sm_90, and Triton is not installed; pip install triton")


@pytest.fixture
def h100(monkeypatch):
    """Pretend to have an H100 where availability is checked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_which_of_both_is_asked_for(h100, folder, both, monkeypatch, tmp_path):
    def unavailable(asked: str, cubins_in: Path, has_triton: bool) -> str | None:
        monkeypatch.setenv("MFT_TRITON", asked)
        monkeypatch.setattr(cubins, "FOLDER", cubins_in)
        monkeypatch.setattr(cubins, "load", lambda part: None)
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: has_triton or None)
        return backend._unavailable()

    no_cubins = f"no cubins for sm_90 in {tmp_path}; run `make cubins` to compile them"
    no_triton = "triton is not installed; pip install triton (Linux only)"
    assert unavailable("", folder, True) is None
    assert unavailable("", folder, False) is None
    assert unavailable("", tmp_path, True) is None
    assert unavailable("", tmp_path, False) == f"{no_triton}; {no_cubins}"
    assert unavailable("cubins", folder, False) is None
    assert unavailable("cubins", tmp_path, True) == f"MFT_TRITON=cubins cannot be used: {no_cubins}"
    assert unavailable("jit", folder, True) is None
    assert unavailable("jit", folder, False) == f"MFT_TRITON=jit cannot be used: {no_triton}"
    with pytest.raises(
        ValueError, match="MFT_TRITON must be 'cubins' or 'jit', got 'aot'; unset it to use whichever is available"
    ):
        unavailable("aot", folder, True)


def test_the_report_says_who_compiles(folder, both, monkeypatch):
    monkeypatch.setattr(cubins, "FOLDER", folder)
    monkeypatch.setattr(cubins, "load", lambda part: None)
    monkeypatch.setattr(targets, "_assumed", H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    count = both["sm_90"]["cubins"]
    for asked, says in (
        (
            "",
            f"{count} cubins of Triton 3.9.0, sm_90, swapped form (docs/explanation/triton-kernels.md); "
            "others compiled by Triton 3.9.0",
        ),
        (
            "cubins",
            f"{count} cubins of Triton 3.9.0, sm_90, swapped form (docs/explanation/triton-kernels.md); no others",
        ),
        ("jit", "Triton 3.9.0, sm_90, swapped form (docs/explanation/triton-kernels.md); MFT_TRITON=jit"),
    ):
        monkeypatch.setenv("MFT_TRITON", asked)
        assert backend._detail() == says


def test_cubins_of_other_sources_are_not_taken(folder, both, monkeypatch):
    monkeypatch.setattr(cubins, "FOLDER", folder)
    monkeypatch.setattr(cubins, "load", lambda part: None)
    cubins._bundle.cache_clear()
    monkeypatch.setattr(cubins, "kernels_hash", lambda: "changed")
    found, reason = cubins.bundle("sm_90")
    assert found is None
    remedy = "run `make cubins` to compile it again"
    assert reason == f"{folder / 'sm_90.zip'} was compiled from other sources than these kernels; {remedy}"
    cubins._bundle.cache_clear()


@pytest.mark.parametrize("form", [H100_OLD_TRITON, None], ids=str)
def test_a_product_without_a_cubin_takes_the_form_that_is_compiled_here(form, monkeypatch):
    """Cubins have the swapped form on sm_90; Triton 3.6 may only compile the plain form."""
    monkeypatch.setattr(launcher, "target_of", lambda device: H100)
    monkeypatch.setattr(launcher, "compiled_here", lambda device: form)
    tried = []

    def run(target):
        tried.append(target)
        if target is H100:
            raise cubins.NoCubin
        return "made"

    if form is None:
        with pytest.raises(cubins.NoCubin):
            launcher.by_cubins_or_compiled(torch.device("cuda"), run)
    else:
        assert launcher.by_cubins_or_compiled(torch.device("cuda"), run) == "made"
    assert tried == [H100, form][: 2 if form else 1]


def test_codes_are_multiplied_by_cubins_alone(monkeypatch):
    monkeypatch.setenv("MFT_TRITON", "cubins")
    assert "product" in backend.functions()[0]


def test_what_the_installed_triton_may_not_compile_is_said(monkeypatch):
    swapped, plain = {"MASK_ON_A": True}, {"MASK_ON_A": False}
    monkeypatch.delenv("MFT_TRITON", raising=False)
    assert launcher._not_compiled_here(H100, swapped) is None
    monkeypatch.setattr(launcher, "compiles_safely", lambda target: False)
    assert "does not compile this form safely" in launcher._not_compiled_here(H100, swapped)
    assert launcher._not_compiled_here(H100, plain) is None
    monkeypatch.setenv("MFT_TRITON", "cubins")
    assert (
        launcher._not_compiled_here(H100, plain) == "MFT_TRITON=cubins does not let Triton compile it; unset MFT_TRITON"
    )
