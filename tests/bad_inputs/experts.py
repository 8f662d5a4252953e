"""Inputs of the ops over experts and of `MaskedGroupedLinear`. Three experts have rows 0 and 1, no rows, and row 2. x
(3, 5), weight and scores (3, 4, 5) and bias (3, 4) are ones, threshold is 0.5, packed keeps every weight.
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

x, grad = torch.ones(3, 5), torch.ones(3, 4)
weight, scores, bias = torch.ones(3, 4, 5), torch.ones(3, 4, 5), torch.ones(3, 4)
offsets = torch.tensor([2, 2, 3], dtype=torch.int32)
threshold = torch.tensor(0.5)
packed = pack_mask(scores, threshold)
_moe = mixtral()


def moe():
    return copy.deepcopy(_moe)


def under_peft(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 calls transformers 5.24 by an old name
        return get_peft_model(model, config)


def ends(*rows):
    return torch.tensor(rows, dtype=torch.int32)


TABLE = r"""
# rows of experts
offsets that fall
    masked_linear_grouped(x, weight, scores, threshold, ends(2, 1, 3))
    -> ValueError: offsets | must not decrease, because the rows of expert 1 cannot end before | got 1 after 2
offsets past the rows
    masked_linear_grouped_packed(x, weight, packed, ends(2, 2, 4))
    -> ValueError: offsets | must end within the 3 rows of x | got 4
an offset too few
    masked_linear_grouped(x, weight, scores, threshold, ends(2, 3))
    -> ValueError: offsets | must be (3,) | shape (2,) | cumsum the number of rows of each
offsets in 64 bits
    masked_linear_grouped(x, weight, scores, threshold, offsets.long())
    -> TypeError: offsets | must be int32 | torch.int64 | use offsets.int()
no expert
    masked_linear_grouped(x, weight[:0], scores[:0], threshold, offsets[:0])
    -> ValueError: weight | must hold at least one expert | (0, 4, 5)
rows past the last offset
    own = x.clone().requires_grad_()
    y = masked_linear_grouped(own, weight, scores, threshold, ends(1, 1, 2))
    y.sum().backward()
    assert not y[2].any()
    assert not own.grad[2].any()
    -> accepted: the last row is nobody's: its output and its gradient are 0

# shapes
a weight of one expert
    masked_linear_grouped(x, weight[0], scores[0], threshold, offsets)
    -> ValueError: weight | must be (E, N, K), the experts in one tensor | shape (4, 5)
rows for the other layout
    masked_linear_grouped(grad, weight, scores, threshold, offsets)
    -> ValueError: x | must be (rows, 5) | (3, 4) | transposed=True reads it as the other
a batch of rows
    masked_linear_grouped(x[None], weight, scores, threshold, offsets)
    -> ValueError: x | must be (rows, 5) | (1, 3, 5)
a bias for all experts
    masked_linear_grouped(x, weight, scores, threshold, offsets, bias[0])
    -> ValueError: bias | must be one value per output feature and expert (3, 4) | (4,)
a threshold for each row
    masked_linear_grouped(x, weight, scores, torch.ones(4), offsets)
    -> ValueError: threshold | must be () or one per expert (3,) | (4,) | see kept_thresholds
bits of all experts in one matrix
    masked_linear_grouped_packed(x, weight, packed.flatten(0, 1), offsets)
    -> ValueError: packed | must be (3, 4, 1) | (12, 1)
a gradient of one expert
    accumulate_score_grad_grouped(torch.zeros(4, 5), grad, x, offsets)
    -> ValueError: out | must be contiguous and (E, N, K) | shape (4, 5)
a layer of one expert
    MaskedGroupedLinear(weight[0])
    -> ValueError: weight | must be (E, N, K) of at least one expert | (4, 5)
thresholds of one vector
    kept_thresholds(scores[0, 0], 0.9)
    -> ValueError: scores | must be (experts, ...), at least one | shape (5,)

# values
an expert of nan
    layer = MaskedGroupedLinear(weight)
    layer.module_name = "experts.up"
    with torch.no_grad():
        layer.scores[1] = torch.nan
    layer(x, offsets)
    -> NonFiniteScores: scores of module 'experts.up' | must be finite | 20 NaN or Inf | expert 1
nan in an expert without rows
    own, strange = scores.clone().requires_grad_(), weight.clone()
    strange[1] = torch.nan
    y = masked_linear_grouped(x, strange, own, threshold, offsets)
    y.sum().backward()
    assert y.isfinite().all()
    assert not own.grad[1].any()
    -> accepted: an expert without rows computes nothing: its weight may be anything, and its gradient is 0

# models
experts that another module uses too
    model = moe()
    model.draft = nn.Module()
    model.draft.weight = model.model.layers[0].mlp.experts.down_proj
    mft.mask_model(model, mft.MaskConfig())
    -> ValueError: cannot mask model.layers.0.mlp.experts.down_proj | Untie it first | tied to draft.weight
experts by a name that there is not
    mft.mask_model(moe(), mft.MaskConfig(target_parameters=["experts.gate_proj"]))
    -> ValueError: target_parameters | matches the weight of no linear layer | 'experts.gate_proj' | did you mean
experts in eight bits
    model = moe()
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    mft.mask_model(model, mft.MaskConfig())
    -> ValueError: cannot mask model.layers.0.mlp.experts.gate_up_proj | masks need fp32, fp16 or bf16
        | torch.float8_e4m3fn

# PEFT, and banks
scores of nan under peft
    model = under_peft(mixture("Olmoe"), mft.MaskPeftConfig(target_parameters=["experts.down_proj"]))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.experts.mft_scores["default"]["down_proj"][2, 0, 0] = torch.nan
    model(IDS)
    -> NonFiniteScores: scores of module 'model.layers.1.mlp.experts.down_proj' | must be finite | 1 NaN or Inf
        | expert 2
an adapter too many for the rows of a mixture
    model = under_peft(mixture("Olmoe"), mft.MaskPeftConfig(target_parameters=["experts.down_proj"])).eval()
    model(IDS, adapter_names=["default", "__base__", "default"])
    -> ValueError: adapter_names | must have one entry per row of a batch | got 3 of them and an input of (2, 12, 32)
        | repeat a task for each beam and returned sequence
a task a row for experts whose rows come sorted
    masks = mft.MaskConfig(target_parameters=["mlp.input_linear.weight"])
    mft.save_masks(mft.mask_model(mixture("JetMoe"), masks), tmp / "code")
    bank = mft.load_mask_bank(mixture("JetMoe"), {"code": tmp / "code"})
    with bank.use(["code", None]):
        bank.model(IDS)
    -> ValueError: tasks | must have one entry per row of a batch | got 2 of them and an input of (48, 32)
        | if the model flattens rows, use one task per batch
"""
