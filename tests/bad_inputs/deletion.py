"""Deletion tuning on the same Llama: scores that begin from data, and how they learn. `gate(...)` makes free masks on a
gate projection.
"""

import torch
from tiny import make_llama, make_rows
from transformers import GPT2Config, GPT2LMHeadModel

import mft
from mft.config import DataConfig, MaskConfig, RunConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig
from mft.training.loop import train_masks


def gate(**changes):
    """Return free masks on a gate projection."""
    free = {"mode": "value", "threshold": 0.0, "init": "constant"}
    return MaskConfig(**free | changes, target_modules=["gate_proj"], layers_to_transform=3)


TABLE = r"""
deletion tuning of a model without gate projections
    config = mft.load_config("deletion")
    mft.mask_from_data(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)), config.mask, make_rows())
    -> ValueError: target_modules | linear layers here: c_attn, c_fc, c_proj | 'gate_proj' matches no linear layer
a sharpness beside a keep ratio
    MaskConfig(sharpness=50)
    -> ValueError: sharpness | must be null if threshold is null, because it is measured from the threshold | got 50.0
a sharpness of three numbers
    MaskConfig(threshold=0, sharpness=[50, 500, 5000])
    -> ValueError: sharpness | must be a number or a list of 2 numbers or null | [50, 500, 5000]
a sharpness that ends at 0
    MaskConfig(threshold=0, sharpness=[50, 0])
    -> ValueError: sharpness | must be positive (or null) | got (50.0, 0.0)
a penalty without sharpness
    MaskConfig(threshold=0, deletion_penalty=1)
    -> ValueError: deletion_penalty | must be 0 if sharpness is null | got 1.0
a reward for deletions
    MaskConfig(threshold=0, sharpness=50, deletion_penalty=-1)
    -> ValueError: deletion_penalty | must be at least 0 | got -1.0
calibration on no row
    MaskConfig(init="wanda", calibration_rows=0)
    -> ValueError: calibration_rows | must be at least 1 | got 0
masks by data without data
    mask_model(make_llama(), MaskConfig(init="wanda"))
    -> ValueError: init | must be one of normal, magnitude, constant if masks are made without data | got wanda
        | call mft.mask_from_data(model, config, rows)
masks by the data of a stream
    RunConfig(data=DataConfig(streaming=True), mask=MaskConfig(init="wanda"), train=TrainConfig(steps=1))
    -> ValueError: mask.init | must be one of normal, magnitude, constant with data.streaming, because its rows
        | got wanda
masks by data of a model with nan
    model = make_llama()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    mft.mask_from_data(model, gate(init="wanda"), make_rows())
    -> ValueError: importance of model.layers.3.mlp.gate_proj by wanda | must be finite | got values from nan to nan
        | look for NaN or Inf in the model's weights
a threshold that is taken away
    model = mask_model(make_llama(), gate(sharpness=50))
    for module in masked_modules(model).values():
        module.threshold = None
    train_masks(model, make_rows(), TrainConfig(steps=1))
    -> ValueError: model.layers.3.mlp.gate_proj | threshold must be a number with mask.sharpness, which is measured
        | got None
a surrogate gradient in float16
    model = mask_model(make_llama(), gate(sharpness=50))
    train_masks(model, make_rows(), TrainConfig(steps=1, grad_dtype="float16"), way="resident")
    -> ValueError: model.layers.3.mlp.gate_proj | train.grad_dtype must be float32 or bfloat16 with mask.sharpness
        | got float16
more calibration rows than rows
    assert masked_modules(mft.mask_from_data(make_llama(), gate(init="wanda", calibration_rows=99), make_rows(3)))
    -> accepted: all there are: what is drawn is at most the data
"""
