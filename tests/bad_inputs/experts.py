"""What the ops over experts and `MaskedGroupedLinear` are given. Three experts have rows 0 and 1, none, and row 2: x
(3, 5), weight and scores (3, 4, 5), bias (3, 4) are ones, threshold is 0.5, packed keeps every weight.
"""

import copy
import warnings

import torch
from peft import get_peft_model
from tiny_architectures import mixtral
from tiny_mixtures import IDS, mixture
from torch import nn

import mft
from mft_kernels import (
    MaskedGroupedLinear,
    accumulate_score_grad_grouped,
    kept_thresholds,
    masked_linear_grouped,
    masked_linear_grouped_packed,
    pack_mask,
)
from mft_kernels.ops.checks import NonFiniteScores

from .registry import accepted, refused

x, grad = torch.ones(3, 5), torch.ones(3, 4)
weight, scores, bias = torch.ones(3, 4, 5), torch.ones(3, 4, 5), torch.ones(3, 4)
offsets = torch.tensor([2, 2, 3], dtype=torch.int32)
threshold = torch.tensor(0.5)
packed = pack_mask(scores, threshold)


def under_peft(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.24 by an old name
        return get_peft_model(model, config)


def ends(*rows):
    return torch.tensor(rows, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------- rows of experts


@refused(ValueError, where="offsets", got="got 1 after 2", rule="must not fall, as the rows of expert 1 end no earlier")
def offsets_that_fall():
    masked_linear_grouped(x, weight, scores, threshold, ends(2, 1, 3))


@refused(ValueError, where="offsets", got="got 4", rule="must end within the 3 rows of x")
def offsets_past_the_rows():
    masked_linear_grouped_packed(x, weight, packed, ends(2, 2, 4))


@refused(ValueError, where="offsets", got="got -1 after 0", rule="must not fall")
def an_offset_below_0():
    accumulate_score_grad_grouped(torch.zeros(3, 4, 5), grad, x, ends(-1, 2, 3))


@refused(ValueError, where="offsets", got="shape (2,)", rule="must be (3,)", remedy="cumsum the number of rows of each")
def an_offset_too_few():
    masked_linear_grouped(x, weight, scores, threshold, ends(2, 3))


@refused(TypeError, where="offsets", got="torch.int64", rule="must be int32", remedy="use offsets.int()")
def offsets_in_64_bits():
    masked_linear_grouped(x, weight, scores, threshold, offsets.long())


@refused(ValueError, where="weight", got="(0, 4, 5)", rule="must hold at least one expert")
def no_expert():
    masked_linear_grouped(x, weight[:0], scores[:0], threshold, offsets[:0])


@accepted("the last row is nobody's: its output and its gradient are 0")
def rows_past_the_last_offset():
    own = x.clone().requires_grad_()
    y = masked_linear_grouped(own, weight, scores, threshold, ends(1, 1, 2))
    y.sum().backward()
    assert not y[2].any()
    assert not own.grad[2].any()


# ---------------------------------------------------------------------------------------------- shapes


@refused(ValueError, where="weight", got="shape (4, 5)", rule="must be (E, N, K), the experts in one tensor")
def a_weight_of_one_expert():
    masked_linear_grouped(x, weight[0], scores[0], threshold, offsets)


@refused(ValueError, where="x", got="(3, 4)", rule="must be (rows, 5)", remedy="transposed=True reads it as the other")
def rows_for_the_other_layout():
    masked_linear_grouped(grad, weight, scores, threshold, offsets)


@refused(ValueError, where="x", got="(1, 3, 5)", rule="must be (rows, 5)")
def a_batch_of_rows():
    masked_linear_grouped(x[None], weight, scores, threshold, offsets)


@refused(ValueError, where="bias", got="(4,)", rule="must be one a row and expert (3, 4)")
def a_bias_for_all_experts():
    masked_linear_grouped(x, weight, scores, threshold, offsets, bias[0])


@refused(
    ValueError, where="threshold", got="(4,)", rule="must be () or one an expert (3,)", remedy="see kept_thresholds"
)
def a_threshold_for_each_row():
    masked_linear_grouped(x, weight, scores, torch.ones(4), offsets)


@refused(ValueError, where="packed", got="(12, 1)", rule="must be (3, 4, 1)")
def bits_of_all_experts_in_one_matrix():
    masked_linear_grouped_packed(x, weight, packed.flatten(0, 1), offsets)


@refused(ValueError, where="out", got="shape (4, 5)", rule="must be contiguous and (E, N, K)")
def a_gradient_of_one_expert():
    accumulate_score_grad_grouped(torch.zeros(4, 5), grad, x, offsets)


@refused(ValueError, where="weight", got="(4, 5)", rule="must be (E, N, K) of at least one expert")
def a_layer_of_one_expert():
    MaskedGroupedLinear(weight[0])


@refused(ValueError, where="scores", got="shape (5,)", rule="must be (experts, ...), at least one")
def thresholds_of_one_vector():
    kept_thresholds(scores[0, 0], 0.9)


# ---------------------------------------------------------------------------------------------- values


@refused(
    NonFiniteScores,
    where="scores of module 'experts.up'",
    got="20 NaN or Inf",
    rule="must be finite",
    remedy="expert 1",
)
def an_expert_of_nan():
    layer = MaskedGroupedLinear(weight)
    layer.module_name = "experts.up"
    with torch.no_grad():
        layer.scores[1] = torch.nan
    layer(x, offsets)


@accepted("an expert without rows computes nothing: its weight may be anything, and its gradient is 0")
def nan_in_an_expert_without_rows():
    own, strange = scores.clone().requires_grad_(), weight.clone()
    strange[1] = torch.nan
    y = masked_linear_grouped(x, strange, own, threshold, offsets)
    y.sum().backward()
    assert y.isfinite().all()
    assert not own.grad[1].any()


# ---------------------------------------------------------------------------------------------- models


def moe():
    return copy.deepcopy(_moe)


_moe = mixtral()


@refused(
    ValueError,
    where="cannot mask model.layers.0.mlp.experts.down_proj",
    got="tied to draft.weight",
    rule="Untie it first",
)
def experts_that_another_module_uses_too():
    model = moe()
    model.draft = nn.Module()
    model.draft.weight = model.model.layers[0].mlp.experts.down_proj
    mft.mask_model(model, mft.MaskConfig())


@refused(
    ValueError,
    where="target_parameters",
    got="'experts.gate_proj'",
    rule="matches the weight of no linear layer",
    remedy="did you mean",
)
def experts_by_a_name_that_there_is_not():
    mft.mask_model(moe(), mft.MaskConfig(target_parameters=["experts.gate_proj"]))


@refused(
    ValueError,
    where="cannot mask model.layers.0.mlp.experts.gate_up_proj",
    got="torch.float8_e4m3fn",
    rule="masks need fp32, fp16 or bf16",
)
def experts_in_eight_bits():
    model = moe()
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    mft.mask_model(model, mft.MaskConfig())


# ---------------------------------------------------------------------------------------------- PEFT, and banks


@refused(
    ValueError,
    where="target_parameters",
    got="'experts.gate_proj'",
    rule="matches the weight of no linear layer",
    remedy="did you mean",
)
def experts_under_peft_by_a_name_that_there_is_not():
    under_peft(moe(), mft.MaskPeftConfig(target_parameters=["experts.gate_proj"]))


@refused(
    NonFiniteScores,
    where="scores of module 'model.layers.1.mlp.experts.down_proj'",
    got="1 NaN or Inf",
    rule="must be finite",
    remedy="expert 2",
)
def scores_of_nan_under_peft():
    model = under_peft(mixture("Olmoe"), mft.MaskPeftConfig(target_parameters=["experts.down_proj"]))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.experts.mft_scores["default"]["down_proj"][2, 0, 0] = torch.nan
    model(IDS)


@refused(
    ValueError,
    where="adapter_names",
    got="got 3 of them and an input of (2, 12, 32)",
    rule="must be one a row of a batch",
    remedy="repeat a task for each beam and returned sequence",
)
def an_adapter_too_many_for_the_rows_of_a_mixture():
    model = under_peft(mixture("Olmoe"), mft.MaskPeftConfig(target_parameters=["experts.down_proj"])).eval()
    model(IDS, adapter_names=["default", "__base__", "default"])


@refused(
    ValueError,
    where="tasks",
    got="got 2 of them and an input of (48, 32)",
    rule="must be one a row of a batch",
    remedy="where the model flattens rows, use one task a batch",
)
def a_task_a_row_for_experts_whose_rows_come_sorted(tmp):
    masks = mft.MaskConfig(target_parameters=["mlp.input_linear.weight"])
    mft.save_masks(mft.mask_model(mixture("JetMoe"), masks), tmp / "code")
    bank = mft.load_mask_bank(mixture("JetMoe"), {"code": tmp / "code"})
    with bank.use(["code", None]):
        bank.model(IDS)
