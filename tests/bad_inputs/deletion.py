"""Deletion tuning on the same Llama: scores that begin by data, and what they learn by."""

import torch
from tiny import make_llama, make_rows
from transformers import GPT2Config, GPT2LMHeadModel

import mft
from mft.config import DataConfig, MaskConfig, RunConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig
from mft.training.loop import train_masks

from .registry import accepted, refused

FREE = {"mode": "value", "threshold": 0.0, "init": "constant"}


@refused(
    ValueError,
    where="target_modules",
    got="'gate_proj' matches no linear layer",
    rule="linear layers here: c_attn, c_fc, c_proj",
)
def deletion_tuning_of_a_model_without_gate_projections():
    config = mft.load_config("deletion")
    mft.mask_from_data(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)), config.mask, make_rows())


@refused(
    ValueError, where="sharpness", got="got 50.0", rule="must be null where threshold is null, from which it counts"
)
def a_sharpness_beside_a_keep_ratio():
    MaskConfig(sharpness=50)


@refused(ValueError, where="sharpness", got="[50, 500, 5000]", rule="must be a number or a list of 2 numbers or null")
def a_sharpness_of_three_numbers():
    MaskConfig(threshold=0, sharpness=[50, 500, 5000])


@refused(ValueError, where="sharpness", got="got (50.0, 0.0)", rule="must be positive (or null)")
def a_sharpness_that_ends_at_0():
    MaskConfig(threshold=0, sharpness=[50, 0])


@refused(ValueError, where="deletion_penalty", got="got 1.0", rule="must be 0 where sharpness is null")
def a_penalty_without_sharpness():
    MaskConfig(threshold=0, deletion_penalty=1)


@refused(ValueError, where="deletion_penalty", got="got -1.0", rule="must be at least 0")
def a_reward_for_deletions():
    MaskConfig(threshold=0, sharpness=50, deletion_penalty=-1)


@refused(ValueError, where="calibration_rows", got="got 0", rule="must be at least 1")
def calibration_on_no_row():
    MaskConfig(init="wanda", calibration_rows=0)


@refused(
    ValueError,
    where="init",
    got="got wanda",
    rule="must be one of normal, magnitude, constant where masks are made without data",
    remedy="call mft.mask_from_data(model, config, rows)",
)
def masks_by_data_without_data():
    mask_model(make_llama(), MaskConfig(init="wanda"))


@refused(
    ValueError,
    where="init",
    got="got wanda",
    rule="must be one of normal, magnitude, constant where masks are made without data",
    remedy="under PEFT take constant, and then mft.init_adapter_from_data(model, config, rows)",
)
def an_adapter_by_data_without_data():
    MaskPeftConfig(init="wanda")


@refused(
    ValueError,
    where="mask.init",
    got="got wanda",
    rule="must be one of normal, magnitude, constant with data.streaming, whose rows are read once",
)
def masks_by_the_data_of_a_stream():
    RunConfig(data=DataConfig(streaming=True), mask=MaskConfig(init="wanda"), train=TrainConfig(steps=1))


@refused(
    ValueError,
    where="importance of model.layers.3.mlp.gate_proj by wanda",
    got="got values from nan to nan",
    rule="must be finite",
    remedy="look for NaN or Inf in the model's weights",
)
def masks_by_data_of_a_model_with_nan():
    model = make_llama()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    mask = MaskConfig(**FREE | {"init": "wanda"}, target_modules=["gate_proj"], layers_to_transform=3)
    mft.mask_from_data(model, mask, make_rows())


@refused(
    ValueError,
    where="model.layers.3.mlp.gate_proj",
    got="got None",
    rule="threshold must be a number with mask.sharpness, which counts from it",
)
def a_threshold_that_is_taken_away():
    mask = MaskConfig(**FREE, sharpness=50, target_modules=["gate_proj"], layers_to_transform=3)
    model = mask_model(make_llama(), mask)
    for module in masked_modules(model).values():
        module.threshold = None
    train_masks(model, make_rows(), TrainConfig(steps=1))


@refused(
    ValueError,
    where="model.layers.3.mlp.gate_proj",
    got="got float16",
    rule="train.grad_dtype must be float32 or bfloat16 with mask.sharpness",
)
def a_surrogate_gradient_in_float16():
    mask = MaskConfig(**FREE, sharpness=50, target_modules=["gate_proj"], layers_to_transform=3)
    train_masks(mask_model(make_llama(), mask), make_rows(), TrainConfig(steps=1, grad_dtype="float16"), way="resident")


@accepted("all there are: what is drawn is at most the data")
def more_calibration_rows_than_rows():
    mask = MaskConfig(**FREE | {"init": "wanda", "calibration_rows": 99}, target_modules=["gate_proj"])
    assert masked_modules(mft.mask_from_data(make_llama(), mask, make_rows(3)))
