"""Studies: what mft compare and mft ablate refuse of arms, grids and budgets."""

import dataclasses

from mft.study.ablate import derive
from mft.study.load import load_study
from mft.study.store import fine_tunes_in

from .registry import accepted, refused


@refused(ValueError, where="max_epochs", got="got 0.0", rule="must be positive")
def a_bound_of_no_epochs():
    dataclasses.replace(load_study("small"), max_epochs=0)


@refused(ValueError, where="extensions", got="got -1", rule="must be at least 0")
def fewer_further_settings_than_none():
    dataclasses.replace(load_study("small"), extensions=-1)


@refused(
    ValueError,
    where="--arm",
    got="got 'MTF'",
    rule="must be one of MFT (paper), MFT",
    remedy="did you mean MFT",
)
def a_mask_that_the_study_does_not_have():
    derive(load_study("small"), "layers", masks=["MTF"])


@refused(
    ValueError,
    where="--fine-tunes-of",
    got="got runs/nowhere without a study.yaml",
    rule="must be the output_dir of a study",
)
def fine_tunes_of_what_is_no_study():
    fine_tunes_in("runs/nowhere", load_study("small"))


@refused(
    ValueError,
    where="arms",
    got="got MFT",
    rule="must hold a mask without a threshold to be ablated by ratio",
)
def an_ablation_of_keep_ratios_of_a_mask_that_has_none():
    derive(load_study("small"), "ratio", masks=["MFT"])


@accepted("each share's fine-tune may choose twice as many epochs too, and more while it wants them")
def an_ablation_of_data_of_a_fine_tune_with_one_number_of_epochs():
    study = load_study("moe")
    assert study.arms["full fine-tune"].epochs == [4]
    assert derive(study, "data").arms["full fine-tune"].epochs == [4, 8]
