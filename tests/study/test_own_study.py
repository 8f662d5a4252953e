"""The study for a user's own data, from their model and chats to its report."""

import json

import pytest
from tiny_run import succeed

from mft.config import MaskConfig
from mft_study.evidence.sums import read_sums
from mft_study.load import load_study

TRAINED = ("control", "MFT", "LoRA", "LoRA 7")
CODED = "LoRA 7 in 4 bits"


def test_it_holds_every_arm_against_the_same_start_with_as_many_settings_to_choose_from():
    study = load_study("own")
    assert list(study.arms) == ["base", *TRAINED, CODED]
    assert len({len(study.arms[name].settings(study.mask)) for name in TRAINED}) == 1
    assert all(study.arms[name].mask_config(study.mask).layers_to_transform is None for name in TRAINED)
    assert study.arms["MFT"].mask_config(study.mask).budget == MaskConfig().budget


def test_data_stands_for_the_only_domain():
    study = load_study("own", ["data.source=my.jsonl", "data.sequence_length=128"])
    assert (study.domains["own"].source, study.domains["own"].sequence_length) == ("my.jsonl", 128)
    with pytest.raises(
        ValueError, match=r"must be data.KEY, in a study of one domain; its domains are headers, problems"
    ):
        load_study("small", ["data.source=my.jsonl"])
    with pytest.raises(ValueError, match=r"'domains.own.sorce'; did you mean domains.own.source"):
        load_study("own", ["data.sorce=my.jsonl"])


@pytest.mark.slow
def test_one_command_runs_it_on_a_model_and_a_file_of_ones_own(ground, tmp_path):
    own = [f"data.source={ground}/data.jsonl", f"model.name={ground}/model", "mask.layers_to_transform=2-3"]
    small = ["model.dtype=float32", "data.sequence_length=12", "data.max_train_tokens=144", "data.max_eval_tokens=96"]
    small += ["seeds=[0]", "extensions=0", "checkpoints=1", "workers=1", f"output_dir={tmp_path}/run"]
    small += [f"arms.{name}.epochs=[1]" for name in TRAINED]
    output = succeed("compare", "--config", "own", *own, *small)
    first = next(line for line in output.splitlines() if line.startswith("["))
    assert first.endswith(" left)")  # the time that the rest takes
    numbers = json.loads((tmp_path / "run" / "table.json").read_text())
    assert "own. MFT: Nothing can be concluded (" in numbers["verdicts"][0]
    assert [row["arm"] for row in numbers["domains"]["own"]["rows"]] == ["base", *TRAINED, CODED]
    bytes_of = {row["arm"]: row["bytes"] for row in numbers["domains"]["own"]["rows"]}
    assert bytes_of[CODED] < bytes_of["LoRA 7"]
    sums = read_sums(tmp_path / "run" / "sums.npz")
    assert set(sums.arms("own")) == {"base", *TRAINED, CODED} <= set(sums.arms("own", split="validation"))
