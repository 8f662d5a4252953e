"""A study's arm under a budget: what its runs drop and store, whatever the study's keep ratio is."""

from safetensors.torch import load_file
from tiny_study import FULL, make_study, run_quietly, write_ground

from mft.config import MaskConfig
from mft_study.load import study_values
from mft_study.report.table import study_numbers
from mft_study.report.write import write_study_report

ARMS = FULL + "  control: {kind: control, lrs: [1e-2]}\n  budget: {kind: mask, lrs: [1e-2, 3e-2], budget: 0.02}\n"
WEIGHTS = 2 * 9216  # of layers 2 and 3


def test_an_arm_drops_its_budget_of_all_its_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_ground(tmp_path)
    study = make_study(tmp_path, ARMS, ["checkpoints=1"])
    findings, _ = run_quietly(study, tmp_path / "run")
    write_study_report(findings, tmp_path / "run", {})
    row = next(row for row in study_numbers(findings)["domains"]["count"]["rows"] if row["arm"] == "budget")
    assert row["setting"]["keep_ratio"] is None
    trained = list((tmp_path / "run").rglob("trained/count/budget/*.safetensors"))
    assert len(trained) == 2  # one for each seed
    for path in trained:
        assert sum(int((weight == 0).sum()) for weight in load_file(path).values()) == int(0.02 * WEIGHTS)
    assert 0 < row["bytes"] < 0.25 * WEIGHTS / 8


def test_its_mask_is_the_study_s_but_for_what_is_dropped(tmp_path):
    arms = ARMS + "  slow: {kind: mask, lrs: [1e-2], budget: 0.02, budget_ramp: 0.9, mode: value}\n"
    study = make_study(tmp_path, arms)
    assert study.mask.keep_ratio == 0.9
    expected = MaskConfig(layers_to_transform=[2, 3], budget=0.02, mode="magnitude")
    assert study.arms["budget"].mask_config(study.mask) == expected
    assert study.arms["slow"].mask_config(study.mask) == MaskConfig(
        layers_to_transform=[2, 3], budget=0.02, budget_ramp=0.9, mode="value"
    )
    assert study_values(study)["arms"]["budget"]["budget"] == 0.02
    assert "budget" not in study_values(study)["mask"]
    for name in ("budget", "slow"):
        assert all(setting.keep_ratio is None for setting in study.arms[name].settings(study.mask))
