"""Studies: what mft compare and mft ablate refuse of arms, grids and budgets."""

import dataclasses

from mft.study.ablate import derive
from mft.study.load import load_study
from mft.study.store import fine_tunes_in

TABLE = r"""
a bound of no epochs
    dataclasses.replace(load_study("small"), max_epochs=0)
    -> ValueError: max_epochs | must be positive | got 0.0
fewer further settings than none
    dataclasses.replace(load_study("small"), extensions=-1)
    -> ValueError: extensions | must be at least 0 | got -1
a mask that the study does not have
    derive(load_study("small"), "layers", masks=["MTF"])
    -> ValueError: --arm | must be one of MFT (paper), MFT | got 'MTF' | did you mean MFT
an arm in codes that is made of one without codes
    study = load_study("quantised-patched")
    study.arms["MFT on NF4"].start = None
    dataclasses.replace(study)
    -> ValueError: arms.MFT in NF4.of | must name an arm that begins at a quantized one | got MFT on NF4
fine tunes of what is no study
    fine_tunes_in("runs/nowhere", load_study("small"))
    -> ValueError: --fine-tunes-of | must be the output_dir of a study | got runs/nowhere without a study.yaml
an ablation of keep ratios of a mask that has none
    derive(load_study("small"), "ratio", masks=["MFT"])
    -> ValueError: arms | must hold a mask without a threshold or a budget to be ablated by ratio | got MFT
an ablation of data of a fine tune with one number of epochs
    study = load_study("moe")
    assert study.arms["full fine-tune"].epochs == [4]
    assert derive(study, "data").arms["full fine-tune"].epochs == [4, 8]
    -> accepted: each share's fine-tune may choose twice as many epochs too, and more while it wants them
"""
