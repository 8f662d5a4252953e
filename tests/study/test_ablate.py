"""Ablations: the studies that they derive, what their plot reads, and one run from the command line."""

import dataclasses

import pytest
from tiny_run import succeed
from tiny_study import FEW, equal, make_study, run_quietly

from mft_study.ablate import ablation_lines, derive
from mft_study.report.table import reference_of
from mft_study.store import copy_fine_tunes

DATA = "domains.count.max_train_tokens=120"


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, FEW, [DATA])


def test_every_ratio_gets_a_trained_a_magnitude_and_a_random_mask(study):
    arms = derive(study, "ratio", ["0.5", "0.9"]).arms
    assert list(arms)[:2] == ["full", "control"]
    assert {name: arm.keep_ratios for name, arm in arms.items() if arm.keep_ratios} == {
        f"{kind} {ratio}": [ratio] for kind in ("MFT", "magnitude", "random") for ratio in (0.5, 0.9)
    }
    assert arms["MFT 0.5"].lrs == study.arms["MFT"].lrs


FREE = "  free: {kind: mask, mode: value, threshold: 0, lrs: [1e-2], beta1s: [0, 0.9]}\n"
OTHERS = "  on control: {kind: mask, lrs: [1e-2], start: control}\n  mean: {kind: average, of: free, runs: 2}\n"


def test_every_mask_on_the_fine_tune_is_ablated_and_a_free_threshold_stands_beside_the_ratios(tmp_path):
    study = make_study(tmp_path, FEW + FREE + OTHERS, [DATA])
    ratios, layers = derive(study, "ratio", ["0.5"]).arms, derive(study, "layers", ["0-1", "3"]).arms
    assert list(ratios) == ["full", "control", "free", "MFT 0.5", "magnitude 0.5", "random 0.5"]
    assert ratios["free"] == study.arms["free"]
    assert list(layers) == ["full", *(f"{arm} {group}" for group in ("0-1", "3") for arm in ("control", "MFT", "free"))]
    assert (layers["free 3"].layers_to_transform, layers["free 3"].beta1s) == ([3], [0, 0.9])
    assert list(derive(study, "data", ["0.5"]).arms) == ["full", "control", "MFT", "free"]


def test_an_ablation_of_some_masks_leaves_the_others_out(tmp_path):
    study = make_study(tmp_path, FEW + FREE + OTHERS, [DATA])
    assert list(derive(study, "layers", ["3"], masks=["free"]).arms) == ["full", "control 3", "free 3"]
    assert list(derive(study, "data", ["1"], masks=["MFT"]).arms) == ["full", "control", "MFT"]
    with pytest.raises(ValueError, match="--arm must be one of MFT, free, got 'fre'; did you mean free"):
        derive(study, "layers", ["3"], masks=["fre"])
    with pytest.raises(ValueError, match="arms must hold a mask without a threshold or a budget to be ablated"):
        derive(study, "ratio", masks=["free"])


def test_the_fine_tune_of_a_share_may_always_choose_its_epochs(study):
    assert derive(study, "data", ["0.5"]).arms["full"].epochs == [1, 2]
    given = dataclasses.replace(study.arms["full"], epochs=[3, 1])
    again = dataclasses.replace(study, arms={**study.arms, "full": given})
    assert derive(again, "data", ["0.5"]).arms["full"].epochs == [3, 1]


def test_each_group_of_layers_is_held_against_a_control_of_its_own(study):
    ablated = derive(study, "layers", ["0-1", "3"])
    assert ablated.arms["MFT 0-1"].layers_to_transform == [0, 1]
    for group in ("0-1", "3"):
        assert reference_of(ablated, f"MFT {group}") == f"control {group}"
    with pytest.raises(ValueError, match="--values must name groups of layers for this model, such as 0-3,4-7, got"):
        derive(study, "layers")


def test_shares_of_the_data_are_domains_with_the_same_evaluation(study):
    ablated = derive(study, "data", ["0.5", "1"])
    assert {name: data.max_train_tokens for name, data in ablated.domains.items()} == {"count 0.5": 60, "count 1": 120}
    assert {data.max_eval_tokens for data in ablated.domains.values()} == {96}
    assert list(ablated.arms) == ["full", "control", "MFT"]
    again = dataclasses.replace(study, arms={**study.arms, "MFT too": study.arms["MFT"]})
    assert list(derive(again, "data", ["0.5"]).arms) == ["full", "control", "MFT", "MFT too"]


def test_the_text_of_a_domain_is_general_to_none_of_its_shares(study):
    texts = {"count": study.domains["count"], "other": study.domains["count"]}
    wider = dataclasses.replace(study, general=texts)
    assert wider.general_of("count") == ["other"]
    assert derive(wider, "data", ["0.5", "1"]).general_of("count 0.5") == ["other"]
    assert derive(wider, "ratio", ["0.5"]).general == texts


@pytest.mark.parametrize(
    ("what", "values", "message"),
    [
        ("rates", [], "the ablation must be one of ratio, layers, data, got 'rates'; did you mean ratio"),
        ("ratio", ["half"], "--values must be numbers with commas between them, got 'half'"),
        ("ratio", ["1.5"], "keep_ratios must lie in [0, 1]"),
        ("layers", ["3-0"], "layers_to_transform must have ranges that rise"),
        ("data", ["0"], "values must lie in (0, 1], got 0"),
    ],
)
def test_a_wrong_request_says_so(study, what, values, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("(", r"\(")):
        derive(study, what, values)


def test_an_ablation_of_one_domain_leaves_the_others_out(study):
    two = dataclasses.replace(study, domains={**study.domains, "other": study.domains["count"]}, answers=["other"])
    assert list(derive(two, "ratio", ["0.5"], ["count"]).domains) == ["count"]
    assert derive(two, "ratio", ["0.5"], ["count"]).answers == []
    assert list(derive(two, "data", ["0.5"], ["other"]).domains) == ["other 0.5"]
    with pytest.raises(ValueError, match="--domain must be one of count, other, got 'othr'; did you mean other"):
        derive(two, "ratio", ["0.5"], ["othr"])


def numbers(arms):
    rows = [
        {
            "arm": arm,
            "kind": kind,
            "setting": {"keep_ratio": None if (label := arm.rpartition(" ")[2]).isalpha() else float(label)},
            "minus_full": {"estimate": value, "low": value - 0.01, "high": value + 0.01},
        }
        for arm, kind, value in arms
    ]
    return {"domains": {"code": {"rows": rows}}}


def test_what_has_no_ratio_is_a_level_in_an_ablation_of_ratios():
    arms = [("control", "control", -0.1), ("free", "mask", -0.3), ("MFT 0.9", "mask", -0.2), ("MFT 0.5", "mask", 0.2)]
    lines = ablation_lines(numbers([*arms, ("random 0.5", "random", 3.0)]), "ratio")["code"]
    assert [(label, d["estimate"]) for label, d in lines["free"].points] == [("0.5", -0.3), ("0.9", -0.3)]
    assert [(label, d["estimate"]) for label, d in lines["control"].points] == [("0.5", -0.1), ("0.9", -0.1)]
    assert sorted((label, d["estimate"]) for label, d in lines["MFT"].points) == [("0.5", 0.2), ("0.9", -0.2)]
    assert [label for label, _ in lines["random"].points] == ["0.5"]


def test_shares_of_the_data_join_into_a_line_an_arm():
    few, all_of_it = (
        numbers([("MFT", "mask", v), ("MFT paper", "mask", 2 * v)])["domains"]["code"] for v in (0.1, 0.2)
    )
    panels = ablation_lines({"domains": {"C++ code 0.1": few, "C++ code 1": all_of_it}}, "data")
    drawn = {name: [(share, d["estimate"]) for share, d in line.points] for name, line in panels["C++ code"].items()}
    assert drawn == {"MFT": [("0.1", 0.1), ("1", 0.2)], "MFT paper": [("0.1", 0.2), ("1", 0.4)]}


@pytest.mark.slow
def test_an_ablation_runs_from_the_command_line(ground):
    make_study(ground, FEW)
    succeed("ablate", "layers", "--config", ground / "study.yaml", "seeds=[0]", "--values", "1,2-3")
    directory = ground / "run-layers"
    assert "| MFT 2-3 |" in (directory / "table.md").read_text().replace("**", "")
    assert (directory / "ablation.png").stat().st_size > 10_000


@pytest.mark.slow
def test_an_ablation_takes_the_fine_tunes_of_its_study(ground, tmp_path):
    study = make_study(ground, FEW, ["seeds=[0]"])
    findings, _ = run_quietly(study, tmp_path / "run")
    ablated = derive(study, "ratio", ["0.5"])
    # two rates, and the weights of the best one
    assert copy_fine_tunes(tmp_path / "run", ablated, tmp_path / "ablated") == 3
    again, lines = run_quietly(ablated, tmp_path / "ablated")
    assert "full, lr" not in "".join(line for line in lines if "on test" not in line)
    assert again.chosen["count"]["full"] == findings.chosen["count"]["full"]
    assert equal(again.test["count"]["full"], findings.test["count"]["full"])
