"""mft.models.causal_lm: decoder and head of models that name their parts differently, or have more parts."""

import pytest
import torch
from architectures.small import small_model
from architectures.sweeps import SWEEPS
from tiny import make_rows

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model
from mft.models.causal_lm import run_decoder, split_at_head
from mft.training.loop import train_masks

CAUSAL = SWEEPS[0]


def small(kind):
    return small_model(kind, CAUSAL.name, CAUSAL.kinds()[kind]).eval()


@pytest.mark.parametrize(
    ("kind", "whole"), [("llama", False), ("llama4_text", False), ("mllama", False), ("rembert", True)]
)
def test_the_head_of_what_is_run_gives_the_model_s_logits(kind, whole):
    model, ids = small(kind), torch.arange(5, 13)[None]
    run, head = split_at_head(model, ids)
    assert (run is run_decoder) != whole
    with torch.no_grad():
        torch.testing.assert_close(head(run(model, ids)), model(ids).logits)


def test_masks_of_llama_4_train():
    model = mask_model(small("llama4_text"), MaskConfig())
    reports = train_masks(model, make_rows(), TrainConfig(steps=2, batch_size=4, lr=1e-2))
    assert all(report.loss > 0 for report in reports)
