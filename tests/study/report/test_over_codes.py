"""A report's sentences about arms over codes, from hand-made findings."""

import pytest
from test_study_report import ARMS, LOSSES, findings

from mft_study.arms.kinds import make_arm
from mft_study.report.over_codes import verdicts_over_codes
from mft_study.report.table import study_tables

RATES = {"lrs": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}
OVER_CODES = {
    **{name: ARMS[name] for name in ("base", "full fine-tune", "control")},
    "NF4": make_arm("quantized", quantization="nf4"),
    "mask": make_arm("mask", start="NF4", **RATES),
    "QLoRA": make_arm("lora", start="NF4", **RATES),
}
LOSS = {name: LOSSES[name] for name in ("base", "full fine-tune", "control")} | {"NF4": 2.2, "QLoRA": 2.1}


@pytest.mark.parametrize(
    ("mask", "verdict"),
    [
        (2.0, "mask against QLoRA: ahead. -0.10"),
        (2.15, "mask against QLoRA: behind. +0.05"),
        (2.1001, "mask against QLoRA: not shown to differ (the interval includes 0). "),
    ],
)
def test_a_mask_is_held_against_adapters_of_the_same_codes(mask, verdict):
    losses = LOSS | {"mask": mask}
    found = findings(arms=OVER_CODES, test=losses, validation=losses)
    for one in found.outcomes:
        one.bytes = {"mask": 4_500, "QLoRA": 9_000}.get(one.unit.arm)
    (said,) = verdicts_over_codes(found, study_tables(found))
    assert said.startswith("code, over NF4. Rounding costs +0.")
    assert verdict in said
    assert said.endswith("; 4.5 kB against 9.0 kB.")
    assert f"mask {100 * (2.2 - mask) / 0.2:.0f} %" in said
