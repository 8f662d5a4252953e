"""docs/kernels-compiled.md: the committed report has every group of CUDA kernels and every target."""

import re
from pathlib import Path

from building.cuda import GROUPS

TRITON, CUDA = (Path(__file__).parents[2] / "docs" / "kernels-compiled.md").read_text().split("\n## CUDA C++")


def rows(text):
    """(target, kernel) of each row."""
    return {tuple(re.split(r" *\| *", line)[1:3]) for line in text.splitlines() if re.match(r"\| (sm_|gfx)", line)}


def test_every_group_was_compiled_for_hopper_and_the_general_kernels_for_both():
    found = rows(CUDA)
    for group in GROUPS:
        name = "".join(part.capitalize() for part in group.split("_"))
        assert ("sm_90a", name) in found, f"make kernels-report with CUTLASS's headers: {name} is missing"
    general = (
        "PackKernel",
        "ClearKernel",
        "ProductKernel",
        "DecodeKernel",
        "ManyKernel",
        "ScoreGradKernel",
        "GroupedProductKernel",
        "GroupedScoreGradKernel",
        "SelectKernel",
        "ScoreStepKernel",
        "WindowKernel",
    )
    assert {(target, name) for target in ("sm_80", "sm_90") for name in general} <= found
    assert "\nWithout " not in CUDA


def test_triton_s_kernels_were_compiled_for_every_target():
    assert {target for target, _ in rows(TRITON)} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
    names = {
        "masked_product",
        "backward",
        "score_grad",
        "histogram",
        "threshold",
        "pack",
        "score_step",
        "masked_weight",
    }
    for target in ("sm_80", "sm_90", "sm_100"):
        assert names <= {name for where, name in rows(TRITON) if where == target}, target
